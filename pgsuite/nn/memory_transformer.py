"""A causal transformer as memory: at every step it attends to a window of past steps of the same episode.

Sequences are cut into pieces as long as the window, each of which attends to itself and to the piece before it, so that
time and memory are proportional to their length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from pgsuite.nn.layers import linear
from pgsuite.nn.recurrent import Memory
from pgsuite.nn.transformer import Block, RMSNorm, attend, rotate
from pgsuite.settings import Count


class WindowTransformer(Memory):
    """A transformer whose attention reaches back ``window`` steps in each of its ``layers``, and never beyond the start
    of the episode.

    Positions are rotary and relative to the window, which slides.  The state consists of the keys and values of the
    last ``window`` steps of the episode in every layer, before rotation, and of their number.
    Raises ValueError unless size is a multiple of twice the number of heads.
    """

    def __init__(
        self,
        inputs: int,
        size: int,
        generator: Generator | None = None,
        *,
        window: Count = 32,
        layers: Count = 1,
        heads: Count = 4,
    ) -> None:
        super().__init__()
        if size % (2 * heads):
            raise ValueError(f"recurrent_size must be a multiple of twice a transformer's {heads} heads, got {size}")
        self.size, self.window, self.width = size, window, window * layers * 2 * size + 1
        self.enter = linear(inputs, size, 1.0, generator)
        # Without an offset, the normalization before attention would leave of an observation its direction alone.
        nn.init.normal_(self.enter.bias, generator=generator)
        self.blocks = nn.ModuleList(Block(size, heads, layers, generator) for _ in range(layers))
        self.norm = RMSNorm(size)

    @property
    def label(self) -> str:
        return "transformer"

    def forward(self, x: Tensor, hidden_state: Tensor, start: Tensor) -> tuple[Tensor, Any]:
        batch = x.shape[1:-1]
        x = self.enter(x).reshape(len(x), -1, self.size).transpose(0, 1)  # [B, T, size]
        start = start.expand(*start.shape[:1], *batch).reshape(x.shape[1], -1).T
        # Where an episode begins, whatever was in the state is gone, even numbers that are not finite.
        state = torch.where(start[:, :1], 0.0, hidden_state.reshape(-1, self.width))
        past = state[:, :-1].unflatten(-1, (self.window, len(self.blocks), -1))  # [B, window, layers, 2 size]
        visible, age = self.look(start, state[:, -1:])
        kept = []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x, new = step(block, x, past[:, :, i], visible)
            kept.append(new)
        kept = torch.cat([past, torch.stack(kept, 2)], 1).flatten(2)
        return self.norm(x).transpose(0, 1).unflatten(1, batch), States(kept, age, batch)

    def look(self, start: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
        """The attention mask [B, M, Q, window + Q] of M pieces of Q steps, for episode starts [B, T] after ``age``
        [B, 1] steps of an episode; and the age [B, T] after each step, at most the window."""
        slot = torch.arange(self.window, device=start.device)
        episode = start.cumsum(1)
        past = torch.where(slot >= self.window - age, 0, -1)  # those of the episode that goes on
        own = cut(episode, self.window)
        size = own.shape[2]
        distance = torch.arange(self.window, self.window + size, device=start.device).unsqueeze(-1)
        distance = distance - torch.arange(self.window + size, device=start.device)
        near = (distance >= 0) & (distance <= self.window)
        visible = near & (own.unsqueeze(-1) == windows(past, episode).unsqueeze(-2))
        after = visible.sum(-1).flatten(1)[:, : start.shape[1]].clamp(max=self.window)
        return visible, after.to(age.dtype)


class States:
    """The states [T, *batch, width] after each step.  Indexing makes only those that are asked for: all of them would
    hold every key as often as the window is long."""

    def __init__(self, kept: Tensor, age: Tensor, batch: torch.Size) -> None:
        self.kept, self.age, self.batch = kept, age, batch  # [B, window + T, F], [B, T]

    def __getitem__(self, index: Any) -> Tensor:
        columns, horizon = self.age.shape
        window = self.kept.shape[1] - horizon
        slot = torch.arange(window, device=self.age.device)
        if isinstance(index, int):
            t = index % horizon
            age, kept = self.age[:, t : t + 1], self.kept[:, t + 1 : t + 1 + window]
            age, kept = age.unflatten(0, self.batch), kept.unflatten(0, self.batch)
        else:
            cell = torch.arange(horizon * columns, device=slot.device).view(horizon, *self.batch)[index].unsqueeze(-1)
            column, t = cell % columns, cell // columns
            age, kept = self.age[column, t], self.kept[column, t + 1 + slot]
        kept = kept.where((slot >= window - age).unsqueeze(-1), 0.0)  # nothing of an earlier episode
        return torch.cat([kept.flatten(-2), age], -1)


def step(block: Block, x: Tensor, past: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """A block's outputs [B, T, W] for x [B, T, W] and the keys and values ``past`` [B, window, 2 W] before it, and the
    keys and values [B, T, 2 W] of x.  ``visible`` is the mask that ``WindowTransformer.look`` makes."""
    window, horizon, width = past.shape[1], *x.shape[1:]
    query, new = block.project(block.attention_norm(x)).split([width, 2 * width], -1)

    def by_head(y: Tensor) -> Tensor:  # [B, M, S, W] -> [B, M, heads, S, W / heads]
        return y.unflatten(-1, (block.heads, -1)).transpose(-2, -3)

    query, (key, value) = by_head(cut(query, window)), map(by_head, windows(past, new).chunk(2, -1))
    position = torch.arange(key.shape[-2], device=x.device).unsqueeze(0)
    query, key = rotate(query, position[:, window:]), rotate(key, position)
    found = attend(query, key, value, visible.unsqueeze(2))
    return block.finish(x, found.transpose(-2, -3).flatten(-2).flatten(1, 2)[:, :horizon]), new


def cut(x: Tensor, size: int) -> Tensor:
    """x [B, T, ...] in pieces [B, M, size, ...], the last of which ends in zeros; one piece [B, 1, T, ...] if T is at
    most ``size``."""
    horizon = x.shape[1]
    if horizon <= size:
        return x.unsqueeze(1)
    if missing := -horizon % size:
        x = torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], 1)
    return x.unflatten(1, (-1, size))


def windows(past: Tensor, x: Tensor) -> Tensor:
    """The pieces of x [B, T, ...] with what is before each: [B, M, window + Q, ...], from ``past`` [B, window, ...]."""
    own = cut(x, past.shape[1])
    before = past.unsqueeze(1)
    if own.shape[1] > 1:
        before = torch.cat([before, own[:, :-1]], 1)
    return torch.cat([before, own], 2)
