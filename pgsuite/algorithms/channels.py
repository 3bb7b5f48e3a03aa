"""Channels: costs, and rewards beside the reward, each with a critic and an estimator of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from pgsuite.algorithms.estimators import GAE, Estimator
from pgsuite.components import Component
from pgsuite.nn.normalize import RewardScale
from pgsuite.nn.optim import Objective, Optimizer, make_optimizer
from pgsuite.nn.policy import Critic
from pgsuite.nn.schedules import Scheduled
from pgsuite.settings import Count, Fraction, Positive
from pgsuite.types import Batch, Metrics, Rollout, masked_mean

# (optimizer, objective, other arguments of the objective, batch, passes, gradient steps in each) -> mean metrics
Fit = Callable[[Optimizer, Objective, tuple[object, ...], Batch, int, int], Metrics]


def critic_loss(critic: Critic, batch: Batch) -> tuple[Tensor, Metrics]:
    """A critic's mean loss over real cells [], also as a metric."""
    error = masked_mean(critic.loss(critic.predict(batch), batch.target), batch.mask)
    return error, {"value_loss": error.detach()}


@dataclass(kw_only=True, eq=False)
class Channel(Scheduled):
    """How an actor-critic learns from a channel of its environment.

    The critic is made like that of the reward, and is fitted by regression with an optimizer of its own, after the
    update of the policy.  ``weight`` times the advantage in the channel is added to that of the reward, before the
    advantages are standardized.
    """

    weight: float = 1.0  # of its advantage beside that of the reward; negative for a cost
    gamma: Fraction = 0.99  # discount factor, per step
    estimator: Estimator = field(default_factory=GAE)
    scale: bool = False  # divide by the running standard deviation of the discounted return
    episodic: bool = True  # whether its returns end with an episode, or go on in the next one
    optim: Component = "adam"  # adam, rmsprop, or a class by its dotted path, as torch.optim.AdamW
    lr: Positive = 1e-3  # learning rate of the critic's optimizer
    epochs: Count = 10  # passes of the critic over each batch
    minibatches: Count = 4  # gradient steps of the critic in each pass

    from_env: ClassVar[bool] = True  # whether the environment gives it

    def setup(self, name: str, critic: Critic) -> None:
        """Make the parts for the channel of this name, the critic like that of the reward."""
        self.name, self.critic = name, critic.twin(f"critic_{name}")
        self.optimizer = make_optimizer([self.critic.own], self.lr, self.optim, where=f"the optim of channel {name}")
        device = next(self.critic.parameters()).device
        self.reward_scale = RewardScale(critic.num_envs, None).to(device) if self.scale else None

    @property
    def unit(self) -> Tensor | float:
        """What the channel is multiplied by."""
        return 1.0 if self.reward_scale is None else self.reward_scale.moments.scale

    def reward(self, rollout: Rollout) -> Tensor:
        """The channel [T, N] of a rollout."""
        return rollout.channels[self.name]

    @torch.no_grad()
    def estimate(self, rollout: Rollout) -> dict[str, Tensor]:
        """Value, advantage and target, each [T, N], after the statistics of the scale have included the rollout."""
        never = torch.zeros_like(rollout.start)
        reward, start = self.reward(rollout).where(rollout.mask, 0.0), rollout.start if self.episodic else never
        if self.reward_scale is not None:
            self.reward_scale.update(reward, start, rollout.mask, self.gamma)
            reward = self.reward_scale(reward, rollout.mask)
        value, next_value = self.critic.values_and_next_values(rollout)
        seen = replace(rollout, reward=reward)
        if not self.episodic:  # the first observation of the next episode follows, where there is one
            cut = torch.cat([~rollout.mask[1:], never[-1:]])
            seen = replace(seen, terminated=rollout.terminated & cut, truncated=rollout.truncated & cut)
            next_value = torch.cat([value[1:], next_value[-1:]]).where(~cut, next_value)
        ratio = rollout.extra.get("weight")
        advantage, target = self.estimator(seen, value, next_value, ratio, gamma=self.gamma)
        self.critic.observe_targets(target, seen.mask)
        return {"value": value, "advantage": advantage, "target": target}

    def learn(self, rollout: Rollout, fit: Fit) -> Metrics:
        """Fit the critic to the targets of a rollout."""
        batch = Batch.of(rollout, **rollout.estimates[self.name])
        return fit(self.optimizer, critic_loss, (self.critic,), batch, self.epochs, self.minibatches)

    def update_statistics(self, rollout: Rollout) -> None:
        """Update running statistics, after everything else; critics update theirs themselves."""


class Channels(dict[str, Channel]):
    """The channels from which a method learns, by name."""
