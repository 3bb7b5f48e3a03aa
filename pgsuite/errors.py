"""What a user can mend."""


class UserError(Exception):
    """A mistake that the user can correct, described in one message; printed without a traceback."""
