"""Methods that bound the mean cost of an episode: what they share, and Lagrangian relaxations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pgsuite import distributed
from pgsuite.algorithms.base import ActorCritic
from pgsuite.algorithms.channels import Channel, Channels
from pgsuite.algorithms.ppo import PPO
from pgsuite.algorithms.trpo import TRPO
from pgsuite.functional.estimators import scan
from pgsuite.nn.optim import make_optimizer
from pgsuite.settings import NonNegative, Positive
from pgsuite.types import Batch, Metrics, Rollout, masked_mean


@dataclass(kw_only=True, eq=False)
class Cost(Channel):
    """The channel of a constrained cost, of which the method itself decides the weight."""

    unused_settings = ("weight",)

    scale: bool = True


class EpisodeCost(nn.Module):
    """An estimate of the mean undiscounted cost of an episode under the policy of the last rollout.

    It is the mean cost of a step times the mean length of the episodes that ended last, or, until one has ended, of
    those under way.  Of a rollout of whole episodes it is their mean cost; others need not wait for an episode to end.
    """

    running_length: Tensor  # [N] of the current episodes
    length: Tensor  # [] mean length of episodes, in steps
    cost: Tensor  # [] of an episode
    known: Tensor  # [] bool, whether an episode has ended

    def __init__(self, num_envs: int) -> None:
        super().__init__()
        self.register_buffer("running_length", torch.zeros(num_envs))
        for name, value in {"length": 1.0, "cost": 0.0, "known": False}.items():
            self.register_buffer(name, torch.tensor(value))

    @torch.no_grad()
    def update(self, cost: Tensor, rollout: Rollout) -> None:
        """Estimate from the costs [T, N] of a rollout."""
        going = (~rollout.start).to(cost.dtype)
        lengths = scan(rollout.mask.to(cost.dtype), going, self.running_length)
        self.running_length.copy_(lengths[-1])
        done = rollout.done & rollout.mask
        ended = distributed.total(done.sum().to(cost.dtype))
        mean = distributed.total(lengths.where(done, 0.0).sum()) / ended.clamp(min=1.0)
        under_way = distributed.mean(self.running_length.mean())
        self.length.copy_(torch.where(ended > 0, mean, torch.where(self.known, self.length, under_way)))
        self.cost.copy_(self.length * distributed.mean(masked_mean(cost, rollout.mask)))
        self.known.logical_or_(ended > 0)


@dataclass(kw_only=True, eq=False)
class Constrained(ActorCritic):
    """An actor-critic under the constraint that the mean undiscounted cost of an episode is at most ``cost_limit``.

    The cost is a channel of the environment.  The limit is compared with the estimate of ``EpisodeCost``.
    """

    cost_limit: NonNegative = 25.0  # mean cost of an episode that is allowed
    cost_channel: str = "cost"  # the channel that the limit is for
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        self.channels = Channels(self.channels | {self.cost_channel: self.cost})
        super().__post_init__()
        self.episodes = EpisodeCost(self.critic.num_envs).to(next(self.critic.parameters()).device)

    def preprocess(self, rollout: Rollout) -> Rollout:
        self.episodes.update(rollout.channels[self.cost_channel], rollout)
        return super().preprocess(rollout)

    def combine(self, advantage: Tensor, channels: dict[str, Tensor], mask: Tensor) -> Tensor:
        """As in the base class, of all channels but the cost."""
        others = {name: x for name, x in channels.items() if name != self.cost_channel}
        return super().combine(advantage, others, mask)

    def rank(self, evaluation: Mapping[str, float]) -> tuple[float, ...]:
        """The return among evaluations that hold the limit, which come before all others, and of those the least
        cost."""
        cost, limit = evaluation[self.cost_channel], float(self.cost_limit)
        return (1.0, evaluation["return"]) if cost <= limit else (0.0, -cost)

    def metrics(self, batch: Batch) -> Metrics:
        return super().metrics(batch) | {"episode_cost": self.episodes.cost.clone()}


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
        self.price = Multiplier(float(self.multiplier)).to(next(self.critic.parameters()).device)
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
