"""Policy objectives to maximize and critic losses to minimize, per cell, before averaging."""

from __future__ import annotations

import torch
from torch import Tensor


def log_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """Log importance ratio, log new - log old, clamped to +-20: beyond that its exponential could overflow, and for
    nearly deterministic policies rounding errors alone may be as large."""
    return (logp - old_logp).clamp(-20.0, 20.0)


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Sequence-level log importance ratio [T, N]: in each column the value is the mean over its real cells, while the
    gradient of each cell is that of its own log-ratio (Zheng et al., 2025, GSPO-token, equation 13)."""
    log_ratio = log_ratio.where(mask, 0.0)
    mean = log_ratio.sum(0, keepdim=True) / mask.sum(0, keepdim=True).clamp(min=1)
    return mean.detach() + log_ratio - log_ratio.detach()


def surrogate(ratio: Tensor, advantage: Tensor) -> Tensor:
    """Importance-weighted advantage.  At ratio one its gradient is the policy gradient."""
    return ratio * advantage


def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Clipped surrogate objective: no gain from a ratio outside [1 - low, 1 + high] (Schulman et al., 2017, equation 7;
    with two clip ranges, Yu et al., 2025)."""
    return torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def dual_clipped(objective: Tensor, advantage: Tensor, limit: float) -> Tensor:
    """Dual-clipped objective: for negative advantages it is bounded below by limit * advantage, whatever the ratio
    (Ye et al., 2020, equation 5)."""
    return torch.where(advantage < 0, torch.max(objective, limit * advantage), objective)


def quadratic_surrogate(ratio: Tensor, advantage: Tensor, eps: float) -> Tensor:
    """Surrogate objective minus |advantage| (ratio - 1)^2 / (2 eps).  It is greatest at the ratio 1 + sign(advantage)
    eps, and its gradient leads back from ratios beyond that (Xie et al., 2025)."""
    return ratio * advantage - advantage.abs() * (ratio - 1) ** 2 / (2 * eps)


def sampled_kl(log_ratio: Tensor) -> Tensor:
    """Estimate of KL(old || new) from actions of the old policy, with l = log new - log old: exp(l) - 1 - l, which is
    unbiased and never negative (Schulman's k3, 2020)."""
    return log_ratio.expm1() - log_ratio


def reverse_kl(log_ratio: Tensor) -> Tensor:
    """Estimate of KL(new || reference) from actions of the new policy, with l = log new - log reference:
    exp(-l) - 1 + l, which is unbiased and never negative (Schulman's k3, 2020); l itself is his k1."""
    return sampled_kl(-log_ratio)


def squared_error(value: Tensor, target: Tensor, huber: float | None = None) -> Tensor:
    """Squared error, which is linear beyond an absolute error of ``huber`` if that is given (Huber, 1964)."""
    error = value - target
    if huber is None:
        return error**2
    size = error.abs()
    return torch.where(size <= huber, size**2, huber * (2 * size - huber))


def clipped_squared_error(
    value: Tensor, old_value: Tensor, target: Tensor, clip: float, huber: float | None = None
) -> Tensor:
    """The larger of the squared error and that of the value clipped to within ``clip`` of the old value (as in the PPO
    of OpenAI's baselines)."""
    held = old_value + (value - old_value).clamp(-clip, clip)
    return torch.max(squared_error(value, target, huber), squared_error(held, target, huber))


def gaussian_histogram(mean: Tensor, edges: Tensor, deviation: float) -> Tensor:
    """The chances [..., K] of the bins between edges [K + 1] under normal distributions with these means [...], clamped
    to the edges, and this standard deviation, truncated to the edges (Farebrother et al., 2024)."""
    mean = mean.clamp(edges[0], edges[-1]).unsqueeze(-1)
    below = torch.special.ndtr((edges - mean) / deviation)
    return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])
