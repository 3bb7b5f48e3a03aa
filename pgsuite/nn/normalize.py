"""Running statistics.  They stay frozen while a rollout is collected and learned from: ``update`` alone moves them."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from pgsuite import distributed
from pgsuite.types import ACTION_MASK, Obs, moments


class RunningMoments(nn.Module):
    """Mean and variance of everything ``update`` has seen, over all processes (Chan et al., 1979)."""

    mean: Tensor
    var: Tensor
    scale: Tensor  # one over the deviation
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor) -> None:
        """Take in x [..., *shape] where mask [...] is true."""
        weight = mask.reshape(-1, *[1] * self.mean.ndim)
        x = x.reshape(-1, *self.mean.shape).where(weight, 0.0)
        n = distributed.total(mask.sum().double())
        mean = distributed.total(x.sum(0)) / n.clamp(min=1.0)
        var = distributed.total(((x - mean) ** 2).where(weight, 0.0).sum(0)) / n.clamp(min=1.0)
        total, delta = self.count + n, mean - self.mean
        self.var.copy_((self.var * self.count + var * n + delta**2 * self.count * n / total) / total)
        self.scale.copy_((self.var + 1e-8).rsqrt())
        self.mean.add_(delta * n / total)
        self.count.copy_(total)


def is_image(space: spaces.Space[Any]) -> bool:
    """Bytes [C, H, W]."""
    return isinstance(space, spaces.Box) and space.dtype == "uint8" and len(space.shape) == 3


class Standardize(nn.Module):
    """Observations of a space with running mean and deviation taken out of its vectors, clipped to +-clip if that is
    given; images stay as they are, and so does everything if not ``enabled``."""

    def __init__(self, space: spaces.Space[Any], clip: float | None = 10.0, enabled: bool = True) -> None:
        super().__init__()
        self.space, self.clip, self.moments = space, clip, None
        if isinstance(space, spaces.Dict):
            parts = {key: Standardize(part, clip, enabled) for key, part in space.items() if key != ACTION_MASK}
            self.parts = nn.ModuleDict(parts)
        elif enabled and not is_image(space):
            self.moments = RunningMoments(space.shape or ())

    def forward(self, obs: Obs) -> Obs:
        if isinstance(obs, dict):
            return {key: self.parts[key](x) for key, x in obs.items()}
        if self.moments is None:
            return obs
        return clip_to((obs - self.moments.mean) * self.moments.scale, self.clip)

    def update(self, obs: Obs, mask: Tensor) -> None:
        """Take in observations [..., *O] where mask [...] is true."""
        if isinstance(obs, dict):
            for key, part in self.parts.items():
                assert isinstance(part, Standardize)
                part.update(obs[key], mask)
        elif self.moments is not None:
            self.moments.update(obs, mask)


def clip_to(x: Tensor, clip: float | None) -> Tensor:
    """x, clamped to +-clip if that is given."""
    return x if clip is None else x.clamp(-clip, clip)


class RewardScale(nn.Module):
    """Rewards [T, N] over the running deviation of their discounted sums, so that returns have unit scale.

    The sum of each environment runs on from rollout to rollout and starts afresh with each episode.  Nothing is
    subtracted from the rewards, since that would change the task (Engstrom et al., 2020, section 3).
    """

    discounted_return: Tensor  # [N], of the episodes that are under way

    def __init__(self, num_envs: int, clip: float | None = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.moments = RunningMoments()
        self.register_buffer("discounted_return", torch.zeros(num_envs))

    def forward(self, reward: Tensor, mask: Tensor) -> Tensor:
        return clip_to(reward * self.moments.scale, self.clip)

    @torch.no_grad()
    def update(self, reward: Tensor, start: Tensor, mask: Tensor, gamma: float) -> None:
        """Take in a rollout's rewards, episode starts and mask, each [T, N], discounted by gamma."""
        decay, sums, sofar = gamma * (~start).to(reward.dtype), torch.empty_like(reward), self.discounted_return
        for new, kept, total in zip(reward, decay, sums, strict=True):
            sofar = torch.addcmul(new, kept, sofar, out=total)
        self.discounted_return.copy_(sofar)
        self.moments.update(sums, mask)


class WhitenReward(RewardScale):
    """Rewards [T, N] of unit deviation in each rollout by itself, around the mean that they have (Ziegler et al., 2019,
    whose code calls it whitening without a shift of the mean)."""

    def forward(self, reward: Tensor, mask: Tensor) -> Tensor:
        mean, variance = moments(reward, mask)
        return clip_to((mean + (reward - mean) * (variance + 1e-8).rsqrt()).where(mask, 0.0), self.clip)

    def update(self, reward: Tensor, start: Tensor, mask: Tensor, gamma: float) -> None:
        """Nothing: each rollout is measured by itself."""
