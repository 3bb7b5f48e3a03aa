from __future__ import annotations

from dataclasses import dataclass

import torch

from pgsuite.algorithms.npg import NPG, Move
from pgsuite.functional.trust_region import backtrack
from pgsuite.settings import Count, Shrink
from pgsuite.types import Metrics


@dataclass(kw_only=True, eq=False)
class TRPO(NPG):
    """The natural step, shortened until it truly improves within the KL budget (Schulman et al., 2015).

    The search reads one bit per try back to the host.
    """

    shrink: Shrink = 0.8
    tries: Count = 10

    def search(self, move: Move) -> tuple[float, Metrics]:
        tried = 0

        def accept(fraction: float) -> bool:
            nonlocal tried
            tried += 1
            gain, kl = move(fraction)
            return bool((gain > 0) & (kl <= self.max_kl))

        fraction = backtrack(accept, self.shrink, self.tries)
        return fraction, {"backtracks": torch.tensor(float(tried - 1 if fraction else tried))}
