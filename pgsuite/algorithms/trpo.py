from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgsuite.algorithms.npg import NPG, Attempt
from pgsuite.functional.trust_region import backtrack, backtrack_at_once
from pgsuite.settings import Count, Shrink
from pgsuite.types import Metrics


@dataclass(kw_only=True, eq=False)
class TRPO(NPG):
    """The natural step, shortened until it truly improves within the KL budget (Schulman et al., 2015).

    The sequential search stops at the first step that does, and reads one bit per try back to the host.  The batched
    one tries all at once, in ``tries`` times the memory, and reads nothing.
    """

    shrink: Shrink = 0.8
    tries: Count = 10
    line_search: Literal["sequential", "batched"] = "sequential"

    @property
    def reads(self) -> str | None:
        if self.line_search == "batched":
            return super().reads
        return "the line search reads one bit of each try; algo.line_search=batched reads none"

    def search(self, attempt: Attempt, whole: Tensor) -> tuple[Tensor, Metrics]:
        def accept(fraction: Tensor) -> Tensor:
            gain, kl = attempt(fraction)
            return (gain > 0) & (kl <= self.max_kl)

        fractions = self.shrink ** torch.arange(self.tries, dtype=whole.dtype, device=whole.device)
        find = backtrack_at_once if self.line_search == "batched" else backtrack
        fraction = find(accept, fractions)
        return fraction, {"backtracks": (fractions > fraction).sum(dtype=whole.dtype)}
