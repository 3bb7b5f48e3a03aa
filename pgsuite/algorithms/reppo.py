from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pgsuite.algorithms.base import Algorithm
from pgsuite.algorithms.channels import critic_loss
from pgsuite.algorithms.multipliers import Multipliers
from pgsuite.components import Component
from pgsuite.functional.estimators import soft_td_lambda
from pgsuite.nn.action_critic import ActionCritic
from pgsuite.nn.heads import GaussianHead
from pgsuite.nn.optim import make_optimizer
from pgsuite.nn.policy import PastPolicy
from pgsuite.rollout import Collector
from pgsuite.rollout.minibatches import check_split
from pgsuite.settings import Count, Fraction, Positive
from pgsuite.types import Batch, Metrics, Rollout, average, masked_means


@dataclass(kw_only=True, eq=False)
class REPPO(Algorithm):
    """Relative entropy pathwise policy optimization (Voelcker et al., 2025).

    A critic Q(s, a) is fitted to soft lambda returns, and the policy ascends Q along its own actions, as functions of
    noise.  The multipliers of an entropy target and of a bound on KL(old || new) are learned with the policy; in states
    beyond the bound, the KL is lowered in place of Q being raised.
    """

    action_values = True
    critic: ActionCritic
    lam: Fraction = 0.95  # lambda of the targets: 0 is one-step TD, 1 Monte Carlo
    optim: Component = "adam"  # adam, rmsprop, or a class by its dotted path, as torch.optim.AdamW
    lr: Positive = 3e-4  # learning rate of policy, multipliers and critic
    epochs: Count = 4  # passes over each batch
    minibatches: Count = 16  # gradient steps in each pass, of the critic and then of the policy
    max_grad_norm: Positive | None = 0.5  # gradients of a greater norm are scaled down to it; null does not clip
    entropy_target: float = -0.5  # in nats for each number of an action, in units of half the width of the Box
    max_kl: Positive = 0.1  # bound on KL(old || new) of an update, in nats
    multiplier: Positive = 0.01  # of entropy and of KL at the start

    def __post_init__(self) -> None:
        super().__post_init__()
        multipliers = Multipliers(temperature=self.multiplier, kl_coef=self.multiplier)
        self.multipliers = multipliers.to(self.device)
        self.optimizer = make_optimizer([self.policy, self.multipliers], self.lr, self.optim, self.max_grad_norm)
        self.critic_optimizer = make_optimizer([self.critic], self.lr, self.optim, self.max_grad_norm)
        self.old = PastPolicy(self.policy)  # before the update

    def validate(self, collector: Collector) -> None:
        super().validate(collector)
        if not isinstance(self.policy.head, GaussianHead):
            raise ValueError("algo=reppo moves actions along noise: take policy.distribution=squashed or gaussian")
        check_split(collector.horizon, collector.env.num_envs, self.minibatches, columns=self.sequential)

    def _compute_advantages(self, rollout: Rollout) -> Batch:
        value, next_value, following = self.critic.on_policy(self.policy, rollout, self.generator)
        bonus = self.multipliers()[0] * self.policy.head.unit_entropy(following)
        seen = (rollout.reward, next_value, bonus, rollout.terminated, rollout.done)
        target = soft_td_lambda(*seen, gamma=self.gamma, lam=self.lam)
        self.critic.observe_targets(target, rollout.mask)
        return Batch.of(rollout, value=value, advantage=target - value, target=target)

    def update(self, batch: Batch) -> Metrics:
        self.old.keep()
        steps: list[Metrics] = []
        for _ in range(self.epochs):
            noise = torch.empty_like(batch.action).normal_(generator=self.generator)
            for part in self.split(replace(batch, extra=batch.extra | {"noise": noise}), self.minibatches):
                found = self.gradient_step(self.critic_optimizer, critic_loss, self.critic, part)
                steps.append(found | self.gradient_step(self.optimizer, self.loss, part))
        return average(steps)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss [] of policy and multipliers, a mean over real cells, and metrics."""
        dist: Any = self.policy.dist(batch)
        q = self.critic(replace(batch, action=dist.from_noise(batch.extra["noise"])))
        entropy, kl = self.policy.head.unit_entropy(dist), self.old.dist(batch).kl(dist)
        temperature, kl_coef = self.multipliers()
        gain = torch.where(kl < self.max_kl, q + temperature.detach() * entropy, -kl_coef.detach() * kl)
        objective = self.policy_objective(gain, dist.log_prob(batch.action), batch)
        means = masked_means({"policy_loss": -objective, "q": q, "entropy": entropy, "kl": kl}, batch.mask)
        slack = means["entropy"].detach() - self.entropy_target * batch.action.shape[-1]
        loss = means["policy_loss"] + temperature * slack + kl_coef * (self.max_kl - means["kl"].detach())
        means |= {"loss": loss, "temperature": temperature, "kl_coef": kl_coef}
        return loss, {name: mean.detach() for name, mean in means.items()}
