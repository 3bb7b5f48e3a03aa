from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgsuite.algorithms.base import ActorCritic
from pgsuite.components import Component
from pgsuite.functional import objectives
from pgsuite.nn.distributions import Distribution
from pgsuite.nn.optim import make_optimizer
from pgsuite.nn.policy import dist_and_prediction, log_prob
from pgsuite.nn.value_heads import SquaredError
from pgsuite.rollout import Collector
from pgsuite.settings import NonNegative, Positive
from pgsuite.types import Batch, Metrics, Rollout, masked_means


@dataclass(kw_only=True, eq=False)
class A2C(ActorCritic):
    """Advantage actor-critic: one gradient step per rollout, on policy and critic together (Mnih et al., 2016)."""

    optim: Component = "rmsprop"  # adam, rmsprop, or a class by its dotted path, as torch.optim.AdamW
    lr: Positive = 7e-4  # learning rate
    value_coef: NonNegative = 0.5  # weight of the value loss
    value_clip: Positive | None = None  # clip range of values around those of the rollout; null does not clip
    huber_delta: Positive | None = None  # error beyond which the value loss is linear (Huber); null: squared everywhere
    entropy_coef: NonNegative = 0.0  # weight of the entropy bonus
    max_grad_norm: Positive | None = 0.5  # gradients of a greater norm are scaled down to it; null does not clip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimizer = make_optimizer(self.trained, self.lr, self.optim, self.max_grad_norm)

    @property
    def trained(self) -> list[nn.Module]:
        """The modules that the gradient of the loss updates."""
        return [self.policy, self.critic]

    def validate(self, collector: Collector) -> None:
        super().validate(collector)
        given = [name for name in ("value_clip", "huber_delta") if getattr(self, name) is not None]
        if given and not self.critic.head.linear:
            head = type(self.critic.head).__name__.lower()
            raise ValueError(f"algo.{given[0]} is for a squared error, and critic.head={head} has none: leave it out")

    def update(self, batch: Batch) -> Metrics:
        metrics = self.gradient_step(self.optimizer, self.loss, batch)
        # At a ratio of one this loss is minus the mean advantage, and so uninformative.
        metrics.pop("policy_loss", None)
        return metrics | self.step_metrics(batch)

    @torch.no_grad()
    def step_metrics(self, batch: Batch) -> Metrics:
        """Improvement of the surrogate objective by the step, and KL(behavior policy || new policy)."""
        logp = log_prob(self.policy, batch, self.micro_batches)
        before = self.policy_objective(batch.advantage, batch.logp, batch)
        improvement = self.surrogate_objective(logp, batch) - before
        kl = self.importance_weighted(objectives.sampled_kl(objectives.log_ratio(logp, batch.logp)), batch)
        return masked_means({"surrogate_improvement": improvement, "kl": kl}, batch.mask)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss [], policy loss + value_coef * value loss - entropy_coef * entropy, each a mean over real cells; and
        metrics."""
        dist, prediction = self.evaluate(batch)
        logp = dist.log_prob(batch.action)
        log_ratio = objectives.log_ratio(logp, batch.logp)
        ratio = self.ratio_of(log_ratio, batch.mask)
        cells = {"policy_loss": -self.policy_objective(self.surrogate(ratio, batch.advantage), logp, batch)}
        if prediction is not None:
            cells["value_loss"] = self.value_error(prediction, batch)
        cells["entropy"] = (dist if has_weight(self.entropy_coef) else dist.detach()).entropy()
        with torch.no_grad():
            cells |= self.ratio_metrics(log_ratio, ratio, batch)
        means = masked_means(cells, batch.mask)
        loss = means["policy_loss"]
        if prediction is not None:
            loss = loss + self.value_coef * means["value_loss"]
        loss = loss - self.entropy_coef * means["entropy"]
        return loss, {"loss": loss.detach()} | {name: mean.detach() for name, mean in means.items()}

    def values_and_next_values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        if has_weight(self.value_coef) or self.estimator.uses_values:
            return super().values_and_next_values(rollout)
        return torch.zeros_like(rollout.reward), torch.zeros_like(rollout.reward)  # nothing depends on them

    def evaluate(self, batch: Batch) -> tuple[Distribution, Tensor | None]:
        """The action distributions of a batch, and the critic's predictions: None if their loss has no weight."""
        if has_weight(self.value_coef):
            return dist_and_prediction(self.policy, self.critic, batch)
        return self.policy.dist(batch), None

    def value_error(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Value loss per cell [...] of the critic's predictions."""
        options: SquaredError = {"old_value": batch.value, "clip": self.value_clip, "huber": self.huber_delta}
        return self.critic.loss(prediction, batch.target, **options)

    def ratio_metrics(self, log_ratio: Tensor, ratio: Tensor, batch: Batch) -> Metrics:
        """Metrics per cell [...] of the policy's change since the rollout.  A2C has none: it evaluates the loss only
        before its step."""
        return {}


def has_weight(coef: float | Tensor) -> bool:
    """Whether a coefficient of the loss is other than a constant zero; a schedule is a tensor."""
    return isinstance(coef, Tensor) or coef > 0
