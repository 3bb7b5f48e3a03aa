"""Imitation: what its methods share, and behavior cloning of recorded actions."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pgsuite.algorithms.base import Algorithm
from pgsuite.components import Component
from pgsuite.envs.base import VectorEnv
from pgsuite.nn.distributions import Distribution
from pgsuite.nn.optim import make_optimizer
from pgsuite.rollout import Collector, DemonstrationCollector, Demonstrations
from pgsuite.rollout.minibatches import check_split
from pgsuite.settings import Count, Positive
from pgsuite.types import Batch, Metrics, Rollout, masked_means


@dataclass(kw_only=True, eq=False)
class Imitation(Algorithm):
    """Minibatch steps on the mean ``distance`` of the policy to what it imitates.  Rewards are not used."""

    unused_settings = ("gamma",)

    optim: Component = "adam"  # adam, rmsprop, or a class by its dotted path, as torch.optim.AdamW
    lr: Positive = 1e-3  # learning rate
    epochs: Count = 1  # passes over each batch
    minibatches: Count = 4  # gradient steps in each pass
    max_grad_norm: Positive | None = 0.5  # gradients of a greater norm are scaled down to it; null does not clip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimizer = make_optimizer([self.policy], self.lr, self.optim, self.max_grad_norm)

    def validate(self, collector: Collector) -> None:
        super().validate(collector)
        check_split(collector.horizon, collector.env.num_envs, self.minibatches, columns=self.sequential)

    def _compute_advantages(self, rollout: Rollout) -> Batch:
        nothing = torch.zeros_like(rollout.logp)
        return Batch.of(rollout, value=nothing, advantage=nothing, target=nothing)

    def update(self, batch: Batch) -> Metrics:
        return self.fit(self.optimizer, self.loss, (), batch, self.epochs, self.minibatches)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The mean distance [] over real cells, and metrics."""
        dist = self.policy.dist(batch)
        cells = {"imitation_loss": self.distance(dist, batch), "entropy": dist.entropy()}
        means = masked_means(cells, batch.mask)
        return means["imitation_loss"], {name: mean.detach() for name, mean in means.items()}

    @abstractmethod
    def distance(self, dist: Distribution, batch: Batch) -> Tensor:
        """What is minimized, per cell [...], for the policy's distributions."""

    def metrics(self, batch: Batch) -> Metrics:
        found = super().metrics(batch)
        del found["explained_variance"]  # there is no critic
        return found


@dataclass(kw_only=True, eq=False)
class BC(Imitation):
    """Behavior cloning: maximum likelihood of recorded actions (Pomerleau, 1989).

    ``total_steps`` counts the recorded steps that are learned from; only evaluations act in the environments.
    """

    demonstrations: Demonstrations | None = None

    def make_collector(self, env: VectorEnv, horizon: int, seed: int) -> Collector:
        if self.demonstrations is None:
            raise ValueError("algo=bc learns from recorded episodes: give demonstrations=<file>")
        return DemonstrationCollector(env, horizon, seed, self.demonstrations)

    def distance(self, dist: Distribution, batch: Batch) -> Tensor:
        return -dist.log_prob(batch.action)
