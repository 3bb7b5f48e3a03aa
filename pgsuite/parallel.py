"""The one file that knows there may be other processes.  Alone, every function is the identity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from zero."""
    return dist.get_rank() if size() > 1 else 0


def total(x: Tensor) -> Tensor:
    """x summed over processes, without gradient."""
    if size() > 1:
        dist.all_reduce(x := x.detach().clone())
    return x


def mean(x: Tensor) -> Tensor:
    """x averaged over processes, without gradient."""
    return total(x) / size() if size() > 1 else x


def average_gradients(params: Iterable[Tensor]) -> None:
    """Average the gradients of params in place, in one collective."""
    if size() > 1:
        grads = [p.grad for p in params if p.grad is not None]
        flat = mean(torch.cat([g.reshape(-1) for g in grads]))
        for grad, chunk in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(chunk.view_as(grad))


def gather(state: Any) -> list[Any] | None:
    """What every process holds, in order of rank, for the first of them; None for the others."""
    if size() == 1:
        return [state]
    states: list[Any] | None = [None] * size() if rank() == 0 else None
    dist.gather_object(state, states)
    return states


def broadcast(state: Any) -> Any:
    """What the first process holds, for all of them."""
    if size() == 1:
        return state
    box = [state]
    dist.broadcast_object_list(box)
    return box[0]


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    return bool(total(torch.tensor(float(flag)))) if size() > 1 else flag
