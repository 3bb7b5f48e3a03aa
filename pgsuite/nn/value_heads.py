"""What a critic's outputs mean: how a value is read from them, and the loss that fits them to targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgsuite.functional import objectives
from pgsuite.settings import Count, Positive


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

    def loss(
        self,
        outputs: Tensor,
        target: Tensor,
        old_value: Tensor | None = None,
        *,
        clip: float | None = None,
        huber: float | None = None,
    ) -> Tensor:
        """The loss per cell [...] of outputs [..., outputs] for targets [...].

        ``clip``, around the ``old_value`` [...], and ``huber`` are A2C's options of a squared error; only ``linear``
        heads are given them.
        """
        raise NotImplementedError


class Scalar(ValueHead):
    """The value itself, fitted by squared error."""

    outputs, linear = 1, True

    def value(self, outputs: Tensor) -> Tensor:
        return outputs.squeeze(-1)

    def loss(
        self,
        outputs: Tensor,
        target: Tensor,
        old_value: Tensor | None = None,
        *,
        clip: float | None = None,
        huber: float | None = None,
    ) -> Tensor:
        value = self.value(outputs)
        if clip is None:
            return objectives.squared_error(value, target, huber)
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

    def loss(
        self,
        outputs: Tensor,
        target: Tensor,
        old_value: Tensor | None = None,
        *,
        clip: float | None = None,
        huber: float | None = None,
    ) -> Tensor:
        chance = objectives.gaussian_histogram(target, self.edges, self.spread)
        return -(chance * outputs.log_softmax(-1)).sum(-1)


VALUE_HEADS: dict[str, type[ValueHead]] = {"scalar": Scalar, "categorical": Categorical}
