from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pgsuite import distributed
from pgsuite.algorithms.base import ActorCritic, CriticRegressionMixin
from pgsuite.functional import autodiff, trust_region
from pgsuite.kernel import Kernel, is_phase, phase
from pgsuite.nn.distributions import Distribution
from pgsuite.nn.stateless import functional_in_parameters
from pgsuite.settings import Count, NonNegative, Positive
from pgsuite.types import Batch, Metrics, masked_mean

# Fractions [] or [K] of the step -> improvement and KL(old || new), of the same shape; the policy is unchanged.
StepEvaluator = Callable[[Tensor], tuple[Tensor, Tensor]]


class LocalModel(NamedTuple):
    """The objective and the KL on a batch around the policy's present parameters."""

    gradient: Tensor  # [P] of the objective
    entropy: Tensor  # []
    product: trust_region.Product  # Fisher-vector product
    # Parameters [P] or [K, P] -> improvement and KL(old || new), [] or [K], not yet averaged over processes.
    evaluate_step: StepEvaluator


@dataclass(kw_only=True, eq=False)
class NPG(ActorCritic, CriticRegressionMixin):
    """One natural gradient step, scaled to the boundary of the trust region (Kakade, 2001).

    The step is sqrt(2 max_kl / d'Fd) d, with F d = gradient solved by conjugate gradient; the quadratic model of
    KL(old || new) equals max_kl at its end.

    Fisher-vector products are computed by differentiating the gradient of the KL (double backward), or in Gauss-Newton
    form, by a forward-mode and a reverse-mode derivative of the network; both are exact.
    """

    max_kl: Positive = 0.01  # trust region: mean KL(old || new) of a step, in nats
    damping: NonNegative = 0.1  # multiple of the identity added to the Fisher matrix
    cg_iters: Count = 10  # iterations of conjugate gradient
    cg_tol: NonNegative = 1e-10  # squared residual at which conjugate gradient stops
    fisher: Literal["double-backward", "gauss-newton"] = "double-backward"  # Fisher-vector products; both are exact

    def __post_init__(self) -> None:
        super().__post_init__()
        self.critic_optimizer = self.make_critic_optimizer(self.critic)
        self.linearize = Kernel("linearize", self._linearize)
        self.update_networks = Kernel("policy and critic", self._update_networks)

    def update(self, batch: Batch) -> Metrics:
        return self.update_networks(batch)

    def _update_networks(self, batch: Batch) -> Metrics:
        """Update policy and critic.  Neither reads what the other writes unless they share a body, so they may run in
        parallel."""
        return self.update_policy(batch) | self.fit_critic(self.critic, self.critic_optimizer, batch)

    @is_phase("policy")
    def update_policy(self, batch: Batch) -> Metrics:
        """Take a natural gradient step.  If the line search rejects it, or if it is not finite, the parameters stay
        bitwise unchanged."""
        params = list(self.policy.parameters())
        start = trust_region.flatten(params).detach()
        model = self.linearize(start, batch)
        step, evaluate_step, step_metrics = self.full_step(start, batch, model)

        @torch.no_grad()
        def evaluate_fraction(fraction: Tensor) -> tuple[Tensor, Tensor]:
            improvement, kl = evaluate_step(start + fraction.unsqueeze(-1) * step)
            return distributed.mean(improvement), distributed.mean(kl)

        with phase("line search"):
            fraction, metrics = self.line_search(evaluate_fraction, start.new_ones(()))
        accepted = (fraction > 0) & step.isfinite().all()
        moved = torch.where(accepted, start + fraction * step, start)
        trust_region.assign(params, moved)
        with torch.no_grad():
            improvement, kl = model.evaluate_step(moved)
        return (
            metrics
            | step_metrics
            | {
                "surrogate_improvement": distributed.mean(improvement),
                "kl": distributed.mean(kl),
                "accepted": accepted.to(start.dtype),
                "step_fraction": fraction.where(accepted, 0.0),
                "step_norm": (moved - start).norm(),
                "entropy": model.entropy,
                "grad_norm": model.gradient.norm(),
            }
        )

    def full_step(self, start: Tensor, batch: Batch, model: LocalModel) -> tuple[Tensor, StepEvaluator, Metrics]:
        """The step [P] from the parameters ``start`` [P] of which the line search takes a fraction; what it asks to be
        positive, and the KL, [] or [K], as a function of parameters [P] or [K, P]; and metrics."""
        direction = trust_region.conjugate_gradient(model.product, model.gradient, self.cg_iters, self.cg_tol)
        fisher_direction = model.product(direction)
        length = (2 * self.max_kl / (direction @ fisher_direction).clamp(min=1e-12)).sqrt()
        residual = (fisher_direction - model.gradient).norm() / model.gradient.norm().clamp(min=1e-12)
        step = direction * (length * self.critic_optimizer.lr_scale)  # halved with the learning rate
        return step, model.evaluate_step, {"cg_residual": residual}

    def _linearize(self, start: Tensor, batch: Batch) -> LocalModel:
        """The local model of the objective at the policy's parameters ``start`` [P]."""
        dist_at = functional_in_parameters(self.policy, lambda: self.policy.dist(batch))

        def with_objective(objective: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Distribution, Tensor]]:
            """The distributions, and an objective of the log-probabilities, which may call the policy itself."""

            def evaluate() -> tuple[Distribution, Tensor]:
                dist = self.policy.dist(batch)
                return dist, objective(dist.log_prob(batch.action))

            return functional_in_parameters(self.policy, evaluate)

        evaluate_at = with_objective(lambda logp: self.surrogate_objective(logp, batch))
        with torch.no_grad():
            old, before = with_objective(lambda logp: self.policy_objective(batch.advantage, logp, batch))(start)

        def evaluate_step(vector: Tensor) -> tuple[Tensor, Tensor]:
            if vector.ndim > 1:
                return torch.vmap(evaluate_step)(vector)
            new, objective = evaluate_at(vector)
            improvement = objective - before
            return masked_mean(improvement, batch.mask), masked_mean(old.kl(new), batch.mask)

        theta = autodiff.leaf(start)
        improvement, kl = evaluate_step(theta)
        gradient = trust_region.flat_grad(improvement, [theta], retain_graph=True)
        if self.fisher == "gauss-newton":
            product = trust_region.gauss_newton_product(
                dist_at, lambda p, q: masked_mean(p.kl(q), batch.mask), start, self.damping
            )
        else:
            product = trust_region.fisher_product(kl, [theta], self.damping)
        return LocalModel(gradient, masked_mean(old.entropy(), batch.mask), product, evaluate_step)

    def line_search(self, evaluate_fraction: StepEvaluator, full_step: Tensor) -> tuple[Tensor, Metrics]:
        """The fraction [] of the step to take, and metrics.  ``full_step`` [] is the fraction 1, which NPG returns."""
        return full_step, {}
