"""Reward models: what people's choices say that a response is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from pgsuite.errors import command
from pgsuite.nn.transformer import Transformer
from pgsuite.rlhf import files
from pgsuite.rlhf.tokens import Vocabulary
from pgsuite.settings import require

FILE = "reward.pt"
Combine = Literal["mean", "minimum"]


class Judge(nn.Module):
    """A transformer, and a number read off it at the last real token.

    The number's weights are drawn from N(0, 1 / (width + 1)), its bias is zero (Stiennon et al., 2020; the code of
    Ziegler et al., 2019).
    """

    shift: Tensor

    def __init__(self, body: Transformer, generator: Generator | None = None) -> None:
        super().__init__()
        self.body, self.out = body, nn.Linear(body.size, 1)
        nn.init.normal_(self.out.weight, std=1 / math.sqrt(body.size + 1), generator=generator)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Rewards [N] of tokens [T, N], whose real cells come first in each column."""
        last = (real.sum(0) - 1).view(1, -1, 1).expand(1, -1, self.out.in_features)
        return self.out(self.body(tokens, real).gather(0, last)).view(-1) - self.shift


class RewardModel(nn.Module):
    """What a response to a prompt is worth: the mean, or the minimum, over one or more judges.

    The minimum over an ensemble is the cautious one: what is over-optimized is what judges disagree on (Coste et al.,
    2024).  Raises ValueError for another way to combine.
    """

    def __init__(self, vocabulary: Vocabulary, judges: Sequence[Judge], combine: Combine = "mean") -> None:
        super().__init__()
        require(Combine, combine, "combine")
        self.vocabulary, self.combine = vocabulary, combine
        self.judges = nn.ModuleList(judges)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str], responses: Sequence[str], batch: int = 1024) -> Tensor:
        """Rewards [N].  Raises ValueError for unknown words, and for more responses than prompts, or fewer."""
        chunks = []
        for start in range(0, len(prompts), batch):
            chosen = slice(start, start + batch)
            chunks.append(self.judge(*self.vocabulary.encode(prompts[chosen], responses[chosen])))
        return torch.cat(chunks)

    def judge(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Rewards [N] of prompts and responses as tokens [T, N]."""
        each = torch.stack([judge(tokens, real) for judge in self.judges])
        return each.mean(0) if self.combine == "mean" else each.amin(0)

    def save(self, path: Path, **facts: Any) -> None:
        """Write a file that ``load`` reads, with further facts for people.

        Raises UserError if it cannot be written.
        """
        (config, *_) = (judge.body.config for judge in self.judges if isinstance(judge, Judge))
        files.save(path, "reward model", self.vocabulary, config, self.state_dict(), facts)

    @classmethod
    def load(cls, path: str | Path, combine: Combine = "mean") -> RewardModel:
        """The model in a run directory of scripts/reward_model.py, or in a file.

        Raises UserError if there is none, and ValueError for another way to combine.
        """
        require(Combine, combine, "combine")
        vocabulary, config, state, where = files.load(path, FILE, "reward model", command("reward-model"))
        with files.fitting(where):
            members = len({name.split(".")[1] for name in state})
            model = cls(vocabulary, [Judge(Transformer(**config)) for _ in range(members)], combine)
            model.load_state_dict(state)
        return model.requires_grad_(False).eval()


@torch.no_grad()
def best_of(rewards: Tensor, n: int) -> Tensor:
    """Which of samples [P, M] with these rewards are the best of n: one of each n in turn, as indices [P, M // n].

    Raises ValueError for more than there are.
    """
    count = rewards.shape[1] // n
    if count == 0:
        raise ValueError(f"the best of {n} samples needs as many, got {rewards.shape[1]}")
    groups = rewards[:, : count * n].unflatten(1, (count, n))
    return groups.argmax(-1) + n * torch.arange(count)


def best_of_kl(n: int) -> float:
    """The KL of the best of n from the samples that it is chosen of, in nats: log n - (n - 1) / n.

    An upper bound, exact where no two samples are the same (Stiennon et al., 2020; Beirami et al., 2024).
    """
    return math.log(n) - (n - 1) / n
