"""Several algorithms as one: their tensors with a leading axis of runs, over which ``torch.vmap`` calls the methods of
the first.

S  runs
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor

from pgsuite.algorithms.base import Algorithm
from pgsuite.execution.cuda_graphs import inside, is_number
from pgsuite.execution.cuda_graphs import owner as owner_of
from pgsuite.functional import autodiff
from pgsuite.functional.trust_region import map_tensors, tensors
from pgsuite.seeding import DrawingMode, draw_alike, in_place


@dataclass
class Drawn:
    """Numbers that were drawn ahead."""

    kind: Any  # function, arguments, shape and dtype
    numbers: Tensor  # [S, ahead, ...]
    before: list[Tensor]  # the state of each generator
    used: int = 0  # of the numbers ahead


class Generators(Generator):
    """The random streams of several runs, as one generator; only those that are ``drawing`` draw."""

    each: list[Generator]
    drawing: list[bool]
    ahead: int  # draws of one kind that are expected in a row, and made at once
    drawn: Drawn | None  # of the present kind

    @classmethod
    def of(cls, each: Sequence[Generator]) -> Generators:
        made = cls(each[0].device)
        made.each, made.drawing, made.ahead, made.drawn = list(each), [True] * len(each), 1, None
        return made

    def fill(self, x: Tensor, func: Callable[..., Any], *args: Any, **options: Any) -> None:
        """``func(x[s], *args, **options, generator=...)``, which draws in place, for each run s of x [S, ...]."""
        func = partial(func, **options) if options else func  # never equal to another, so not drawn ahead
        kind = func, args, x.shape, x.dtype
        if self.ahead > 1 and not options and all(self.drawing) and (self._is_kind(kind) or self._draw_ahead(kind, x)):
            assert self.drawn is not None
            x.copy_(self.drawn.numbers[:, self.drawn.used])
            self.drawn.used += 1
            if self.drawn.used == self.ahead:
                self.drawn = None
            return
        self.settle()
        for row, generator, draws in zip(x, self.each, self.drawing, strict=True):
            if draws:
                func(row, *args, generator=generator)

    def _is_kind(self, kind: Any) -> bool:
        return self.drawn is not None and self.drawn.kind == kind

    def _draw_ahead(self, kind: Any, x: Tensor) -> bool:
        """Draw several of a kind for each run, unless one after the other they would be different numbers."""
        self.settle()
        func, args, shape, _ = kind
        if not is_sequential(*kind, x.device, self.ahead):
            return False
        before = [generator.get_state() for generator in self.each]
        numbers = x.new_empty((shape[0], self.ahead, *shape[1:]))
        for row, generator in zip(numbers, self.each, strict=True):
            func(row, *args, generator=generator)
        self.drawn = Drawn(kind, numbers, before)
        return True

    def settle(self) -> None:
        """Bring every generator to where it would be without drawing ahead."""
        if (drawn := self.drawn) is not None:
            self.drawn = None
            func, args, *_ = drawn.kind
            for row, generator, state in zip(drawn.numbers, self.each, drawn.before, strict=True):
                generator.set_state(state)
                func(row[: drawn.used].clone(), *args, generator=generator)


@cache
def is_sequential(
    func: Callable[..., Any], args: Any, shape: Any, dtype: torch.dtype, device: torch.device, ahead: int
) -> bool:
    """Whether drawing numbers ``ahead`` at once gives those of drawing them one after the other; torch draws few normal
    numbers in another way than many."""

    def at_once(generator: Generator) -> Tensor:
        return func(torch.empty((ahead, *shape[1:]), dtype=dtype, device=device), *args, generator=generator)

    def each(generator: Generator) -> Tensor:
        rows = torch.empty((ahead, *shape[1:]), dtype=dtype, device=device)
        return torch.stack([func(torch.empty_like(row), *args, generator=generator) for row in rows])

    return draw_alike(each, at_once, device)


class Draws(DrawingMode):
    """Within this mode, what is drawn from ``Generators`` under vmap is drawn by each run from its own generator, as it
    would be alone."""

    kind = Generators

    def __init__(self, anchor: Tensor) -> None:
        super().__init__()
        self.anchor = anchor  # [], with an axis of runs: any tensor of all runs

    def draw(self, func: Any, generators: Generators, args: Any, kwargs: dict[str, Any]) -> Any:
        given = tensors([args, kwargs])
        if in_place(func) and len(given) == 1:

            def fill(x: Tensor) -> tuple[Tensor]:
                generators.fill(x, func, *args[1:], **kwargs)
                return (x.new_zeros(len(x)),)

            autodiff.outside(fill, *given)
            return args[0]
        streams = list(zip(generators.each, generators.drawing, strict=True))

        def each(*xs: Tensor) -> tuple[Tensor]:
            found: list[Tensor | None] = []
            for s, (generator, drawing) in enumerate(streams):
                mine = iter([x[s] for x in xs])
                a, k = map_tensors(lambda _, mine=mine: next(mine), [list(args), kwargs])
                found.append(func(*a, **k | {"generator": generator}) if drawing else None)
            blank = torch.zeros_like(next(x for x in found if x is not None))
            return (torch.stack([blank if x is None else x for x in found]),)

        (drawn,) = autodiff.outside(each, *given) if given else autodiff.outside(lambda _: each(), self.anchor)
        return drawn


@dataclass
class Slot:
    """An attribute of the first run's objects, and its values in all runs."""

    owner: Any
    key: Any
    name: str  # dotted
    values: Tensor  # [S, ...]


