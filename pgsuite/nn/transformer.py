"""Causal transformers over columns of tokens [T, N].

Attention is written in elementary operations: fused kernels support neither second derivatives nor forward mode, which
trust regions need.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import gelu

from pgsuite.nn.layers import linear
from pgsuite.trust import check_archive
from pgsuite.types import HiddenState

SEEN = "seen"  # [N, S] bool, real tokens of the cache, which are attended to


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def rotate(x: Tensor, position: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding of x [N, H, T, D] at positions [N, T]: inner products of queries and keys depend on
    relative positions only (Su et al., 2021, equation 34)."""
    half = x.shape[-1] // 2
    exact = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has no room for positions beyond 256
    rates = base ** (-torch.arange(half, dtype=exact, device=x.device) / half)
    angle = (position.to(exact).unsqueeze(-1) * rates).unsqueeze(1)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Attention [..., T, D] of queries [..., T, D] to keys and values [..., S, D], where ``visible`` [..., T, S]
    (Vaswani et al., 2017, equation 1)."""
    score = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return score.masked_fill(~visible, -torch.inf).softmax(-1) @ value


class Block(nn.Module):
    """A transformer block: attention and a perceptron, both with pre-normalization and a residual connection (Xiong et
    al., 2020)."""

    def __init__(self, width: int, heads: int, depth: int, generator: Generator | None) -> None:
        super().__init__()
        quiet = 1 / math.sqrt(2 * depth)  # gain of the residual branches (Radford et al., 2019)
        self.heads = heads
        self.attention_norm, self.norm = RMSNorm(width), RMSNorm(width)
        self.project = linear(width, 3 * width, 1.0, generator)
        self.merge = linear(width, width, quiet, generator)
        self.expand = linear(width, 4 * width, 1.0, generator)
        self.contract = linear(4 * width, width, quiet, generator)

    def forward(
        self, x: Tensor, position: Tensor, visible: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output [N, T, W] for x [N, T, W], and the keys and values [N, H, S + T, D] including the ``past`` ones.
        ``visible`` [N, T, S + T] is the attention mask."""
        n, t, width = x.shape
        parts = self.project(self.attention_norm(x)).view(n, t, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        query, key = rotate(query, position), rotate(key, position)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        found = attend(query, key, value, visible.unsqueeze(1))
        return self.finish(x, found.transpose(1, 2).reshape(n, t, width)), (key, value)

    def finish(self, x: Tensor, found: Tensor) -> Tensor:
        """The output [..., W] for x [..., W], of which attention ``found`` [..., W]."""
        x = x + self.merge(found)
        return x + self.contract(gelu(self.expand(self.norm(x))))


class Transformer(nn.Module):
    """A causal transformer: ``width`` features of each token, given the preceding ones.

    Positions are rotary and count the real tokens of a column.  There is no dropout, so that the importance ratio is
    one before the first update.  Raises ValueError unless width is a multiple of twice the number of heads.
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
        self.shape = f"{vocabulary} > transformer {width} x {layers}"  # for display

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """Features [T, N, width] of tokens [T, N], one text per column.  Tokens that are not ``real`` [T, N] are not
        attended to, and their own features are meaningless."""
        return self.forward_with_cache(tokens, torch.ones_like(tokens, dtype=torch.bool) if real is None else real, {})[
            0
        ]

    def forward_with_cache(self, tokens: Tensor, real: Tensor, cache: HiddenState) -> tuple[Tensor, HiddenState]:
        """Features [T, N, width] of tokens [T, N] that follow the tokens of a cache, and the extended cache: keys and
        values [N, heads, S, width / heads] of each layer, and the mask of real tokens, ``seen`` [N, S].  The initial
        cache is an empty dictionary."""
        real = real.T
        seen, position, visible = look(real, cache)
        after, x = {SEEN: seen}, self.embed(tokens.T)
        for i, block in enumerate(self.blocks):
            past = (cache[f"{i}.key"], cache[f"{i}.value"]) if cache else None
            x, (after[f"{i}.key"], after[f"{i}.value"]) = block(x, position, visible, past)
        return self.norm(x).transpose(0, 1), after


def look(real: Tensor, cache: HiddenState) -> tuple[Tensor, Tensor, Tensor]:
    """Masks and positions for new tokens, whose mask of real ones is ``real`` [N, T], after those of the cache.

    Returns the mask of real tokens [N, S + T], the positions of the new tokens among the real ones [N, T], and the
    attention mask [N, T, S + T]: each token attends to the real tokens before it, and to itself, since padding must
    attend to something.
    """
    past = cache[SEEN] if cache else real[:, :0]
    seen = torch.cat([past, real], 1)
    position = past.sum(1, keepdim=True) + real.cumsum(1) - 1
    new, column = torch.arange(real.shape[1], device=real.device), torch.arange(seen.shape[1], device=real.device)
    own = (new + past.shape[1]).unsqueeze(-1)
    return seen, position, ((column <= own) & seen.unsqueeze(1)) | (column == own)


class LanguageModel(nn.Module):
    """A causal language model: logits [T, N, vocabulary] of each next token."""

    def __init__(self, body: Transformer, generator: Generator | None = None) -> None:
        super().__init__()
        self.body = body
        self.out = linear(body.size, body.vocabulary, 0.01, generator)

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        return self.out(self.body(tokens, real))

    def save(self, path: Path, **facts: Any) -> None:
        """Write a file for ``load``, with additional facts: tensors, numbers, strings, or nests of them."""
        torch.save({"model": self.body.config, "state": self.state_dict()} | facts, path)

    @classmethod
    def load(cls, path: Path) -> LanguageModel:
        """Load a file of ``save``, without executing code.  Raises ValueError for any other file."""
        try:
            check_archive(path)
            found = torch.load(path, map_location="cpu", weights_only=True)
            model = cls(Transformer(**found["model"]))
            model.load_state_dict(found["state"])
        except FileNotFoundError:
            raise ValueError(f"no language model at {path}") from None
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is no language model that this suite saved: {reason}") from error
        return model
