"""Lagrange multipliers of constraints, learned with the networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Multipliers(nn.Module):
    """Positive numbers by name, from what they are at the start, learned by their logarithms.

    The multiplier of a constraint minimizes ``multiplier * slack``, where the slack [] is positive while the constraint
    holds: descent lowers the multiplier then, and raises it while the constraint is violated.
    """

    def __init__(self, **start: float) -> None:
        super().__init__()
        for name, x in start.items():
            self.register_parameter(f"log_{name}", nn.Parameter(torch.tensor(math.log(float(x)))))

    def forward(self) -> tuple[Tensor, ...]:
        """Each multiplier [], in order."""
        return tuple(x.exp() for x in self.parameters())
