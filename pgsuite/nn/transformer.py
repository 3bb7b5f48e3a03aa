"""Causal transformers over columns of tokens [T, N].

Attention is written out in plain operations, as recurrences are: fused kernels give neither second derivatives nor
forward-mode ones, and trust regions need them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import gelu

from pgsuite.nn.layers import linear
from pgsuite.types import HiddenState

SEEN = "seen"  # [N, S] bool, which tokens of the cache there are to attend to


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def rotate(x: Tensor, position: Tensor, base: float = 10_000.0) -> Tensor:
    """x [N, H, T, D] turned by the angles of its positions [N, T], so that products of two know only how far apart they
    are (Su et al., 2021, equation 34)."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angle = (position.to(x.dtype).unsqueeze(-1) * rates).unsqueeze(1)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """Attention, then a perceptron, each on what is normalized and added to what is not (pre-norm: Xiong et al.,
    2020)."""

    def __init__(self, width: int, heads: int, depth: int, generator: Generator | None) -> None:
        super().__init__()
        quiet = 1 / math.sqrt(2 * depth)  # of what is added, so that all blocks together add one (Radford et al., 2019)
        self.heads = heads
        self.attention_norm, self.norm = RMSNorm(width), RMSNorm(width)
        self.project = linear(width, 3 * width, 1.0, generator)
        self.merge = linear(width, width, quiet, generator)
        self.expand = linear(width, 4 * width, 1.0, generator)
        self.contract = linear(4 * width, width, quiet, generator)

    def forward(
        self, x: Tensor, position: Tensor, visible: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [N, T, W] after the block, and keys and values [N, H, S + T, D] after it; ``visible`` [N, T, S + T] says
        which of them each position attends to."""
        n, t, width = x.shape
        parts = self.project(self.attention_norm(x)).view(n, t, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        query, key = rotate(query, position), rotate(key, position)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        score = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weight = score.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1)
        x = x + self.merge((weight @ value).transpose(1, 2).reshape(n, t, width))
        return x + self.contract(gelu(self.expand(self.norm(x)))), (key, value)


class Transformer(nn.Module):
    """``width`` features of each token, given those before it.

    Rotary positions, which count the real tokens of a column; no dropout, so that a policy that learns is the policy
    that acted.  Raises ValueError where heads do not divide the width into even parts.
    """

    def __init__(
        self, vocabulary: int, width: int = 64, layers: int = 2, heads: int = 4, generator: Generator | None = None
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"a transformer's width must be a multiple of twice its {heads} heads, got {width}")
        self.vocabulary, self.size = vocabulary, width
        self.config = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads}
        self.embed = nn.Embedding(vocabulary, width, device="meta").to_empty(device="cpu")
        nn.init.normal_(self.embed.weight, generator=generator)
        self.blocks = nn.ModuleList(Block(width, heads, layers, generator) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.shape = f"{vocabulary} > transformer {width} x {layers}"  # for people

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """Features [T, N, width] of tokens [T, N], one text a column; those that are not ``real`` [T, N] are not
        attended to, and their own features mean nothing."""
        return self.forward_with_cache(tokens, torch.ones_like(tokens, dtype=torch.bool) if real is None else real, {})[
            0
        ]

    def forward_with_cache(self, tokens: Tensor, real: Tensor, cache: HiddenState) -> tuple[Tensor, HiddenState]:
        """Features [T, N, width] of tokens [T, N] that go on where a cache ends, and the cache after them: keys and
        values [N, heads, S, width / heads] of each layer, and which of them are real, ``seen`` [N, S].  An empty
        dictionary is the cache of having seen nothing."""
        real = real.T
        seen, position, visible = look(real, cache)
        after, x = {SEEN: seen}, self.embed(tokens.T)
        for i, block in enumerate(self.blocks):
            past = (cache[f"{i}.key"], cache[f"{i}.value"]) if cache else None
            x, (after[f"{i}.key"], after[f"{i}.value"]) = block(x, position, visible, past)
        return self.norm(x).transpose(0, 1), after


def look(real: Tensor, cache: HiddenState) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens there are after ``real`` [N, T] more than the cache holds, [N, S + T]; the position of the new ones
    among the real ones [N, T]; and which each of them attends to [N, T, S + T]: those before it that are real, and
    itself, for padding must attend to something."""
    past = cache[SEEN] if cache else real[:, :0]
    seen = torch.cat([past, real], 1)
    position = past.sum(1, keepdim=True) + real.cumsum(1) - 1
    new, column = torch.arange(real.shape[1], device=real.device), torch.arange(seen.shape[1], device=real.device)
    own = (new + past.shape[1]).unsqueeze(-1)
    return seen, position, ((column <= own) & seen.unsqueeze(1)) | (column == own)


class LanguageModel(nn.Module):
    """Logits [T, N, vocabulary] of the token after each, from a transformer's features."""

    def __init__(self, body: Transformer, generator: Generator | None = None) -> None:
        super().__init__()
        self.body = body
        self.out = linear(body.size, body.vocabulary, 0.01, generator)

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        return self.out(self.body(tokens, real))

    def save(self, path: Path, **facts: Any) -> None:
        """Write what ``load`` reads, and with it facts that are tensors, numbers, words or nests of them."""
        torch.save({"model": self.body.config, "state": self.state_dict()} | facts, path)

    @classmethod
    def load(cls, path: Path) -> LanguageModel:
        """What ``save`` wrote; nothing in the file is executed.  Raises ValueError for anything else."""
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            model = cls(Transformer(**found["model"]))
            model.load_state_dict(found["state"])
        except FileNotFoundError:
            raise ValueError(f"no language model at {path}") from None
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is no language model that this suite saved: {reason}") from error
        return model
