"""Networks from observations [..., *O] to numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from gymnasium import spaces
from torch import Generator, Tensor, nn

from pgsuite.nn.normalize import Standardize, is_image
from pgsuite.types import ACTION_MASK, PRIVILEGED, Obs

NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride (Mnih et al., 2015)
SMALL = ((32, 3, 1), (64, 3, 1))  # for images that the above would leave nothing of


class Tanh(nn.Module):
    """tanh x = 1 - 2 sigmoid(-2 x): on a CPU, torch's own tanh takes several times as long as its sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.rsub((-2 * x).sigmoid_(), 1, alpha=2)


ACTIVATIONS = {"tanh": Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


def orthogonal(layer: nn.Linear | nn.Conv2d, gain: float, generator: Generator | None) -> None:
    """Draw weights that were never drawn before; biases are zero."""
    layer.to_empty(device="cpu")
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def mlp(sizes: Sequence[int], activation: str, last_gain: float, generator: Generator | None = None) -> nn.Sequential:
    """Linear layers of these sizes; orthogonal weights of gain sqrt 2, and last_gain for the last; zero biases."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = nn.Linear(fan_in, fan_out, device="meta")
        orthogonal(linear, last_gain if last else math.sqrt(2), generator)
        layers += [linear] if last else [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class Convolutions(nn.Module):
    """Features [..., size] of images of bytes [..., C, H, W].

    ``layers`` holds channels, kernel and stride of each; None stands for those of Mnih et al. (2015), or for smaller
    ones if an image is under 36 pixels.  Raises ValueError for an image that they are too large for.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        layers: Iterable[Sequence[int]] | None = None,
        activation: str = "relu",
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        channels, *sides = shape
        self.net = nn.Sequential()
        for layer in layers or (SMALL if min(sides) < 36 else NATURE):
            if len(layer) != 3:
                raise ValueError(f"convolutions must each be [channels, kernel, stride], got {list(layer)}")
            width, kernel, stride = layer
            if min(sides) < kernel:
                raise ValueError(
                    f"convolutions too large for images {shape}: a kernel of {kernel} meets {sides} pixels"
                )
            convolution = nn.Conv2d(channels, width, kernel, stride, device="meta")
            orthogonal(convolution, math.sqrt(2), generator)
            self.net.extend([convolution, ACTIVATIONS[activation]()])
            channels, sides = width, [(side - kernel) // stride + 1 for side in sides]
        self.size = channels * math.prod(sides)

    def forward(self, image: Tensor) -> Tensor:
        x = image.reshape(-1, *image.shape[-3:]).contiguous(memory_format=torch.channels_last)  # half the time
        x = x.to(next(self.net.parameters()).dtype) / 255
        return self.net(x).reshape(*image.shape[:-3], self.size)


class Joined(nn.Module):
    """The features of the parts of an observation, one after the other."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, obs: dict[str, Obs]) -> Tensor:
        return torch.cat([part(obs[key]) for key, part in self.parts.items()], -1)


class Network(nn.Module):
    """``size`` numbers [..., size] about each observation: what may be seen of it is standardized, images go through
    convolutions, and all that through a multilayer perceptron.

    With ``privileged`` it sees the part of the observations that is for the critic, where they have one; without, the
    rest.  ``obs_norm`` may be shared with other networks.
    """

    def __init__(
        self,
        obs_norm: Standardize,
        size: int,
        *,
        privileged: bool,
        last_gain: float,
        hidden: Sequence[int],
        activation: str,
        convolutions: Iterable[Sequence[int]] | None,
        generator: Generator | None,
    ) -> None:
        super().__init__()

        def encoder(space: spaces.Space[Any]) -> tuple[nn.Module, int]:
            if isinstance(space, spaces.Dict):
                parts, sizes = zip(*map(encoder, space.values()), strict=True)
                return Joined(dict(zip(space, parts, strict=True))), sum(sizes)
            if is_image(space):
                net = Convolutions(space.shape or (), convolutions, activation, generator)
                return net, net.size
            return nn.Identity(), math.prod(space.shape or ())

        space, self.keys = obs_norm.space, None
        if isinstance(space, spaces.Dict):
            privileged = privileged and PRIVILEGED in space.spaces
            self.keys = [key for key in space if key != ACTION_MASK and (key == PRIVILEGED) == privileged]
            space = spaces.Dict({key: space[key] for key in self.keys})
        self.obs_norm = obs_norm
        self.encoder, features = encoder(space)
        self.net = mlp((features, *hidden, size), activation, last_gain, generator)
        images = ["x".join(map(str, m.shape)) + " > " for m in self.encoder.modules() if isinstance(m, Convolutions)]
        self.shape = "".join(images) + "-".join(map(str, (features, *hidden, size)))  # for people

    def read(self, obs: Obs) -> Tensor:
        if self.keys is not None:
            obs = {key: obs[key] for key in self.keys}
        return self.net(self.encoder(self.obs_norm(obs)))
