from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgsuite import parallel
from pgsuite.algorithms.base import ActorCritic, fit_critic
from pgsuite.functional import trust_region
from pgsuite.nn.optim import Optimizer
from pgsuite.rollout import Collector
from pgsuite.rollout.minibatches import check_split
from pgsuite.settings import Count, NonNegative, Positive
from pgsuite.types import Batch, Metrics, masked_mean

Move = Callable[[float], tuple[Tensor, Tensor]]  # fraction of the step -> improvement, KL(old || new)


@dataclass(kw_only=True, eq=False)
class NPG(ActorCritic):
    """One step along the natural gradient, as long as the KL budget allows (Kakade, 2001).

    The step is sqrt(2 max_kl / d'Fd) d, with F d = gradient solved by conjugate gradient: the quadratic model of
    KL(old || new) equals max_kl at its end.
    """

    max_kl: Positive = 0.01
    damping: NonNegative = 0.1
    cg_iters: Count = 10
    critic_lr: Positive = 1e-3
    critic_epochs: Count = 10
    critic_minibatches: Count = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimizer = Optimizer([self.critic.own], self.critic_lr)

    def validate(self, collector: Collector) -> None:
        super().validate(collector)
        check_split(collector.horizon, collector.env.num_envs, self.critic_minibatches, columns=self.sequential)

    def update(self, batch: Batch) -> Metrics:
        return self.improve(batch) | self.regress(batch)

    def improve(self, batch: Batch) -> Metrics:
        """Move the policy, or leave it bit for bit where it was if the step is refused or not finite."""
        params = list(self.policy.parameters())
        start, old = trust_region.flatten(params).detach(), self.policy.dist(batch).detach()

        def gain_and_kl() -> tuple[Tensor, Tensor]:
            dist = self.policy.dist(batch)
            ratio = (dist.log_prob(batch.action) - batch.logp).exp()
            gain = self.surrogate(ratio, batch.advantage) - batch.advantage
            return masked_mean(gain, batch.mask), masked_mean(old.kl(dist), batch.mask)

        gain, kl = gain_and_kl()
        gradient = trust_region.flat_grad(gain, params, retain_graph=True)
        product = trust_region.fisher_product(kl, params, self.damping)
        direction = trust_region.conjugate_gradient(product, gradient, self.cg_iters)
        image = product(direction)
        step = direction * (2 * self.max_kl / (direction @ image).clamp(min=1e-12)).sqrt()
        finite = step.isfinite().all()

        @torch.no_grad()
        def move(fraction: float) -> tuple[Tensor, Tensor]:
            moved = torch.where(finite, start + fraction * step, start) if fraction else start
            trust_region.assign(params, moved)
            gain, kl = gain_and_kl()
            return parallel.mean(gain), parallel.mean(kl)

        fraction, metrics = self.search(move)
        gain, kl = move(fraction)
        return metrics | {
            "improvement": gain,
            "kl": kl,
            "step_fraction": torch.full_like(kl, fraction).where(finite, 0.0),
            "step_norm": fraction * step.norm(),
            "cg_residual": (image - gradient).norm() / gradient.norm().clamp(min=1e-12),
            "entropy": masked_mean(old.entropy(), batch.mask),
            "grad_norm": gradient.norm(),
        }

    def search(self, move: Move) -> tuple[float, Metrics]:
        """How much of the step to keep, and what is worth knowing about the search."""
        return 1.0, {}

    def regress(self, batch: Batch) -> Metrics:
        """Fit the critic, which no trust region confines."""
        return fit_critic(
            self.critic,
            self.optimizer,
            batch,
            epochs=self.critic_epochs,
            count=self.critic_minibatches,
            columns=self.sequential,
            generator=self.generator,
        )
