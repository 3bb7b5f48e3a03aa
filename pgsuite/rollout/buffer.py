"""Storage of rollouts.  Advantages are computed elsewhere."""

from __future__ import annotations

from dataclasses import fields

from pgsuite.types import Rollout, write_obs


class RolloutBuffer:
    """[T, N, ...] storage, allocated at the first write and reused by every rollout."""

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon
        self.storage: Rollout | None = None

    def write(self, t: int, row: Rollout) -> None:
        """Copy a row [N, ...] to time t."""
        if self.storage is None:
            self.storage = row.map(lambda x: x.new_zeros((self.horizon, *x.shape)))
        for f in fields(row):
            write_obs(getattr(self.storage, f.name), t, getattr(row, f.name))

    def set(self, rollout: Rollout) -> None:
        """Store a complete rollout, without copying."""
        self.storage = rollout

    def mask_from(self, t: int) -> None:
        """Mask row t and all later rows."""
        self.read().mask[t:] = False

    def read(self) -> Rollout:
        """The rollout, as views that the next rollout overwrites."""
        if self.storage is None:
            raise RuntimeError("nothing was collected yet")
        return self.storage
