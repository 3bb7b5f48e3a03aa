"""Running statistics, which only ``update`` changes."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from pgsuite import distributed
from pgsuite.functional.estimators import scan
from pgsuite.nn.layers import SCREEN
from pgsuite.types import ACTION_MASK, Obs, moments


class RunningMoments(nn.Module):
    """Running mean and variance of all inputs of ``update`` over all processes, in float64 (Chan et al., 1979).

    Until the first update the mean is zero and the variance one.  Float32 cannot hold a large mean to a fraction of a
    small deviation, so ``standardize`` subtracts the mean in two parts.
    """

    mean: Tensor
    var: Tensor
    count: Tensor  # inputs so far
    center: Tensor  # the mean in the precision of the network
    shift: Tensor  # what is left of the mean, in negative standard deviations
    scale: Tensor  # reciprocal of the standard deviation; one where that is zero

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        for name, value in {"mean": torch.zeros(shape), "var": torch.ones(shape), "count": torch.zeros(())}.items():
            self.register_buffer(name, value.double())
        for name, value in {"center": torch.zeros, "shift": torch.zeros, "scale": torch.ones}.items():
            self.register_buffer(name, value(shape))

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor) -> None:
        """Include x [..., *shape] where mask [...] is true."""
        weight = mask.reshape(-1, *[1] * self.mean.ndim)
        x = x.reshape(-1, *self.mean.shape).to(self.mean.dtype).where(weight, 0.0)
        n = distributed.total(mask.sum().double())
        mean = distributed.total(x.sum(0)) / n.clamp(min=1.0)
        var = distributed.total(((x - mean) ** 2).where(weight, 0.0).sum(0)) / n.clamp(min=1.0)
        total = self.count + n
        share, delta = n / total.clamp(min=1.0), mean - self.mean
        self.var.add_(share * (var - self.var + delta**2 * (1 - share)))
        self.mean.add_(share * delta)
        self.count.copy_(total)
        self.center.copy_(self.mean)
        self.scale.copy_(torch.where(self.var > 0, self.var, 1.0).rsqrt())
        self.shift.copy_((self.center - self.mean) * self.scale)

    def standardize(self, x: Tensor) -> Tensor:
        """x [..., *shape] minus the mean, divided by the standard deviation."""
        return torch.addcmul(self.shift, x - self.center, self.scale)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of ``standardize``."""
        return (x - self.shift) / self.scale + self.center


def is_image(space: spaces.Space[Any]) -> bool:
    """Whether observations are byte images [C, H, W]."""
    return isinstance(space, spaces.Box) and space.dtype == "uint8" and len(space.shape) == 3


def is_screen(space: spaces.Space[Any]) -> bool:
    """Whether observations are byte images [C, H, W] of a screen or camera: at least 36 pixels high and wide."""
    return is_image(space) and min((space.shape or ())[1:]) >= SCREEN


class Standardize(nn.Module):
    """Standardization of observations by running mean and standard deviation, clipped to +-clip if that is given.

    Images of at least 36 pixels are unchanged, and so is everything if not ``enabled``.  The bytes of smaller ones,
    such as MiniGrid's, are codes of what is in a cell, far below 255.
    """

    def __init__(self, space: spaces.Space[Any], clip: float | None = 10.0, enabled: bool = True) -> None:
        super().__init__()
        self.space, self.clip, self.moments = space, clip, None
        if isinstance(space, spaces.Dict):
            parts = {key: Standardize(part, clip, enabled) for key, part in space.items() if key != ACTION_MASK}
            self.parts = nn.ModuleDict(parts)
        else:
            shape = space.shape or ()
            self.moments = RunningMoments(shape) if enabled and not is_screen(space) else None

    def forward(self, obs: Obs) -> Obs:
        if isinstance(obs, dict):
            return {key: self.parts[key](x) for key, x in obs.items()}
        if self.moments is None:
            return obs
        return clip_to(self.moments.standardize(obs), self.clip)

    def update(self, obs: Obs, mask: Tensor) -> None:
        """Include observations [..., *O] where mask [...] is true in the statistics."""
        if isinstance(obs, dict):
            for key, part in self.parts.items():
                assert isinstance(part, Standardize)
                part.update(obs[key], mask)
        elif self.moments is not None:
            self.moments.update(obs, mask)


def clip_to(x: Tensor, clip: float | None) -> Tensor:
    """Clamp x to +-clip if that is given."""
    return x if clip is None else x.clamp(-clip, clip)


class RewardScale(nn.Module):
    """Rewards [T, N] divided by the running standard deviation of discounted sums of rewards, so that returns have unit
    scale.

    The sum of each environment continues across rollouts and restarts with each episode.  No mean is subtracted, since
    that would change the optimal policy (Engstrom et al., 2020, section 3).  A rollout is included before it is scaled,
    so that multiplying all rewards by a constant changes nothing.
    """

    discounted_return: Tensor  # [N], of the current episodes

    def __init__(self, num_envs: int, clip: float | None = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.moments = RunningMoments()
        self.register_buffer("discounted_return", torch.zeros(num_envs))

    def forward(self, reward: Tensor, mask: Tensor) -> Tensor:
        return clip_to(reward * self.moments.scale, self.clip)

    @torch.no_grad()
    def update(self, reward: Tensor, start: Tensor, mask: Tensor, gamma: float) -> None:
        """Include a rollout's rewards, with episode starts and mask, each [T, N], discounted by gamma."""
        sums = scan(reward, gamma * (~start).to(reward.dtype), self.discounted_return)
        self.discounted_return.copy_(sums[-1])
        self.moments.update(sums, mask)


class ClipReward(RewardScale):
    """Rewards [T, N] as they are, clipped."""

    def forward(self, reward: Tensor, mask: Tensor) -> Tensor:
        return clip_to(reward, self.clip)

    def update(self, reward: Tensor, start: Tensor, mask: Tensor, gamma: float) -> None:
        """Do nothing: there are no statistics."""


class WhitenReward(RewardScale):
    """Rewards [T, N] scaled to unit standard deviation within each rollout, with their mean unchanged (Ziegler et al.,
    2019: whitening without shift of the mean)."""

    def forward(self, reward: Tensor, mask: Tensor) -> Tensor:
        mean, variance = moments(reward, mask)
        scale = torch.where(variance > 0, variance, 1.0).rsqrt()
        return clip_to((mean + (reward - mean) * scale).where(mask, 0.0), self.clip)

    def update(self, reward: Tensor, start: Tensor, mask: Tensor, gamma: float) -> None:
        """Do nothing: each rollout is whitened by its own statistics."""
