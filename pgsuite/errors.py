"""Mistakes that a user can correct, and the words to do it with."""

import sys
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct, described in one message; printed without a traceback."""


def command(name: str) -> str:
    """How to start a command, such as ``train``, in the way that this process was started."""
    script = sys.argv[0].endswith(".py") and not sys.argv[0].endswith("__main__.py")
    return f"python scripts/{name.replace('-', '_')}.py" if script else f"pgsuite {name}"


def install(extra: str) -> str:
    """How to install what an optional dependency of this package needs, from a checkout or from wherever it came."""
    is_checkout = (Path(__file__).parents[1] / "pyproject.toml").is_file()
    return f"pip install -e '.[{extra}]'" if is_checkout else f"pip install 'pgsuite[{extra}]'"
