"""Storage, and nothing else: it computes no advantages and knows no caller."""

from __future__ import annotations

from dataclasses import fields

from pgsuite.types import Rollout, write_obs


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
            write_obs(getattr(self.storage, f.name), t, getattr(row, f.name))

    def set(self, rollout: Rollout) -> None:
        """Take a whole rollout that was made at once."""
        self.storage = rollout

    def mask_from(self, t: int) -> None:
        """Mark row t and those after it as nothing that happened."""
        self.read().mask[t:] = False

    def read(self) -> Rollout:
        """Everything written: views, good until the next rollout."""
        if self.storage is None:
            raise RuntimeError("nothing was collected yet")
        return self.storage
