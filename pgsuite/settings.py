"""The types of hyperparameters, which state the values that are allowed, and ``check``, which enforces them.

    clip: Positive = 0.2
    gamma: Fraction = 0.99
    lr_schedule: Literal["constant", "linear"] = "constant"

One declaration serves the constructor, the configuration schema and the error message.
"""

from __future__ import annotations

import difflib
import functools
import math
import operator
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """A finite number between bounds; ``low`` itself is excluded when ``open`` is true."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and (value > self.low if self.open else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"{'above' if self.open else 'from'} {self.low:g} to {self.high:g}"
        return f"{'greater than' if self.open else 'at least'} {self.low:g}"


Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Shrink = Annotated[float, Range(0, 0.999, open=True)]
Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
TorchThreads = Annotated[int, Range(1, 256)]  # the operating system kills a process that has too many
WorldThreads = Annotated[int, Range(0, 256)]  # that step environments; 0 takes every core


# Settings of a run that do not change what it learns: runs that differ in nothing else are one experiment.
INCIDENTAL = (
    "resume",
    "trust",
    "seeds",
    "batch",
    "sweep",
    "checkpoint",
    "recover",
    "evaluation",
    "logging",
    "loggers",
    "profile",
    "env_threads",
)


# Settings and metrics that were renamed: the former name, and the present one.
RENAMED = {
    "shrink": "backtrack_coef",
    "tries": "max_backtracks",
    "line_search": "backtracking",
    "huber": "huber_delta",
    "n": "n_steps",
    "unfinished": "truncation_penalty",
    "improvement": "surrogate_improvement",
    "effective_share": "effective_sample_fraction",
}


def check(obj: Any, label: str | None = None, skip: Iterable[str] = ()) -> None:
    """Raise ValueError, naming the field and what would be right, if a field of dataclass obj breaks its type.

    Only numbers, strings, booleans, literals, dataclasses, sequences of them and unions are checked; modules and other
    parts are not, nor are fields to skip.
    """
    hints = get_type_hints(type(obj), include_extras=True)
    prefix = f"{type(obj).__name__}." if label is None else label
    for field in fields(obj):
        if field.init and field.name not in skip:
            require(hints[field.name], getattr(obj, field.name), f"{prefix}{field.name}")


@dataclass(kw_only=True)
class Checked:
    """A dataclass that checks its fields when it is constructed."""

    def __post_init__(self) -> None:
        check(self)


def require(hint: Any, value: Any, name: str) -> None:
    """Raise ValueError, saying what it must be, if a value breaks the type of the field of this name."""
    if wanted := _complaint(hint, value):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def number(hint: Any) -> type[float] | type[int] | None:
    """Which kind of number a field of this type holds, if it does."""
    if get_origin(hint) is Annotated:
        return number(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return next(filter(None, map(number, get_args(hint))), None)
    return hint if hint in (float, int) else None


def closed(hint: Any) -> Any:
    """The type of a field with open bounds made closed: a schedule may approach them arbitrarily closely."""
    if get_origin(hint) is Annotated:
        base, limits = get_args(hint)
        return Annotated[base, replace(limits, open=False)]
    if get_origin(hint) in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(closed, get_args(hint)))
    return hint


def plain(hint: Any) -> Any:
    """The type without its constraints, for libraries of configurations."""
    if get_origin(hint) is Annotated:
        return plain(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [plain(arg) for arg in get_args(hint)]
        kinds += [int] if {float, str} <= {*kinds} else []  # in such a union, a whole number is not converted
        return functools.reduce(operator.or_, kinds)
    if get_origin(hint) in (list, tuple, Sequence):
        return list[plain(get_args(hint)[0])]
    if get_origin(hint) is dict:
        return hint
    return hint if hint in (int, float, bool, str, type(None)) else Any


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name.  The class of a part, its ``_target_``, is the value of the part's own name, with
    the module only if that is outside pgsuite."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif key != "_target_":
            flat[f"{prefix}{key}"] = value
        elif prefix:
            path = str(value)
            flat[prefix.removesuffix(".")] = path.rpartition(".")[2] if path.startswith("pgsuite.") else path
    return flat


def closest(word: str, options: Iterable[str]) -> str:
    """A sentence that names the option that the word was renamed to, the nearest options, or all of them when none is
    near."""
    options = sorted(options)
    # A metric's name may have its group before it, as in algorithm/improvement.
    now = RENAMED.get(word.rpartition("/")[2])
    if renamed := [option for option in options if option.rpartition("/")[2] == now]:
        return f"it is now called {renamed[0]}"
    near = difflib.get_close_matches(word, options, n=3, cutoff=0.5)
    folded = [option for option in options if option.lower() == word.lower()]
    if near := folded or near:
        return f"did you mean {' or '.join(near)}?"
    if len(options) > 50:
        return f"none of the {len(options)} known ones has a name like it"
    return f"one of: {', '.join(options)}" if options else "nothing by any name is known there"


def _complaint(hint: Any, value: Any) -> str | None:
    """What value should have been, or None if it is that."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, limits = args
        if wanted := _complaint(base, value):
            return f"{wanted} {limits}"
        return None if value in limits else f"{_names(base)} {limits}"
    if origin in (Union, types.UnionType):
        wanted = [_complaint(arg, value) for arg in args]
        return None if None in wanted else " or ".join(w for w in wanted if w)
    if origin is Literal:
        return None if value in args else f"one of {', '.join(map(str, args))}"
    if origin is dict:
        return None if isinstance(value, Mapping) else "settings by name"
    if origin in (list, tuple, Sequence):
        wanted = {_complaint(args[0], x) for x in value} - {None} if isinstance(value, list | tuple) else {"values"}
        return f"a list, each {wanted.pop()}" if wanted else None
    if hint is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
    elif hint is int:
        ok = isinstance(value, int) and not isinstance(value, bool)
    elif hint in (bool, str, type(None)) or (isinstance(hint, type) and is_dataclass(hint)):
        ok = isinstance(value, hint)
    else:
        ok = True
    return None if ok else _names(hint)


def _names(hint: Any) -> str:
    words = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "a word",
        type(None): "null",
    }
    return words.get(hint, f"of class {hint.__name__}" if isinstance(hint, type) else str(hint))
