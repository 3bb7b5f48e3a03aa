"""The vocabulary and the prompts of the generated corpus, for ``env.tokens`` and ``env.prompts``."""

from __future__ import annotations

from pgsuite.rlhf.grammar import Grammar
from pgsuite.rlhf.tokens import Vocabulary

DRAWN = 2_000
EVERY = 5  # one of so many distinct prompts is held out


def vocabulary() -> Vocabulary:
    return Vocabulary(Grammar().words)


def prompts() -> list[str]:
    """Training prompts: samples of the grammar, repeated as drawn, without the held-out ones."""
    apart = set(held_out())
    return [prompt for prompt in _drawn() if prompt not in apart]


def held_out() -> list[str]:
    """Held-out prompts, each once; disjoint from ``prompts``."""
    return sorted(set(_drawn()))[::EVERY]


def _drawn() -> list[str]:
    return [review.prompt for review in Grammar().sample(DRAWN, seed=0)]
