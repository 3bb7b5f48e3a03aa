"""Schedules, which may be given wherever a method has a numerical setting.

- ``{constant: 0.01}``
- ``{linear: [3e-4, 0]}``: straight from one to the other over the run
- ``{cosine: [3e-4, 0]}``: along half a cosine (Loshchilov and Hutter, 2017)
- ``{piecewise: {0: 0, 0.1: 3e-4, 1: 0}}``: straight between values at fractions of the run
- ``{adaptive: {start: 3e-4, kl: 0.01}}``: decreased after an update with a large KL, increased after a small one
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from pgsuite import settings
from pgsuite.settings import closest


class Schedule(nn.Module, ABC):
    """A scheduled number: the zero-dimensional ``value``, which is written in place.

    ``numbers`` are the values that define the schedule, beginning with the initial one.
    """

    written: ClassVar[str]
    value: Tensor

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        if None in numbers:  # a setting may be None, a point of a schedule may not
            raise TypeError(numbers)
        self.numbers = numbers
        self.register_buffer("value", torch.tensor(float(numbers[0])))

    @abstractmethod
    def at(self, fraction: float) -> float:
        """The value at a fraction of the run, from 0 to 1."""

    def progress(self, fraction: float) -> None:
        self.value.fill_(self.at(fraction))


class Constant(Schedule):
    written = "{constant: value}"

    def __init__(self, value: float) -> None:
        super().__init__(value)

    def at(self, fraction: float) -> float:
        return self.numbers[0]


class Linear(Schedule):
    written = "{linear: [start, end]}"

    def __init__(self, ends: tuple[float, float]) -> None:
        start, end = ends
        super().__init__(start, end)

    def at(self, fraction: float) -> float:
        start, end = self.numbers
        return start * (1 - fraction) + end * fraction


class Cosine(Linear):
    written = "{cosine: [start, end]}"

    def at(self, fraction: float) -> float:
        return super().at((1 - math.cos(math.pi * fraction)) / 2)


class Piecewise(Schedule):
    written = "{piecewise: {0: value, ..., 1: value}}, with fractions of the run in rising order"

    def __init__(self, points: Mapping[float, float]) -> None:
        self.fractions = [float(fraction) for fraction in points]
        if self.fractions[0] != 0 or any(a >= b for a, b in itertools.pairwise((*self.fractions, 1 + 1e-9))):
            raise ValueError(points)
        super().__init__(*points.values())

    def at(self, fraction: float) -> float:
        points = list(zip(self.fractions, self.numbers, strict=True))
        for (a, start), (b, end) in itertools.pairwise(points):
            if fraction < b:
                return start + (end - start) * (fraction - a) / (b - a)
        return points[-1][1]


class Adaptive(Schedule):
    """Divided by ``factor`` after an update whose KL(old || new) exceeds ``band`` times the target ``kl``, multiplied
    by ``factor`` after one whose KL is below the target divided by ``band``, and clamped to ``low`` and ``high``, by
    default 0.01 and 100 times the start.  For the coefficient of a KL penalty, ``factor`` is below one.  Nothing is
    read back to the host.
    """

    written = "{adaptive: {start: value, kl: target}}, and may say factor (1.5), band (2), low and high"

    def __init__(
        self,
        start: float,
        kl: float,
        factor: float = 1.5,
        band: float = 2.0,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        self.low, self.high = start / 100 if low is None else low, start * 100 if high is None else high
        if not (kl > 0 and factor > 0 and band >= 1 and 0 < self.low <= start <= self.high):
            raise ValueError(start)
        super().__init__(start, self.low, self.high)
        self.kl, self.factor, self.band = kl, factor, band

    def at(self, fraction: float) -> float:
        return self.numbers[0]

    def progress(self, fraction: float) -> None:
        """Do nothing: ``react`` changes the value."""

    def react(self, kl: Tensor) -> None:
        """Adapt to the KL of the last update."""
        far, near = kl > self.band * self.kl, kl < self.kl / self.band
        change = torch.where(far, 1 / self.factor, torch.where(near, self.factor, 1.0))
        self.value.copy_((self.value * change).clamp(self.low, self.high))


KINDS: dict[str, type[Any]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "piecewise": Piecewise,
    "adaptive": Adaptive,
}


def parse(given: Mapping[str, Any], where: str) -> Schedule:
    """Parse a schedule.  Raises ValueError with the correct syntax."""
    if len(given) != 1:
        raise ValueError(f"{where} must be a number or one schedule, such as {Linear.written}, got {dict(given)}")
    ((kind, value),) = given.items()
    if kind not in KINDS:
        raise ValueError(f"{where}: no schedule {kind!r}; {closest(kind, KINDS)}")
    cls = KINDS[kind]
    try:
        return cls(**value) if cls is Adaptive else cls(value)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{where}: this schedule is written {cls.written}; got {dict(given)}") from error


class Scheduled:
    """A dataclass that validates its fields, and accepts schedules for numerical ones.

    A scheduled field holds a zero-dimensional tensor that is written in place, so that every object that holds it sees
    the current value; a scheduled integer field holds a rounded int.
    """

    def __post_init__(self) -> None:
        self.schedules: dict[str, Schedule] = {}
        hints = get_type_hints(type(self), include_extras=True)
        for name, value in list(vars(self).items()):
            if not isinstance(value, Mapping) or (kind := settings.number(hints.get(name))) is None:
                continue
            self.schedules[name] = schedule = parse(value, where := f"{type(self).__name__}.{name}")
            if kind is int and isinstance(schedule, Adaptive):
                raise ValueError(f"{where} is a whole number, which no adaptive schedule can move")
            for x in schedule.numbers:
                settings.require(settings.closed(hints[name]), x, where)
            setattr(self, name, round(schedule.numbers[0]) if kind is int else schedule.value)
        settings.check(self, skip=self.schedules)

    def to(self, device: torch.device) -> None:
        """Move the scheduled numbers to a device."""
        for name, schedule in self.schedules.items():
            schedule.to(device)
            if isinstance(getattr(self, name), Tensor):
                setattr(self, name, schedule.value)

    def set_progress(self, fraction: float) -> None:
        """Set every scheduled number to its value at a fraction of the run."""
        for name, schedule in self.schedules.items():
            schedule.progress(fraction)
            if not isinstance(getattr(self, name), Tensor):
                setattr(self, name, round(schedule.at(fraction)))

    @property
    def adaptive(self) -> list[Adaptive]:
        """The schedules that adapt to the KL of each update."""
        return [schedule for schedule in self.schedules.values() if isinstance(schedule, Adaptive)]

    def state_dict(self) -> dict[str, Any]:
        return {name: schedule.state_dict() for name, schedule in self.schedules.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state[name])
