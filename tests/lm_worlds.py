"""Languages small enough to know everything about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgsuite import seeding
from pgsuite.algorithms import Algorithm
from pgsuite.algorithms.reference import Reference
from pgsuite.nn.policy import Critic, Policy
from pgsuite.nn.transformer import LanguageModel, Transformer
from pgsuite.rlhf.env import LanguageEnv
from pgsuite.rlhf.generation import GenerationCollector
from pgsuite.rlhf.policy import language_policy

WORDS = "abcdefgh"


class Letters:
    """Each letter is a token; ``|`` is the stop token, and ``_`` padding where there is room for it."""

    def __init__(self, letters: str = WORDS, *, padding: bool = True) -> None:
        self.letters = "|" + letters + "_" * padding
        self.stop, self.pad = 0, len(self.letters) - 1

    def __len__(self) -> int:
        return len(self.letters)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        rows = [[self.letters.index(x) for x in text] + [self.pad] * (width - len(text)) for text in prompts]
        real = [[True] * len(text) + [False] * (width - len(text)) for text in prompts]
        return torch.tensor(rows).T, torch.tensor(real).T

    def decode(self, tokens: Tensor) -> list[str]:
        texts = ("".join(self.letters[x] for x in column) for column in tokens.T.tolist())
        return [text.partition("|")[0].replace("_", "") for text in texts]


def vowels(prompts: list[str], responses: list[str]) -> Tensor:
    """One for each a or e that the prompt does not have."""
    pairs = zip(prompts, responses, strict=True)
    return torch.tensor([float(sum(x in "ae" and x not in prompt for x in text)) for prompt, text in pairs])


def world(num_envs: int = 16, **options: Any) -> LanguageEnv:
    options = {"length": 5, "seed": 1} | options
    return LanguageEnv(["b", "cde", "gh", "fab"], Letters(), [vowels], num_envs=num_envs, **options)


def speaker(size: int, seed: int = 0, width: int = 16, layers: int = 2, **options: Any) -> Policy:
    """A policy that says something, each token with a probability of its own."""
    generator = torch.Generator().manual_seed(seed)
    model = LanguageModel(Transformer(size, width, layers, 2, generator), generator)
    with torch.no_grad():
        model.out.weight.normal_(0, 0.3, generator=generator)
    return language_policy(model.body, model.out, **options)


def build(
    cls: type[Algorithm],
    env: LanguageEnv,
    *,
    seed: int = 0,
    coef: float | None = None,
    penalty: Any = "reward",
    target: float | None = None,
    shared: bool = True,
    look: dict[str, Any] | None = None,
    **fields: Any,
) -> Any:
    """An algorithm that begins with a speaker."""
    policy = speaker(len(env.tokens), seed, **look or {})
    generator = seeding.generator(seed, "algorithm")
    body = None if shared else policy.body.another("critic")  # pyright: ignore[reportCallIssue]
    critic = Critic(policy.obs_norm, shared=policy if shared else None, body=body, generator=generator)
    reference = None if coef is None else Reference(policy, coef, penalty=penalty, target=target)
    parts: Any = {"policy": policy, "critic": critic, "reference": reference, "generator": generator}
    return cls(**parts | {"gamma": 1.0} | fields)


def collector(env: LanguageEnv, seed: int = 0) -> GenerationCollector:
    return GenerationCollector(env, env.max_episode_steps, seed)
