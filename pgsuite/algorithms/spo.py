from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pgsuite.algorithms.ppo import PPO
from pgsuite.functional import objectives
from pgsuite.settings import Positive


@dataclass(kw_only=True, eq=False)
class SPO(PPO):
    """Simple policy optimization: PPO with a quadratic penalty on the ratio in place of the clip (Xie et al., 2025)."""

    unused_settings = ("clip_high", "dual_clip")

    clip: Positive = 0.2  # distance from 1 of the importance ratio at which the objective is greatest

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return objectives.quadratic_surrogate(ratio, advantage, self.clip)
