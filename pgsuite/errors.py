"""Mistakes that a user can correct, and the words to do it with."""

import sys


class UserError(Exception):
    """A mistake that the user can correct, described in one message; printed without a traceback."""


def command(name: str) -> str:
    """How to start a command, such as ``train``, in the way that this process was started."""
    script = sys.argv[0].endswith(".py") and not sys.argv[0].endswith("__main__.py")
    return f"python scripts/{name.replace('-', '_')}.py" if script else f"pgsuite {name}"
