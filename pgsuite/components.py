"""Components that a setting chooses: by name, by dotted path, or with settings of their own; and other objects in the
packages of users, found by a path such as ``my_package:name``.

    policy.recurrent=gru
    policy.recurrent=my_package.MinGRU
    'policy.recurrent={_target_: my_package.MinGRU, leak: 0.1}'

A component is any class.  Its settings are those parameters of its constructor that the program does not fill itself,
and their annotations are their types (``pgsuite.settings``).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, TypeVar, get_args, get_type_hints

from pgsuite.errors import UserError, place, reason
from pgsuite.settings import closest, require
from pgsuite.trust import imported

T = TypeVar("T")
Component = str | dict[str, Any]  # a name, a dotted path, or settings with a _target_ that is one of the two


def is_component(hint: Any) -> bool:
    """Whether a field of this type holds a ``Component``, or one or None."""
    return all(kind in get_args(hint) for kind in get_args(Component))


def component_class(choice: Component, known: Mapping[str, type[T]], base: type[T], where: str) -> type[T]:
    """The subclass of ``base`` that the setting ``where`` chooses: one of ``known`` by its name, or any other by its
    dotted path.  Raises ValueError if there is none, and UserError for one that is not trusted."""
    path = str(choice.get("_target_", "") if isinstance(choice, Mapping) else choice)
    if path in known:
        return known[path]
    module, _, name = path.rpartition(".")
    if not module:
        options = f"{closest(path, known).removesuffix('?')}, or " if known else ""
        raise ValueError(f"no {where} {path!r}; {options}a class by its dotted path, such as my_package.Mine")
    try:
        found = getattr(imported(module, name, where), name, None)
    except ImportError as error:
        raise ValueError(f"{where}={path} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{where}={path} is no subclass of {base.__module__}.{base.__qualname__}")
    return found


def make_component(
    choice: Component, known: Mapping[str, type[T]], base: type[T], where: str, *args: Any, **parts: Any
) -> T:
    """The component that the setting ``where`` chooses, made from args, parts and the settings beside its ``_target_``.

    Raises ValueError for an unknown class or setting, a missing one, a value of the wrong type, and a constructor that
    does not take these arguments.
    """
    cls = component_class(choice, known, base, where)
    given = {key: x for key, x in choice.items() if key != "_target_"} if isinstance(choice, Mapping) else {}
    parameters = inspect.signature(cls).parameters
    named = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    settings = [name for name in named[len(args) :] if name not in parts]
    for name in given:
        if name not in settings:
            raise ValueError(f"no setting {name!r} in {where}; {closest(name, settings)}")
    for name in settings:
        if name not in given and parameters[name].default is inspect.Parameter.empty:
            raise ValueError(
                f"{where} needs the setting {name!r}: {{_target_: {cls.__module__}.{cls.__qualname__}, {name}: ...}}"
            )
    try:
        hints = get_type_hints(cls.__init__, include_extras=True) if given else {}
        inspect.signature(cls).bind(*args, **parts, **given)
    except (NameError, TypeError) as error:  # of a name imported for type checkers only; of other parameters
        raise ValueError(f"{where}: the constructor of {cls.__module__}.{cls.__qualname__}: {error}") from error
    for name, value in given.items():
        require(hints.get(name, Any), value, f"{where}.{name}")
    return cls(*args, **parts, **given)


def find_object(path: str, setting: str) -> Any:
    """The object at the path package:name, the value of a setting.  Raises ValueError if it does not exist, and
    UserError if it is not trusted."""
    package, _, name = path.partition(":")
    if not (package and name):
        raise ValueError(f"{setting} must be something in a package, such as my_package:name, got {path!r}")
    try:
        module = imported(package, name, setting, ":")
    except ImportError as error:
        raise ValueError(f"{setting}={path} cannot be imported: {error}") from error
    try:
        return attrgetter(name)(module)
    except AttributeError:
        names = [key for key in vars(module) if not key.startswith("_")]
        raise ValueError(f"{package} has nothing named {name!r}; {closest(name, names)}") from None


def make_object(path: str, setting: str, /, *args: Any, **options: Any) -> Any:
    """Call the object at the path package:name.  Raises ValueError if it does not accept the arguments, and in place of
    exceptions other than UserError and ValueError."""
    maker = find_object(path, setting)
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
