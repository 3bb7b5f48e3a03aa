"""Imitation: of recorded actions, or of another policy in the states that the learning policy visits."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from pgsuite.algorithms.base import Algorithm
from pgsuite.components import Component
from pgsuite.envs.base import VectorEnv
from pgsuite.nn.distributions import Distribution
from pgsuite.nn.optim import make_optimizer
from pgsuite.nn.policy import Policy
from pgsuite.rollout import Collector, DemonstrationCollector, Demonstrations
from pgsuite.rollout.minibatches import check_split
from pgsuite.settings import Count, Positive
from pgsuite.types import PRIVILEGED, Batch, Metrics, Rollout, masked_means


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


@dataclass(kw_only=True, eq=False)
class Distill(Imitation):
    """Distillation: KL(teacher || policy) in the states that the policy itself visits, as in DAgger (Ross et al.,
    2011), but of the latest rollout alone.

    A teacher whose observations are the entry ``critic_obs`` here sees that entry, which the policy does not.
    """

    teacher: Policy | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None:
            raise ValueError("algo=distill learns from a trained policy: give teacher=<run directory>")
        if self.teacher.sequential:
            raise ValueError("the teacher has a memory, which algo=distill does not run: take one without")
        its, own = (type(x.head).__name__.removesuffix("Head").lower() for x in (self.teacher, self.policy))
        if its != own:
            raise ValueError(f"the teacher's policy.distribution is {its} and that of the run is {own}: take {its}")
        self.teacher.requires_grad_(False)
        self.entry = seen_entry(self.teacher.obs_norm.space, self.policy.obs_norm.space)

    def distance(self, dist: Distribution, batch: Batch) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            target = self.teacher.dist(batch if self.entry is None else replace(batch, obs=batch.obs[self.entry]))
        return target.kl(dist)


def seen_entry(theirs: spaces.Space[Any], own: spaces.Space[Any]) -> str | None:
    """The entry of observations of the space ``own`` that is an observation of another space; None if the whole is one,
    but for entries that the other does not have.  Raises ValueError if there is none."""

    def fits(a: Any, b: Any) -> bool:
        if isinstance(a, spaces.Dict) and isinstance(b, spaces.Dict):
            return all(key in b.spaces and fits(part, b[key]) for key, part in a.items())
        return type(a) is type(b) and a.shape == b.shape

    if fits(theirs, own):
        return None
    parts = own.spaces if isinstance(own, spaces.Dict) else {}
    for key in sorted(parts, key=lambda key: key != PRIVILEGED):
        if fits(theirs, parts[key]):
            return key
    raise ValueError(f"the teacher was trained on observations {theirs}, which are no part of {own}")
