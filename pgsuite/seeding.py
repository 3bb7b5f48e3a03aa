"""Random streams: independent generators, each derived from the seed of the run and a name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def generator(seed: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the seed and on the name of the stream.

    Two generators seeded with the same number draw the same bits, so that, say, initial states and action noise would
    be correlated; the name keeps them apart.
    """
    digest = hashlib.blake2b(f"{stream} {seed}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def number(seed: int, stream: str) -> int:
    """A 31-bit seed for a generator of another library, derived from the same two as ``generator``."""
    return int(torch.randint(2**31 - 1, (), generator=generator(seed, stream)))


def of_process(seed: int, rank: int) -> int:
    """The seed of what differs between processes.  The first keeps the one given, and so draws what it would alone."""
    return number(seed, f"process {rank}") if rank else seed


def draw_alike(one: Callable[..., torch.Tensor], other: Callable[..., torch.Tensor], device: torch.device) -> bool:
    """Whether two functions of a keyword ``generator`` draw the same numbers, and leave it in the same state."""
    first, second = (torch.Generator(device).manual_seed(0) for _ in range(2))
    same = torch.equal(one(generator=first), other(generator=second))
    return same and torch.equal(first.get_state(), second.get_state())


def in_place(func: Callable[..., Any]) -> bool:
    """Whether a function of torch writes to its first argument, by its name."""
    return func.__name__.endswith("_") and not func.__name__.endswith("__")


class DrawingMode(TorchFunctionMode):
    """Within this mode, ``draw`` replaces functions that draw from generators of a ``kind``."""

    kind: type[torch.Generator] = torch.Generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not isinstance(kwargs.get("generator"), self.kind):
            return func(*args, **kwargs)
        return self.draw(func, kwargs.pop("generator"), args, kwargs)

    def draw(self, func: Any, generator: Any, args: Any, kwargs: dict[str, Any], /) -> Any:
        """What func(*args, **kwargs, generator=generator) returns."""
        raise NotImplementedError
