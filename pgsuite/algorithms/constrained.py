"""What methods that bound the mean cost of an episode share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pgsuite import distributed
from pgsuite.algorithms.base import ActorCritic
from pgsuite.algorithms.channels import Channel, Channels
from pgsuite.functional.estimators import scan
from pgsuite.settings import NonNegative
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
        self.episodes = EpisodeCost(self.critic.num_envs).to(self.device)

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
