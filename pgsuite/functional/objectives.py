"""What a policy ascends and a critic descends, cell by cell, before any averaging."""

from __future__ import annotations

import torch
from torch import Tensor


def surrogate(ratio: Tensor, advantage: Tensor) -> Tensor:
    """Importance-weighted advantage; at ratio one its gradient is the policy gradient."""
    return ratio * advantage


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The surrogate with no reward for leaving [1 - clip, 1 + clip] (Schulman et al., 2017, equation 7)."""
    return torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def sampled_kl(log_ratio: Tensor) -> Tensor:
    """KL(old || new) from actions of the old policy, log_ratio = log new - log old: exp(l) - 1 - l, unbiased and never
    negative (Schulman's k3, 2020)."""
    return log_ratio.expm1() - log_ratio


def squared_error(value: Tensor, target: Tensor) -> Tensor:
    return (value - target) ** 2


def clipped_squared_error(value: Tensor, old_value: Tensor, target: Tensor, clip: float) -> Tensor:
    """The worse of the error and that of a value held within clip of the old one (baselines' PPO)."""
    held = old_value + (value - old_value).clamp(-clip, clip)
    return torch.max((value - target) ** 2, (held - target) ** 2)
