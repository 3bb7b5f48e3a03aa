from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pgsuite.algorithms.ppo import PPO
from pgsuite.functional import objectives
from pgsuite.settings import NonNegative


def doubling() -> Any:
    return {"adaptive": {"start": 1.0, "kl": 0.01, "factor": 0.5, "band": 1.5, "low": 1e-6, "high": 1e6}}


@dataclass(kw_only=True, eq=False)
class PPOPenalty(PPO):
    """PPO with an adaptive KL penalty in place of clipping (Schulman et al., 2017, equation 8).

    By default the coefficient ``beta`` is the paper's (section 4): it doubles after an update whose KL exceeds 1.5
    times the target, and halves after one whose KL is below the target divided by 1.5.  ``clip`` only defines the
    metric ``clip_fraction``.
    """

    unused_settings = ("dual_clip",)

    beta: NonNegative = field(default_factory=doubling)  # coefficient of the KL penalty; by default adaptive

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return ratio * advantage - self.beta * objectives.sampled_kl(ratio.log())
