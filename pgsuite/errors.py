"""Mistakes that a user can correct."""


class UserError(Exception):
    """A mistake that the user can correct, described in one message; printed without a traceback."""
