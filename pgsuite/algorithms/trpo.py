from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgsuite.algorithms.npg import NPG, StepEvaluator
from pgsuite.functional.trust_region import backtrack, backtrack_at_once
from pgsuite.settings import Count, Shrink
from pgsuite.types import Metrics


@dataclass(kw_only=True, eq=False)
class TRPO(NPG):
    """The natural step, shortened until it truly improves within the KL budget (Schulman et al., 2015).

    The sequential search stops at the first step that does, and reads one bit per try back to the host.  The batched
    one tries all at once, in ``max_backtracks`` times the memory, and reads nothing.
    """

    backtrack_coef: Shrink = 0.8  # factor by which the line search shortens the step each time
    max_backtracks: Count = 10  # step lengths that the line search tries
    backtracking: Literal["sequential", "batched"] = "sequential"  # try one step length after the other, or all at once

    @property
    def host_sync_reason(self) -> str | None:
        if self.backtracking == "batched":
            return super().host_sync_reason
        return "the line search reads one bit of each try; algo.backtracking=batched reads none"

    def line_search(self, evaluate_fraction: StepEvaluator, full_step: Tensor) -> tuple[Tensor, Metrics]:
        def accept(fraction: Tensor) -> Tensor:
            improvement, kl = evaluate_fraction(fraction)
            return (improvement > 0) & (kl <= self.max_kl)

        fractions = self.backtrack_coef ** torch.arange(
            self.max_backtracks, dtype=full_step.dtype, device=full_step.device
        )
        find = backtrack_at_once if self.backtracking == "batched" else backtrack
        fraction = find(accept, fractions)
        return fraction, {"backtracks": (fractions > fraction).sum(dtype=full_step.dtype)}
