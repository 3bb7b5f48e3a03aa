"""Things of the user's own, found by a path such as ``my_package:name``."""

from __future__ import annotations

import inspect
from operator import attrgetter
from typing import Any

from pgsuite.settings import closest, imported


def find(path: str, setting: str) -> Any:
    """What is at package:name, where a setting says so.  Raises ValueError if there is nothing."""
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
    """What is made by what is at package:name.  Raises ValueError if that takes no such arguments."""
    maker = find(path, setting)
    try:
        inspect.signature(maker).bind(*args, **options)
    except (TypeError, ValueError) as error:
        given = ", ".join((*map(repr, args), *options))
        raise ValueError(f"{setting}={path} cannot be called with {given or 'nothing'}: {error}") from error
    return maker(*args, **options)
