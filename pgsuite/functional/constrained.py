"""The step of constrained policy optimization.  P is the number of parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-12


class ConstrainedStep(NamedTuple):
    """A step within a trust region, and the dual variables of the problem that it solves."""

    step: Tensor  # [P]
    feasible: Tensor  # [] bool, whether any step within the trust region meets the constraint
    multiplier: Tensor  # [] of the constraint, nu: zero where it is not active
    trust_multiplier: Tensor  # [] of the trust region, lambda


def constrained_step(
    reward_direction: Tensor,
    cost_direction: Tensor,
    fisher_reward: Tensor,
    fisher_cost: Tensor,
    violation: Tensor,
    max_kl: float | Tensor,
) -> ConstrainedStep:
    """The x [P] that maximizes g'x subject to b'x + violation <= 0 and x'Fx / 2 <= max_kl (Achiam et al., 2017,
    equation 11 and theorem 2), and where no x meets both, the one that lowers b'x most within the trust region
    (equation 14).

    reward_direction, cost_direction: F^-1 g and F^-1 b [P], for example by conjugate gradient
    fisher_reward, fisher_cost: their products with F [P]
    violation []: what the constraint is exceeded by at x = 0, negative if it holds

    With a cost whose gradient is zero the constraint does not depend on x, and is left out.
    """
    q, r = reward_direction @ fisher_reward, reward_direction @ fisher_cost  # g'F^-1 g, g'F^-1 b
    s, c, squared = cost_direction @ fisher_cost, violation, 2 * max_kl  # b'F^-1 b
    free = (squared / q.clamp(min=TINY)).sqrt()  # what F^-1 g is multiplied by without the constraint
    constant = s <= TINY
    s = s.clamp(min=TINY)
    across = (q - r**2 / s).clamp(min=0.0)  # of g, orthogonal to b in the metric F^-1
    within = squared - c**2 / s  # squared length that is left at the constraint's border
    inactive = constant | (r * free + c <= 0)
    feasible = constant | (c <= 0) | (within >= 0)

    # At the border x is the shortest step to it, and then along it as far as the trust region lets g'x rise.
    along = (within.clamp(min=0.0) / across.clamp(min=TINY)).sqrt()
    bordering = along * reward_direction - (c / s + along * r / s) * cost_direction
    recovery = -(squared / s).sqrt() * cost_direction
    step = torch.where(inactive, free * reward_direction, torch.where(feasible, bordering, recovery))

    trust = torch.where(inactive, 1 / free, (across / within.clamp(min=TINY)).sqrt())
    multiplier = torch.where(inactive, 0.0, ((r + trust * c) / s).clamp(min=0.0))
    live = inactive | feasible
    return ConstrainedStep(step, feasible, multiplier.where(live, 0.0), trust.where(live, 0.0))
