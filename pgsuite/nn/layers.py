"""Layers and their initialization."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import conv2d

from pgsuite.types import Obs

NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride (Mnih et al., 2015)
SMALL = ((32, 3, 1), (64, 3, 1))  # for images too small for NATURE
Norm = Literal["none", "layer"]
Block = Literal["plain", "residual"]
SCREEN = 36  # pixels of the shorter side from which on NATURE fits


def tanh(x: Tensor) -> Tensor:
    """1 - 2 sigmoid(-2 x): on a CPU, torch's own tanh takes several times as long as its sigmoid."""
    return torch.rsub((-2 * x).sigmoid_(), 1, alpha=2)


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return tanh(x)


ACTIVATIONS = {"tanh": Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


def orthogonal(layer: nn.Linear | nn.Conv2d, gain: float, generator: Generator | None) -> None:
    """Initialize a layer on the meta device with orthogonal weights and zero biases."""
    for name, p in list(layer.named_parameters()):  # to_empty would trigger an import of half a second
        setattr(layer, name, nn.Parameter(torch.empty(p.shape)))
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def linear(inputs: int, outputs: int, gain: float, generator: Generator | None) -> nn.Linear:
    """A linear layer with orthogonal weights of this gain and zero biases."""
    layer = nn.Linear(inputs, outputs, device="meta")
    orthogonal(layer, gain, generator)
    return layer


def perceptron(
    sizes: Sequence[int], activation: str, generator: Generator | None = None, *, norm: Norm = "none"
) -> nn.Sequential:
    """A multilayer perceptron with an activation after every layer, and if so chosen a normalization before it (Ba et
    al., 2016); weights have gain sqrt 2."""
    net = nn.Sequential()
    for inputs, outputs in itertools.pairwise(sizes):
        layer = linear(inputs, outputs, math.sqrt(2), generator)
        net.extend([layer, *normalization(norm, outputs), ACTIVATIONS[activation]()])
    return net


def normalization(norm: Norm, size: int) -> list[nn.Module]:
    """The layers that normalize features [..., size]: one or none."""
    return [nn.LayerNorm(size)] if norm == "layer" else []


class ResidualBlock(nn.Module):
    """Adds to its input a perceptron of it, whose hidden layer is four times as wide, with normalization of what goes
    in (SimBa; Lee et al., 2025)."""

    def __init__(self, size: int, activation: str, generator: Generator | None, norm: Norm) -> None:
        super().__init__()
        expand, contract = (linear(*sizes, math.sqrt(2), generator) for sizes in ((size, 4 * size), (4 * size, size)))
        self.net = nn.Sequential(*normalization(norm, size), expand, ACTIVATIONS[activation](), contract)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def residual(
    sizes: Sequence[int], activation: str, generator: Generator | None = None, *, norm: Norm = "none"
) -> nn.Sequential:
    """A linear layer to the width of the blocks, a residual block for each size after the first, which are equal, and a
    normalization at the end (SimBa; Lee et al., 2025)."""
    inputs, *widths = sizes
    net = nn.Sequential()
    if widths:
        net.append(linear(inputs, widths[0], 1.0, generator))
        net.extend([ResidualBlock(width, activation, generator, norm) for width in widths])
        net.extend(normalization(norm, widths[0]))
    return net


BLOCKS = {"plain": perceptron, "residual": residual}


class Convolutions(nn.Module):
    """Convolutional features [..., size] of images [..., C, H, W], of bytes or standardized.

    ``layers`` are channels, kernel and stride of each layer; None chooses those of Mnih et al. (2015), or two smaller
    layers for images below 36 pixels.  Raises ValueError for an image smaller than a kernel.
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
        for layer in layers or (SMALL if min(sides) < SCREEN else NATURE):
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
        first, *rest = self.net
        assert isinstance(first, nn.Conv2d)
        x = image.reshape(-1, *image.shape[-3:]).contiguous(memory_format=torch.channels_last)  # twice as fast
        # Weights are divided by 255 in place of every pixel of bytes.
        weight = first.weight / 255 if x.dtype is torch.uint8 else first.weight
        x = conv2d(x.to(weight.dtype), weight, first.bias, first.stride)
        for layer in rest:
            x = layer(x)
        return x.reshape(*image.shape[:-3], self.size)


class Joined(nn.Module):
    """The concatenated features of the entries of a dictionary observation."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, obs: dict[str, Obs]) -> Tensor:
        return torch.cat([part(obs[key]) for key, part in self.parts.items()], -1)
