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
    """PPO that pays for straying, instead of gaining nothing from it (Schulman et al., 2017, equation 8).

    The price of a nat, ``beta``, is by default the paper's: it doubles after an update whose KL is more than 1.5 times
    its target, and halves after one whose KL is less than two thirds of it.  ``clip`` only marks what is counted as
    outside.
    """

    unused_settings = ("dual_clip",)

    beta: NonNegative = field(default_factory=doubling)  # coefficient of the KL penalty; by default adaptive

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return ratio * advantage - self.beta * objectives.sampled_kl(ratio.log())
