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
    """The natural step of NPG, with a backtracking line search (Schulman et al., 2015, appendix C).

    The line search takes the largest of the step lengths 1, backtrack_coef, backtrack_coef^2, ... at which the
    surrogate objective improves and the mean KL(old || new) is at most max_kl.  The sequential search stops at the
    first such length, and reads one bit per trial from the device.  The batched one evaluates all lengths at once, with
    ``max_backtracks`` times the memory, and reads nothing.
    """

    backtrack_coef: Shrink = 0.8  # factor between successive step lengths of the line search
    max_backtracks: Count = 10  # step lengths that the line search tries
    backtracking: Literal["sequential", "batched"] = "sequential"  # evaluate step lengths one by one, or all at once

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
