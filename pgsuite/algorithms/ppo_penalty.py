from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pgsuite import parallel
from pgsuite.algorithms.ppo import PPO
from pgsuite.functional import objectives
from pgsuite.nn.adaptive import Coefficient
from pgsuite.settings import Positive
from pgsuite.types import Batch, Metrics, masked_mean


@dataclass(kw_only=True, eq=False)
class PPOPenalty(PPO):
    """PPO that pays for straying, instead of gaining nothing from it (Schulman et al., 2017, equation 8).

    The price of a nat, ``beta`` at first, doubles after an update whose KL is more than 1.5 times ``kl_target``, and
    halves after one whose KL is less than two thirds of it.  ``clip`` only marks what is counted as outside.
    """

    beta: Positive = 1.0
    kl_target: Positive = 0.01

    price: Coefficient = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.price = Coefficient(self.beta).to(self.optimizer.flat.device)

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return ratio * advantage - self.price.value * objectives.sampled_kl(ratio.log())

    def update(self, batch: Batch) -> Metrics:
        metrics = super().update(batch)
        with torch.no_grad():
            log_ratio = self.policy.dist(batch).log_prob(batch.action) - batch.logp
            kl = parallel.mean(masked_mean(objectives.sampled_kl(log_ratio), batch.mask))
        self.price.aim(kl, self.kl_target)
        return metrics | {"kl": kl, "beta": self.price.value.clone()}
