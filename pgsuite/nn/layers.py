"""What networks are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor, nn

from pgsuite.types import Obs

NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride (Mnih et al., 2015)
SMALL = ((32, 3, 1), (64, 3, 1))  # for images that the above would leave nothing of


def tanh(x: Tensor) -> Tensor:
    """1 - 2 sigmoid(-2 x): on a CPU, torch's own tanh takes several times as long as its sigmoid."""
    return torch.rsub((-2 * x).sigmoid_(), 1, alpha=2)


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return tanh(x)


ACTIVATIONS = {"tanh": Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


def orthogonal(layer: nn.Linear | nn.Conv2d, gain: float, generator: Generator | None) -> None:
    """Draw weights that were never drawn before; biases are zero."""
    for name, p in list(layer.named_parameters()):  # to_empty would do, and import what takes half a second
        setattr(layer, name, nn.Parameter(torch.empty(p.shape)))
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def linear(inputs: int, outputs: int, gain: float, generator: Generator | None) -> nn.Linear:
    """Orthogonal weights of this gain, and biases of zero."""
    layer = nn.Linear(inputs, outputs, device="meta")
    orthogonal(layer, gain, generator)
    return layer


def perceptron(sizes: Sequence[int], activation: str, generator: Generator | None = None) -> nn.Sequential:
    """Linear layers of these sizes, of gain sqrt 2, each with its activation."""
    net = nn.Sequential()
    for inputs, outputs in itertools.pairwise(sizes):
        net.extend([linear(inputs, outputs, math.sqrt(2), generator), ACTIVATIONS[activation]()])
    return net


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
