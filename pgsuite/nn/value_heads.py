"""What a critic's outputs mean: how a value is read from them, and the loss that fits them to targets."""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from pgsuite.functional import objectives
from pgsuite.settings import Count, Positive


class SquaredError(TypedDict, total=False):
    """The options of A2C for a squared error."""

    old_value: Tensor  # [...] around which values are clipped
    clip: float | None  # clip range
    huber: float | None  # error beyond which the loss is linear


class ValueHead(nn.Module):
    """A prediction of ``outputs`` numbers [..., outputs] per cell, its value, and its loss.

    One of your own is chosen by ``critic.head``; it is made as ``cls(**settings)``.
    """

    outputs: int
    linear = False  # whether the value is the only output, so that the layer before it can be rescaled
    normalizes = False  # whether values are normalized unless critic.normalize_values says otherwise

    def value(self, outputs: Tensor) -> Tensor:
        """The values [...] of outputs [..., outputs]."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, target: Tensor, **options: Unpack[SquaredError]) -> Tensor:
        """The loss per cell [...] of outputs [..., outputs] for targets [...].

        Only ``linear`` heads are given a ``clip`` or ``huber``.
        """
        raise NotImplementedError


class Scalar(ValueHead):
    """The value itself, fitted by squared error."""

    outputs, linear = 1, True

    def value(self, outputs: Tensor) -> Tensor:
        return outputs.squeeze(-1)

    def loss(self, outputs: Tensor, target: Tensor, **options: Unpack[SquaredError]) -> Tensor:
        value, clip, huber = self.value(outputs), options.get("clip"), options.get("huber")
        if clip is None:
            return objectives.squared_error(value, target, huber)
        old_value = options.get("old_value")
        assert old_value is not None
        return objectives.clipped_squared_error(value, old_value, target, clip, huber)


class Categorical(ValueHead):
    """Logits of ``bins`` of equal width from -limit to limit, fitted by cross-entropy to histograms of normal
    distributions around the targets, whose deviation is ``spread`` bins (HL-Gauss; Imani and White, 2018;
    Farebrother et al., 2024).  The value is the mean of the bins' centers.  Targets beyond the limits count as the
    limits.
    """

    normalizes = True
    edges: Tensor  # [bins + 1]

    def __init__(self, *, bins: Count = 101, limit: Positive = 10.0, spread: Positive = 0.75) -> None:
        super().__init__()
        self.outputs, self.spread = bins, spread * 2 * limit / bins
        self.register_buffer("edges", torch.linspace(-limit, limit, bins + 1), persistent=False)

    def value(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1) @ ((self.edges[1:] + self.edges[:-1]) / 2)

    def loss(self, outputs: Tensor, target: Tensor, **options: Unpack[SquaredError]) -> Tensor:
        chance = objectives.gaussian_histogram(target, self.edges, self.spread)
        return -(chance * outputs.log_softmax(-1)).sum(-1)


VALUE_HEADS: dict[str, type[ValueHead]] = {"scalar": Scalar, "categorical": Categorical}
