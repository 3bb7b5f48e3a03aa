"""Lagrangian relaxations: a multiplier on the mean cost of an episode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgsuite.algorithms.constrained import Constrained
from pgsuite.algorithms.ppo import PPO
from pgsuite.algorithms.trpo import TRPO
from pgsuite.nn.optim import make_optimizer
from pgsuite.settings import NonNegative, Positive
from pgsuite.types import Batch, Metrics, Rollout


class Multiplier(nn.Module):
    """A Lagrange multiplier, at least zero."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(start)))

    def loss(self, violation: Tensor) -> tuple[Tensor, Metrics]:
        """Minus the multiplier times the violation of its constraint []: descent raises it where that is positive."""
        return -self.value * violation, {}


@dataclass(kw_only=True, eq=False)
class Lagrangian(Constrained):
    """A policy gradient of reward minus a multiplier times cost, where the multiplier rises while episodes cost more
    than the limit, and falls to zero while they cost less (Ray et al., 2019, section 5.2).

    The advantage is (A_r - multiplier * A_c) / (1 + multiplier), and then standardized as configured.  The multiplier
    is in units of scaled reward per scaled cost.  It follows the violation, the cost of an episode minus the limit, by
    Adam: one step for each rollout, before the update.
    """

    multiplier: NonNegative = 0.001  # of the cost, at the start
    multiplier_lr: Positive = 0.035  # learning rate of the multiplier

    def __post_init__(self) -> None:
        super().__post_init__()
        self.price = Multiplier(float(self.multiplier)).to(self.device)
        self.price_optimizer = make_optimizer([self.price], self.multiplier_lr)

    def preprocess(self, rollout: Rollout) -> Rollout:
        rollout = super().preprocess(rollout)
        self.price_optimizer.step(self.price.loss, self.episodes.cost - self.cost_limit)
        with torch.no_grad():
            self.price.value.relu_()
        return rollout

    def combine(self, advantage: Tensor, channels: dict[str, Tensor], mask: Tensor) -> Tensor:
        price = self.price.value
        gain = (advantage - price * channels[self.cost_channel]) / (1 + price)
        return super().combine(gain, channels, mask)

    def metrics(self, batch: Batch) -> Metrics:
        return super().metrics(batch) | {"multiplier": self.price.value.detach().clone()}


@dataclass(kw_only=True, eq=False)
class PPOLagrangian(Lagrangian, PPO):
    """PPO with a Lagrange multiplier on the mean cost of an episode (Ray et al., 2019)."""


@dataclass(kw_only=True, eq=False)
class TRPOLagrangian(Lagrangian, TRPO):
    """TRPO with a Lagrange multiplier on the mean cost of an episode (Ray et al., 2019)."""
