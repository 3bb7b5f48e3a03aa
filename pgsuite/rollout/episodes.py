"""Returns and lengths of finished episodes, accumulated across rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgsuite.functional.estimators import scan
from pgsuite.types import Rollout


class EpisodeTracker:
    """Accumulates the undiscounted return, the length and the sums of the channels of each environment's current
    episode."""

    def __init__(self, num_envs: int, device: torch.device, channels: Sequence[str] = ()) -> None:
        self.reward = torch.zeros(num_envs, device=device, dtype=torch.float64)
        self.length = torch.zeros(num_envs, device=device, dtype=torch.float64)
        self.channels = {name: torch.zeros_like(self.reward) for name in channels}

    def finished_episodes(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Returns and lengths, each [K], of the K episodes that finished in this rollout; masked steps do not count."""
        returns, lengths, *_ = self.update(rollout)
        return returns[lengths > 0], lengths[lengths > 0]

    def update(self, rollout: Rollout) -> tuple[Tensor, ...]:
        """Returns, lengths and then the sums of each channel, each [T, N], in the cells where an episode finished; the
        length is zero in all others.  Nothing is read back to the host."""
        channels = [rollout.channels[name].where(rollout.mask, 0.0) for name in self.channels]
        added = torch.stack([x.double() for x in (rollout.reward, rollout.mask, *channels)], 1)
        sofar = [self.reward, self.length, *self.channels.values()]
        sums = scan(added, (~rollout.start).double().unsqueeze(1), torch.stack(sofar))
        for x, last in zip(sofar, sums[-1], strict=True):
            x.copy_(last)
        returns, lengths, *others = sums.unbind(1)
        finished = rollout.done & rollout.mask
        return returns, lengths.where(finished, 0.0), *others

    def state_dict(self) -> dict[str, Any]:
        return {"reward": self.reward.clone(), "length": self.length.clone()} | {
            f"channels.{name}": x.clone() for name, x in self.channels.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reward.copy_(state["reward"])
        self.length.copy_(state["length"])
        for name, x in self.channels.items():
            x.copy_(state[f"channels.{name}"])
