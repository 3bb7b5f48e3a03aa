"""What of the corpus an environment asks for by name: its words, and openings to go on with."""

from __future__ import annotations

from pgsuite.rlhf.grammar import Grammar
from pgsuite.rlhf.tokens import Vocabulary

DRAWN = 2_000
EVERY = 5  # one opening in so many is held out


def vocabulary() -> Vocabulary:
    return Vocabulary(Grammar().words)


def prompts() -> list[str]:
    """Openings as often as the grammar draws them, without those that are held out."""
    apart = set(held_out())
    return [prompt for prompt in _drawn() if prompt not in apart]


def held_out() -> list[str]:
    """Some openings, each once, that ``prompts`` has none of."""
    return sorted(set(_drawn()))[::EVERY]


def _drawn() -> list[str]:
    return [review.prompt for review in Grammar().sample(DRAWN, seed=0)]
