"""Storage, and nothing else: it computes no advantages and knows no caller."""

from __future__ import annotations

from dataclasses import fields

import torch

from pgsuite.types import Obs, Rollout


class RolloutBuffer:
    """[T, N, ...] storage, shaped by the first row written and reused by every rollout after."""

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon
        self.storage: Rollout | None = None

    def write(self, t: int, row: Rollout) -> None:
        """Copy one [N, ...] row into place."""
        if self.storage is None:
            self.storage = row.map(lambda x: x.new_zeros((self.horizon, *x.shape)))
        for f in fields(row):
            _copy(getattr(self.storage, f.name), t, getattr(row, f.name))

    def blank_from(self, t: int) -> None:
        """Mark row t and those after it as nothing that happened."""
        self.read().mask[t:] = False

    def read(self) -> Rollout:
        """Everything written: views, good until the next rollout."""
        if self.storage is None:
            raise RuntimeError("nothing was collected yet")
        return self.storage


def _copy(into: Obs, t: int, x: Obs) -> None:
    if isinstance(x, dict):
        for key in x:
            _copy(into[key], t, x[key])
    elif isinstance(x, torch.Tensor) and x.numel():
        into[t] = x