class Stack:
    """The tensors of S algorithms of the same settings, moved to memory with a leading axis of runs.

    Each algorithm keeps its own tensors, which are views from here on: what is written to them is written to the stack,
    and the other way round.  Numbers that differ between the algorithms become tensors [S].  Raises ValueError for
    other differences.
    """

    def __init__(self, algorithms: Sequence[Algorithm]) -> None:
        self.count = len(algorithms)
        self.seen: set[int] = {id(x) for x in algorithms}
        self.found: list[tuple[Any, Any, str, list[Any]]] = []  # owner, key, name, the value in each run
        self.look(list(algorithms), "algo")
        device = algorithms[0].device
        self.anchor = torch.arange(self.count, device=device)
        slots, generators = (
            [x for x in self.found if isinstance(x[3][0], Generator) == drawn] for drawn in (False, True)
        )
        self.slots = self.move(slots)
        self.generators = [(owner, key, name, Generators.of(each)) for owner, key, name, each in generators]

    def look(self, xs: list[Any], name: str) -> None:
        """Find the tensors, generators and differing numbers within corresponding objects of all runs."""
        parts = [dict(inside(x)) for x in xs]
        for key in parts[0]:
            where, ys = f"{name}.{key}", [part[key] for part in parts]
            y = ys[0]
            if isinstance(y, Tensor | Generator):
                self.found.append((owner_of(xs[0]), key, where, ys))
            elif is_number(y):
                if any(other != y for other in ys) and not isinstance(xs[0], tuple):
                    if not all(isinstance(x, float) for x in ys):
                        raise ValueError(f"{where} is {y} in one run and {next(x for x in ys if x != y)} in another")
                    self.found.append((owner_of(xs[0]), key, where, [torch.tensor(x) for x in ys]))
            elif id(y) not in self.seen:
                self.seen.add(id(y))
                self.look(ys, where)

    def move(self, found: list[tuple[Any, Any, str, list[Any]]]) -> list[Slot]:
        """Move tensors of all runs to stacks, one for each storage of the first run, so that what was a view of
        another tensor still is."""
        stacks: dict[int, Tensor] = {}
        known: dict[int, Tensor] = {}  # by tensor of the first run, which several attributes may hold
        slots, homes = [], []
        for owner, key, name, xs in found:
            if id(xs[0]) in known:
                slots.append(Slot(owner, key, name, known[id(xs[0])]))
                continue
            x, storage = xs[0], xs[0].untyped_storage()
            size = storage.nbytes() // x.element_size()
            if storage.data_ptr() not in stacks or x.numel() == 0:
                stacks[storage.data_ptr()] = torch.stack([y.detach().as_strided((size,), (1,), 0) for y in xs])
            stack = stacks[storage.data_ptr()]
            values = stack.as_strided((self.count, *x.shape), (size, *x.stride()), x.storage_offset())
            homes.append((xs, values))
            known[id(x)] = values = values.detach().requires_grad_(x.requires_grad)
            slots.append(Slot(owner, key, name, values))
        for xs, values in homes:
            for x, value in zip(xs, values.unbind(), strict=True):
                x.data = value
        return slots

    def values_of(self, s: int) -> list[Tensor]:
        """Copies of the tensors of a run."""
        return [x.values.detach()[s].clone() for x in self.slots]

    def restore(self, s: int, values: Sequence[Tensor]) -> None:
        """Set the tensors of a run."""
        for x, value in zip(self.slots, values, strict=True):
            x.values.detach()[s] = value

    def finite(self) -> Tensor:
        """Whether all parameters and statistics of each run are finite, [S] bool."""
        found = {
            id(x.values): x.values.detach() for x in self.slots if "._buffers." in x.name or "._parameters." in x.name
        }
        found = [x.reshape(self.count, -1) for x in found.values() if x.is_floating_point() and x.numel()]
        return torch.stack([torch.linalg.vector_norm(x, torch.inf, 1) for x in found]).isfinite().all(0)

    def within(self, name: str) -> Stack:
        """This stack with only what is in the part of this dotted name."""
        part = copy.copy(self)
        part.slots = [x for x in self.slots if x.name.startswith(f"{name}.")]
        part.generators = [x for x in self.generators if x[2].startswith(f"{name}.")]
        return part

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args) of the first run's objects, for all runs at once: of the arguments, and of what is returned,
        every tensor has a leading axis of runs."""
        given, nests = tensors(args), []

        def inside(anchor: Tensor, values: list[Tensor], given: list[Tensor]) -> list[Tensor]:
            rest = iter(given)
            mine = map_tensors(lambda _: next(rest), args)
            places = [(x.owner, x.key, y) for x, y in zip(self.slots, values, strict=True)]
            places += [(owner, key, x) for owner, key, _, x in self.generators]
            before = [(owner, key, owner[key]) for owner, key, _ in places]
            for owner, key, x in places:
                owner[key] = x
            try:
                with Draws(anchor):
                    nests.append(function(*mine))
                    return tensors(nests[-1])
            finally:
                for owner, key, x in before:
                    owner[key] = x

        with autodiff.over_runs():
            found = iter(torch.vmap(inside)(self.anchor, [x.values for x in self.slots], given))
        return map_tensors(lambda _: next(found), nests[-1])
