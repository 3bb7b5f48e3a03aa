"""Collect, estimate, update: the skeleton that every policy gradient method fills in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from pgsuite import settings
from pgsuite.algorithms.estimators import GAE, Estimator
from pgsuite.functional import objectives
from pgsuite.nn.normalize import RewardScale
from pgsuite.nn.optim import Optimizer
from pgsuite.nn.policy import Critic, Policy
from pgsuite.rollout import Collector, StepCollector, minibatches
from pgsuite.settings import Fraction
from pgsuite.types import Batch, Metrics, Rollout, average, explained_variance, masked_mean, standardize


@dataclass(kw_only=True, eq=False)
class Algorithm(ABC):
    """A rule for turning rollouts into a better policy.

    Hyperparameters are the dataclass fields: a subclass adds its own, and the configuration schema follows.  The
    fields ``policy``, ``reward_scale`` and ``generator`` are parts that the runtime supplies.
    """

    collector: ClassVar[type[Collector]] = StepCollector

    policy: Policy
    reward_scale: RewardScale | None = None
    generator: Generator | None = None  # draws minibatches

    gamma: Fraction = 0.99
    anneal: bool = False  # learning rates fall linearly to zero over the run

    optimizer: Optimizer = field(init=False)

    def __post_init__(self) -> None:
        settings.check(self)

    def iterate(self, collector: Collector) -> Metrics:
        """One turn: collect, assign credit, learn.  Running statistics move last, so that the policy that learns is
        the policy that acted."""
        rollout = collector.collect(self.policy)
        with torch.no_grad():
            batch = self.estimate(self.scaled(rollout))
        metrics = self.update(batch) | self.watch(batch)
        self.policy.observe(rollout)
        if self.reward_scale is not None:
            self.reward_scale.update(rollout.reward, rollout.start, rollout.mask)
        return metrics

    def scaled(self, rollout: Rollout) -> Rollout:
        """The rollout with its rewards brought to unit scale, where that is asked for."""
        if self.reward_scale is None:
            return rollout
        return replace(rollout, reward=self.reward_scale(rollout.reward))

    @abstractmethod
    def estimate(self, rollout: Rollout) -> Batch:
        """Assign credit to every step [T, N]."""

    @abstractmethod
    def update(self, batch: Batch) -> Metrics:
        """Improve the policy."""

    def watch(self, batch: Batch) -> Metrics:
        """What a practitioner watches whatever the method."""
        metrics = {
            "learning_rate": torch.tensor(self.optimizer.lr),
            "explained_variance": explained_variance(batch.value, batch.target, batch.mask),
        }
        return metrics | self.policy.watch()

    def validate(self, collector: Collector) -> None:
        """Raise ValueError if rollouts of this collector cannot be learned from."""

    def progress(self, fraction: float) -> None:
        """Told before each iteration what fraction of the run is behind."""
        if self.anneal:
            for part in vars(self).values():
                if isinstance(part, Optimizer):
                    part.scale_lr(max(0.0, 1.0 - fraction))

    def state_dict(self) -> dict[str, Any]:
        """The state of every part that has any; a subclass adds parts by holding them."""
        state = {name: part.state_dict() for name, part in vars(self).items() if hasattr(part, "state_dict")}
        return state | ({"generator": self.generator.get_state()} if self.generator else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part_state in state.items():
            part = getattr(self, name)
            part.set_state(part_state) if isinstance(part, Generator) else part.load_state_dict(part_state)


@dataclass(kw_only=True, eq=False)
class ActorCritic(Algorithm):
    """Advantages from a learned critic, ascended through the importance-weighted surrogate."""

    critic: Critic
    estimator: Estimator = field(default_factory=GAE)
    normalize_advantage: Literal["none", "batch"] = "batch"

    def estimate(self, rollout: Rollout) -> Batch:
        value, next_value = self.critic.bootstrap(rollout)
        ratio = torch.ones_like(value)
        if self.estimator.off_policy:
            ratio = (self.policy.dist(rollout).log_prob(rollout.action) - rollout.logp).exp()
        advantage, target = self.estimator(rollout, value, next_value, ratio, gamma=self.gamma)
        if self.normalize_advantage == "batch":
            advantage = standardize(advantage, rollout.mask)
        return Batch.of(rollout, value=value, advantage=advantage, target=target)

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """The objective [...] to ascend, cell by cell."""
        return objectives.surrogate(ratio, advantage)


def fit_critic(
    critic: Critic,
    optimizer: Optimizer,
    batch: Batch,
    *,
    epochs: int,
    count: int,
    columns: bool,
    generator: Generator | None,
) -> Metrics:
    """Regress a critic of its own optimizer on the batch's targets."""
    steps = []
    for _ in range(epochs):
        for part in minibatches(batch, count, columns=columns, generator=generator):
            error = masked_mean(objectives.squared_error(critic(part), part.target), part.mask)
            norm = optimizer.step(error)
            steps.append({"value_loss": error.detach(), "critic_grad_norm": norm})
    return average(steps)
