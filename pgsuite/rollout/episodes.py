"""Returns and lengths of finished episodes, accumulated across rollouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pgsuite.types import Rollout


class EpisodeTracker:
    """Accumulates the undiscounted return and the length of each environment's current episode."""

    def __init__(self, num_envs: int, device: torch.device) -> None:
        self.reward = torch.zeros(num_envs, device=device, dtype=torch.float64)
        self.length = torch.zeros(num_envs, device=device, dtype=torch.float64)

    def finished_episodes(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Returns and lengths, each [K], of the K episodes that finished in this rollout; masked steps do not count."""
        returns, lengths = self.update(rollout)
        return returns[lengths > 0], lengths[lengths > 0]

    def update(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Returns and lengths, each [T, N], in the cells where an episode finished; the length is zero in all others.
        Nothing is read back to the host."""
        reward, going = rollout.reward.double(), (~rollout.start).double()
        returns, lengths = torch.empty_like(reward), torch.empty_like(reward)
        for t in range(reward.shape[0]):
            returns[t] = self.reward.mul_(going[t]).add_(reward[t])
            lengths[t] = self.length.mul_(going[t]).add_(rollout.mask[t])
        finished = rollout.done & rollout.mask
        return returns, lengths.where(finished, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"reward": self.reward.clone(), "length": self.length.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reward.copy_(state["reward"])
        self.length.copy_(state["length"])
