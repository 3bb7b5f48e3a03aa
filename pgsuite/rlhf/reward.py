"""Reward models, trained on preferences between responses."""

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
    """A transformer with a scalar output at the last real token.

    The weights of the output layer are drawn from N(0, 1 / (width + 1)), its bias is zero (Stiennon et al., 2020; the
    code of Ziegler et al., 2019).
    """

    shift: Tensor

    def __init__(self, body: Transformer, generator: Generator | None = None) -> None:
        super().__init__()
        self.body, self.out = body, nn.Linear(body.size, 1)
        nn.init.normal_(self.out.weight, std=1 / math.sqrt(body.size + 1), generator=generator)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Rewards [N] of right-padded tokens [T, N], whose real cells are ``real`` [T, N]."""
        last = (real.sum(0) - 1).view(1, -1, 1).expand(1, -1, self.out.in_features)
        return self.out(self.body(tokens, real).gather(0, last)).view(-1) - self.shift


class RewardModel(nn.Module):
    """The reward of a response to a prompt: the mean or the minimum over an ensemble of judges.

    The minimum is conservative: it limits over-optimization where judges disagree (Coste et al., 2024).  Raises
    ValueError for another ``combine``.
    """

    def __init__(self, vocabulary: Vocabulary, judges: Sequence[Judge], combine: Combine = "mean") -> None:
        super().__init__()
        require(Combine, combine, "combine")
        self.vocabulary, self.combine = vocabulary, combine
        self.judges = nn.ModuleList(judges)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def forward(self, prompts: Sequence[str], responses: Sequence[str], batch: int = 1024) -> Tensor:
        """Rewards [N], on the model's device.  Raises ValueError for unknown words, and unless there are as many
        responses as prompts."""
        chunks = []
        for start in range(0, len(prompts), batch):
            chosen = slice(start, start + batch)
            chunks.append(self.score(*self.vocabulary.encode(prompts[chosen], responses[chosen], self.device)))
        return torch.cat(chunks)

    def score(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Rewards [N] of prompts and responses as tokens [T, N]."""
        each = torch.stack([judge(tokens, real) for judge in self.judges])
        return each.mean(0) if self.combine == "mean" else each.amin(0)

    def save(self, path: Path, **facts: Any) -> None:
        """Write a file for ``load``, with additional facts.

        Raises UserError if it cannot be written.
        """
        (config, *_) = (judge.body.config for judge in self.judges if isinstance(judge, Judge))
        files.save(path, "reward model", self.vocabulary, config, self.state_dict(), facts)

    @classmethod
    def load(cls, path: str | Path, combine: Combine = "mean") -> RewardModel:
        """Load the model of a run directory of scripts/reward_model.py, or of a file.

        Raises UserError if there is none, and ValueError for another ``combine``.
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
    """Best-of-n selection among samples with rewards [P, M]: the indices [P, M // n] of the best of each consecutive n.

    Raises ValueError if n exceeds M.
    """
    count = rewards.shape[1] // n
    if count == 0:
        raise ValueError(f"the best of {n} samples needs as many, got {rewards.shape[1]}")
    groups = rewards[:, : count * n].unflatten(1, (count, n))
    return groups.argmax(-1) + n * torch.arange(count, device=rewards.device)


def best_of_kl(n: int) -> float:
    """The KL of best-of-n sampling from the base policy, in nats: log n - (n - 1) / n.

    An upper bound, which is exact if all samples are distinct (Stiennon et al., 2020; Beirami et al., 2024).
    """
    return math.log(n) - (n - 1) / n
