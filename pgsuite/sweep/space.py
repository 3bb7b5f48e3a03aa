"""The settings that a search or a population varies, and their ranges: ``sweep.space.algo.lr={log: [1e-5, 1e-2]}``.

- ``{uniform: [low, high]}``: numbers between the two
- ``{log: [low, high]}``: numbers whose logarithms are uniform
- ``{int: [low, high]}``: whole numbers, both ends included
- ``{choice: [a, b, c]}``: one of some values
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from pgsuite import settings
from pgsuite.app.recipes import flat, written
from pgsuite.app.schema import locate
from pgsuite.errors import UserError
from pgsuite.settings import closest

KINDS = ("uniform", "log", "int", "choice")
WRITTEN = "{uniform: [low, high]}, {log: [low, high]}, {int: [low, high]} or {choice: [a, b]}"


@dataclass(frozen=True)
class Dimension:
    """The values that one setting may take."""

    kind: str
    values: list[Any]  # the two ends, or the choices

    def draw(self, generator: random.Random) -> Any:
        """A value at random."""
        if self.kind == "choice":
            return generator.choice(self.values)
        low, high = self.values
        if self.kind == "int":
            return generator.randint(low, high)
        return (
            math.exp(generator.uniform(math.log(low), math.log(high)))
            if self.kind == "log"
            else (generator.uniform(low, high))
        )

    def perturbed(self, value: Any, factor: float, generator: random.Random) -> Any:
        """The value multiplied or divided by ``factor``, within the range; of choices, a neighbour of the value."""
        up = generator.random() < 0.5
        if self.kind == "choice":
            place = self.values.index(value) + (1 if up else -1)
            return self.values[min(max(place, 0), len(self.values) - 1)]
        low, high = self.values
        moved = value * factor if up else value / factor
        if self.kind == "int":
            moved = max(round(moved), value + 1) if up else min(round(moved), value - 1)
        return min(max(moved, low), high)


def parse(space: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Dimension]:
    """The ranges in a configuration, by dotted name of the setting.  Raises UserError for an invalid range, for a
    setting that does not exist, and for ends of a range that the setting does not accept."""
    found = {name: _dimension(name, given) for name, given in _named(space).items()}
    if not found:
        raise UserError("sweep.space names no setting to vary: give one, as sweep.space.algo.lr='{log: [1e-5, 1e-2]}'")
    known = flat(config)
    for name, dimension in found.items():
        if name not in known:
            raise UserError(f"sweep.space: no setting {name!r}; {closest(name, known)}")
        for value in dimension.values:
            _require(config, name, value)
    return found


def override(name: str, value: Any, present: Any) -> str:
    """The override that gives a setting this value.  Where it is scheduled straight or along a cosine, the schedule is
    scaled such that it begins with the value."""
    if isinstance(present, dict) and len(present) == 1:
        ((kind, ends),) = present.items()
        if kind in ("linear", "cosine") and ends[0]:
            value = {kind: [value, *(value * x / ends[0] for x in ends[1:])]}
    return f"{name}={written(value)}"


def _named(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What is given for each setting, by its dotted name; null leaves a setting out."""
    found: dict[str, Any] = {}
    for key, x in space.items():
        if isinstance(x, Mapping) and not set(KINDS) & set(x):
            found |= _named(x, f"{prefix}{key}.")
        elif x is not None:
            found[f"{prefix}{key}"] = x
    return found


def _dimension(name: str, given: Any) -> Dimension:
    wrong = UserError(f"sweep.space.{name} must be {WRITTEN}, got {written(given)}")
    if not isinstance(given, Mapping) or len(given) != 1:
        raise wrong
    ((kind, values),) = given.items()
    if not isinstance(values, list) or len(values) < 2:
        raise wrong
    if kind == "choice":
        if any(x in values[:i] for i, x in enumerate(values)):
            raise UserError(f"sweep.space.{name} has a choice twice: {written(values)}")
        return Dimension(kind, values)
    if len(values) != 2 or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in values):
        raise wrong
    low, high = values
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"sweep.space.{name}: the low end must be below the high end, got {written(given)}")
    if kind == "log" and low <= 0:
        raise UserError(f"sweep.space.{name}: a logarithmic range begins above 0, got {written(given)}")
    if kind == "int" and not all(isinstance(x, int) for x in values):
        raise UserError(f"sweep.space.{name}: the ends of a range of whole numbers are whole, got {written(given)}")
    return Dimension(kind, values if kind == "int" else [float(low), float(high)])


def _require(config: Mapping[str, Any], name: str, value: Any) -> None:
    """Raise UserError if a setting cannot have this value, as far as its type says."""
    *path, key = name.split(".")
    node: Any = config
    for part in path:
        node = node[part]
    hints = get_type_hints(locate(node["_target_"], name), include_extras=True)
    try:
        settings.require(hints.get(key, hints.get(f"{key}_", Any)), value, f"sweep.space.{name}")
    except ValueError as error:
        raise UserError(str(error)) from error
