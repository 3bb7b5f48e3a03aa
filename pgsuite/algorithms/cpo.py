from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pgsuite import distributed
from pgsuite.algorithms.constrained import Constrained
from pgsuite.algorithms.npg import LocalModel, StepEvaluator
from pgsuite.algorithms.trpo import TRPO
from pgsuite.functional.constrained import constrained_step
from pgsuite.functional.trust_region import conjugate_gradient
from pgsuite.rollout import Collector
from pgsuite.settings import NonNegative
from pgsuite.types import Batch, Metrics, Rollout


class Margin(nn.Module):
    """What a constraint is tightened by, at least zero: the sum of its violations, times a learning rate."""

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))

    def follow(self, violation: Tensor, lr: float | Tensor) -> None:
        self.value.add_(lr * violation).relu_()


@dataclass(kw_only=True, eq=False)
class CPO(Constrained, TRPO):
    """Constrained policy optimization: the trust region step of TRPO under one more linear constraint, on the cost
    (Achiam et al., 2017).

    The step maximizes g'x subject to b'x + c <= 0 and x'Fx / 2 <= max_kl, where g and b are the gradients of the
    surrogate objectives of reward and cost, and c is the cost above the limit per step of an episode.  Where no step
    meets both, it is the one that lowers the cost most.  The line search takes the largest step length at which the KL
    is within ``max_kl``, the cost surrogate rises by no more than what is left to the limit, and the reward surrogate
    improves; where the constraint is violated it asks that the cost falls instead of the latter.

    The surrogate objectives are estimates, of which steps take advantage, so that the cost settles above the limit.  A
    margin compensates that (Ray et al., 2019, in their code): each rollout adds ``margin_lr`` times the cost above the
    limit, and the constraint is on the cost plus the margin.
    """

    margin_lr: NonNegative = 0.05  # learning rate of the margin; 0 is CPO as published

    def __post_init__(self) -> None:
        super().__post_init__()
        self.margin = Margin().to(self.device)

    def preprocess(self, rollout: Rollout) -> Rollout:
        rollout = super().preprocess(rollout)
        self.margin.follow(self.episodes.cost - self.cost_limit, self.margin_lr)
        return rollout

    def validate(self, collector: Collector) -> None:
        super().validate(collector)
        if self.reference is not None and self.reference.penalty == "loss":
            raise ValueError("CPO's constraint takes no KL penalty: give reference.penalty=reward")
        if self.symmetry is not None and self.symmetry.coef > 0:
            raise ValueError("CPO's constraint takes no mirror loss: give symmetry.coef=0 and symmetry.augment=true")

    def full_step(self, start: Tensor, batch: Batch, model: LocalModel) -> tuple[Tensor, StepEvaluator, Metrics]:
        cost = self.linearize(start, replace(batch, advantage=batch.channels[self.cost_channel]))
        reward_direction, cost_direction = (
            conjugate_gradient(model.product, x, self.cg_iters, self.cg_tol) for x in (model.gradient, cost.gradient)
        )
        fisher_reward, fisher_cost = model.product(reward_direction), model.product(cost_direction)
        excess = self.episodes.cost + self.margin.value - self.cost_limit
        violation = self.cost.unit * excess / self.episodes.length
        found = constrained_step(reward_direction, cost_direction, fisher_reward, fisher_cost, violation, self.max_kl)

        def evaluate_step(vector: Tensor) -> tuple[Tensor, Tensor]:
            improvement, kl = map(distributed.mean, model.evaluate_step(vector))
            increase = distributed.mean(cost.evaluate_step(vector)[0])
            allowed = torch.where(increase <= -violation, improvement, -increase.abs())
            return torch.where(violation > 0, -increase, allowed), kl

        residual = (fisher_reward - model.gradient).norm() / model.gradient.norm().clamp(min=1e-12)
        metrics = {
            "cg_residual": residual,
            "constraint_grad_norm": cost.gradient.norm(),
            "margin": self.margin.value.clone(),
            "feasible": found.feasible.to(start.dtype),
            "multiplier": found.multiplier,
        }
        return found.step * self.critic_optimizer.lr_scale, evaluate_step, metrics
