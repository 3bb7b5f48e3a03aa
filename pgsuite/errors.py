"""Errors that a user can correct, and helpers for their messages."""

import dis
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake that the user can correct, described in one message; printed without a traceback."""


def counted(count: int, what: str) -> str:
    """A number and a noun, in the singular or the plural: ``1 run``, ``2,048 environments``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def command(name: str) -> str:
    """How to start a command, such as ``train``, in the way that this process was started."""
    script = sys.argv[0].endswith(".py") and not sys.argv[0].endswith("__main__.py")
    return f"python scripts/{name.replace('-', '_')}.py" if script else f"pgsuite {name}"


def install(extra: str) -> str:
    """How to install what an optional dependency of this package needs, from a checkout or from wherever it came."""
    is_checkout = (Path(__file__).parents[1] / "pyproject.toml").is_file()
    return f"pip install -e '.[{extra}]'" if is_checkout else f"pip install 'pgsuite[{extra}]'"


OTHERS = (str(Path(__file__).parent), *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def is_own(file: str) -> bool:
    """Whether a source file is the user's own, and no part of Python, an installed package or this one."""
    return not file.startswith(("<", *OTHERS))


def place(error: BaseException, *, except_for: Sequence[str] | None = None) -> str:
    """``my_env.py:41: `` for the innermost frame of an error's traceback in a file of the user's own; empty if there is
    none.  With ``except_for``, files of this package count as well, except for those."""
    found = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    found += [(frame.filename, frame.lineno) for frame in getattr(error, "real_stack", None) or ()]  # torch's compiler
    if isinstance(error, SyntaxError):
        found.append((error.filename or "<unknown>", error.lineno))

    def counts(file: str) -> bool:
        if except_for is None:
            return is_own(file)
        return file not in except_for and (file.startswith(OTHERS[0]) or is_own(file))

    own = [_place(file, line or 1) for file, line in found if counts(file)]
    return own[-1] if own else ""


def place_of(function: Any) -> str:
    """``my_env.py:41: `` for what a function of the user's own returns: its only return statement, or its first line;
    empty for other functions."""
    code = getattr(function, "__code__", None)
    if code is None or not is_own(code.co_filename):
        return ""
    returns = [x.positions for x in dis.get_instructions(code) if x.opname.startswith("RETURN_")]
    lines = {x.lineno for x in returns if x is not None and x.lineno is not None}
    return _place(code.co_filename, lines.pop() if len(lines) == 1 else code.co_firstlineno)


def _place(file: str, line: int) -> str:
    path = Path(file)
    return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{line}: "


def reason(error: BaseException) -> str:
    """An error in one line: its class and its message."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
