"""Objects in user packages, found by a path such as ``my_package:name``."""

from __future__ import annotations

import inspect
from operator import attrgetter
from typing import Any

from pgsuite.errors import UserError, place, reason
from pgsuite.settings import closest, imported


def find(path: str, setting: str) -> Any:
    """The object at the path package:name, the value of a setting.  Raises ValueError if it does not exist."""
    package, _, name = path.partition(":")
    if not (package and name):
        raise ValueError(f"{setting} must be something in a package, such as my_package:name, got {path!r}")
    try:
        module = imported(package)
    except ImportError as error:
        raise ValueError(f"{setting}={path} cannot be imported: {error}") from error
    try:
        return attrgetter(name)(module)
    except AttributeError:
        names = [key for key in vars(module) if not key.startswith("_")]
        raise ValueError(f"{package} has nothing named {name!r}; {closest(name, names)}") from None


def make(path: str, setting: str, /, *args: Any, **options: Any) -> Any:
    """Call the object at the path package:name.  Raises ValueError if it does not accept the arguments, and in place of
    exceptions other than UserError and ValueError."""
    maker = find(path, setting)
    try:
        inspect.signature(maker).bind(*args, **options)
    except (TypeError, ValueError) as error:
        given = ", ".join((*map(repr, args), *options))
        raise ValueError(f"{setting}={path} cannot be called with {given or 'nothing'}: {error}") from error
    try:
        return maker(*args, **options)
    except (UserError, ValueError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{place(error)}{setting}={path} failed: {reason(error)}") from error
