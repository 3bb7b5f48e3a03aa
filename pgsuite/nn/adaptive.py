"""Coefficients that follow what they act on, without the host's knowing."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Coefficient(nn.Module):
    """A positive number that is saved with the rest."""

    value: Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value))

    def aim(self, measured: Tensor, target: float) -> None:
        """Double if measured is above 1.5 times the target, and halve if it is below two thirds of it."""
        up, down = measured > 1.5 * target, measured < target / 1.5
        self.value.mul_(torch.where(up, 2.0, torch.where(down, 0.5, 1.0))).clamp_(1e-6, 1e6)
