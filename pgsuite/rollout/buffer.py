"""Storage of rollouts.  Advantages are computed elsewhere."""

from __future__ import annotations

from dataclasses import fields, replace

from pgsuite.types import Rollout, map_obs, write_obs


class RolloutBuffer:
    """[T, N, ...] storage, allocated at the first write and reused by every rollout.  Of the hidden states only the
    first [1, N, H] are kept, from which the others follow."""

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon
        self.storage: Rollout | None = None

    def write(self, t: int, row: Rollout) -> None:
        """Copy a row [N, ...] to time t."""
        if self.storage is None:
            first = map_obs(lambda x: x.new_zeros((1, *x.shape)), row.hidden_state)
            empty = replace(row, hidden_state={}).map(lambda x: x.new_zeros((self.horizon, *x.shape)))
            self.storage = replace(empty, hidden_state=first)
        for f in fields(row):
            if f.name == "hidden_state" and t > 0:
                continue
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
