from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgsuite.algorithms.base import CriticRegressionMixin
from pgsuite.algorithms.estimators import Estimator
from pgsuite.components import Component
from pgsuite.functional import estimators
from pgsuite.nn.optim import make_optimizer
from pgsuite.nn.policy import Critic
from pgsuite.rollout import Collector, EpisodeCollector
from pgsuite.settings import Positive
from pgsuite.types import Batch, Metrics, Rollout, masked_mean, standardize


@dataclass(kw_only=True, eq=False)
class Reinforce(CriticRegressionMixin):
    """Monte Carlo policy gradient: one gradient step per batch of whole episodes (Williams, 1992).

    The loss is a sum over the steps of an episode and a mean over episodes, so its gradient is unbiased.  Advantages
    are returns, from the action to the end of the episode or, as in the paper, of the whole episode, minus a baseline:
    none, the mean return of the other episodes at the same step, or a critic's value.
    """

    collector = EpisodeCollector

    critic: Critic | None = None
    returns: Literal["to-go", "total"] = "to-go"  # return from each action on, or of the whole episode
    baseline: Literal["none", "leave-one-out", "critic"] = "leave-one-out"  # what is subtracted from returns
    estimator: Estimator | None = None  # advantage estimator in place of returns and baseline; null uses none
    normalize_advantage: Literal["none", "batch"] = "none"  # standardize advantages to zero mean and unit variance
    optim: Component = "adam"  # adam, rmsprop, or a class by its dotted path, as torch.optim.AdamW
    lr: Positive = 1e-3  # learning rate
    max_grad_norm: Positive | None = None  # gradients of a greater norm are scaled down to it; null does not clip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimizer = make_optimizer([self.policy], self.lr, self.optim, self.max_grad_norm)
        if self.baseline != "critic":
            self.critic = None
        elif self.critic is None:
            raise ValueError("algo.baseline=critic needs a critic")
        else:
            self.critic_optimizer = self.make_critic_optimizer(self.critic)

    def validate(self, collector: Collector) -> None:
        super().validate(collector)
        if not collector.whole_episodes:
            raise ValueError("REINFORCE needs whole episodes: collect them with EpisodeCollector")

    def _compute_advantages(self, rollout: Rollout) -> Batch:
        returns = estimators.reward_to_go(rollout.reward, rollout.done, gamma=self.gamma)
        returns = returns[0].expand_as(returns) if self.returns == "total" else returns
        value = torch.zeros_like(returns)
        if self.baseline == "leave-one-out":
            value = estimators.leave_one_out(returns, rollout.mask)
        elif self.critic is not None:
            value = self.critic(rollout)
        advantage = returns - value
        if self.estimator is not None:
            advantage, returns = self.estimator(rollout, value, value, None, gamma=self.gamma)
        if self.critic is not None:
            self.critic.observe_targets(returns, rollout.mask)
        advantage = standardize(advantage, rollout.mask) if self.normalize_advantage == "batch" else advantage
        return Batch.of(rollout, value=value, advantage=advantage, target=returns)

    def update(self, batch: Batch) -> Metrics:
        metrics = self.gradient_step(self.optimizer, self.loss, batch, mean="columns")
        return metrics if self.critic is None else metrics | self.fit_critic(self.critic, self.critic_optimizer, batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Minus the policy objective [], summed over the steps of each episode and averaged over episodes; and
        metrics."""
        logp = (dist := self.policy.dist(batch)).log_prob(batch.action)
        gain = self.policy_objective(logp * batch.advantage, logp, batch)
        loss = -gain.where(batch.mask, 0.0).sum() / batch.logp.shape[1]
        return loss, {"policy_loss": loss.detach(), "entropy": masked_mean(dist.detach().entropy(), batch.mask)}
