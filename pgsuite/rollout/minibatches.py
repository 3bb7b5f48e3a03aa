from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from pgsuite.types import Batch


def check_split(horizon: int, num_envs: int, count: int, *, columns: bool) -> None:
    """Raise ValueError unless a [T, N] batch splits into count equal parts."""
    size, what = (num_envs, "environments") if columns else (horizon * num_envs, f"{num_envs} x {horizon} steps")
    if size % count:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        near = sorted(divisors, key=lambda d: (abs(d - count), d))[:3]
        raise ValueError(
            f"{count} minibatches do not divide a batch of {size} ({what}); "
            f"near ones that do: {', '.join(map(str, sorted(near)))}"
        )


def minibatches(batch: Batch, count: int, *, columns: bool, generator: Generator | None = None) -> Iterator[Batch]:
    """Split a [T, N] batch at random into count equal minibatches: of [B] independent cells, or of [T, n] columns in
    time order, which recurrent networks need."""
    check_split(batch.logp.shape[0], batch.logp.shape[1], count, columns=columns)
    if not columns:
        batch = batch.map(lambda x: x.flatten(0, 1))
    if count == 1:
        yield batch
        return
    for index in partition(batch.logp.shape[int(columns)], count, batch.logp.device, generator):
        yield select(batch, index, columns=columns)


def partition(size: int, count: int, device: torch.device, generator: Generator | None = None) -> Sequence[Tensor]:
    """The numbers below ``size``, of cells or columns, of ``count`` random minibatches."""
    return torch.randperm(size, generator=generator, device=device).split(size // count)


def select(batch: Batch, index: Tensor, *, columns: bool) -> Batch:
    """The minibatch of the cells [B] with these indices, or of the columns of [T, N]."""
    return batch.map(partial(torch.index_select, dim=int(columns), index=index))
