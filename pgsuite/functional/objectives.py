"""What a policy ascends and a critic descends, cell by cell, before any averaging."""

from __future__ import annotations

import torch
from torch import Tensor


def log_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """log new - log old, held within +-20: where the policies differ by more, an exponential could overflow and says
    nothing, and near saturation rounding alone may amount to as much."""
    return (logp - old_logp).clamp(-20.0, 20.0)


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The mean log-ratio of each column's real cells in the place of every cell's own [T, N], while the gradient of a
    cell stays that of its own (Zheng et al., 2025, GSPO-token, equation 13)."""
    log_ratio = log_ratio.where(mask, 0.0)
    mean = log_ratio.sum(0, keepdim=True) / mask.sum(0, keepdim=True).clamp(min=1)
    return mean.detach() + log_ratio - log_ratio.detach()


def surrogate(ratio: Tensor, advantage: Tensor) -> Tensor:
    """Importance-weighted advantage; at ratio one its gradient is the policy gradient."""
    return ratio * advantage


def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """The surrogate with no reward for leaving [1 - low, 1 + high] (Schulman et al., 2017, equation 7; with two widths,
    Yu et al., 2025)."""
    return torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def dual_clipped(objective: Tensor, advantage: Tensor, limit: float) -> Tensor:
    """An objective that loses at most limit times a bad action's advantage, however likely it became (Ye et al., 2020,
    equation 5)."""
    return torch.where(advantage < 0, torch.max(objective, limit * advantage), objective)


def sampled_kl(log_ratio: Tensor) -> Tensor:
    """KL(old || new) from actions of the old policy, log_ratio = log new - log old: exp(l) - 1 - l, unbiased and never
    negative (Schulman's k3, 2020)."""
    return log_ratio.expm1() - log_ratio


def reverse_kl(log_ratio: Tensor) -> Tensor:
    """KL(new || reference) from actions of the new policy, log_ratio = log new - log reference: exp(-l) - 1 + l,
    unbiased and never negative (Schulman's k3, 2020); l alone is his k1."""
    return sampled_kl(-log_ratio)


def squared_error(value: Tensor, target: Tensor, huber: float | None = None) -> Tensor:
    """Beyond ``huber``, where that is given, it goes on as a straight line (Huber, 1964)."""
    error = value - target
    if huber is None:
        return error**2
    size = error.abs()
    return torch.where(size <= huber, size**2, huber * (2 * size - huber))


def clipped_squared_error(
    value: Tensor, old_value: Tensor, target: Tensor, clip: float, huber: float | None = None
) -> Tensor:
    """The worse of the error and that of a value held within clip of the old one (baselines' PPO)."""
    held = old_value + (value - old_value).clamp(-clip, clip)
    return torch.max(squared_error(value, target, huber), squared_error(held, target, huber))
