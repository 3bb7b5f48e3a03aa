"""Preferences between pairs of responses to the same prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from pgsuite.errors import UserError, command
from pgsuite.files import write_text
from pgsuite.rlhf.model import WordModel
from pgsuite.rlhf.tokens import Vocabulary

Scorer = Callable[[Sequence[str], Sequence[str]], Tensor]  # of prompts and responses, [N]


@dataclass(frozen=True)
class Preference:
    """A prompt with a preferred and a rejected response."""

    prompt: str
    chosen: str
    rejected: str
    probability: float | None = None  # of this choice, if known


def compare(
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    scorer: Scorer,
    noise: float,
    generator: Generator,
) -> list[Preference]:
    """Sample preferences between two responses to each prompt by the model of Bradley and Terry (1952):
    P(first) = sigmoid((score(first) - score(second)) / noise)."""
    p = ((scorer(prompts, first) - scorer(prompts, second)) / noise).sigmoid().cpu()
    wins = torch.rand(len(p), generator=generator, device=generator.device).cpu() < p
    rows = zip(prompts, first, second, p.tolist(), wins.tolist(), strict=True)
    return [Preference(q, a, b, x) if won else Preference(q, b, a, 1 - x) for q, a, b, x, won in rows]


def collect(
    model: WordModel, prompts: Sequence[str], scorer: Scorer, noise: float, generator: Generator, batch: int = 1000
) -> list[Preference]:
    """Sample preferences between two responses of the model to each prompt."""
    found: list[Preference] = []
    for start in range(0, len(prompts), batch):
        asked = prompts[start : start + batch]
        first, second = (model.generate(asked, generator) for _ in range(2))
        found += compare(asked, first, second, scorer, noise, generator)
    return found


def save(preferences: Sequence[Preference], path: Path) -> None:
    """Write one preference per line, as JSON."""
    write_text(path, "".join(json.dumps(asdict(each)) + "\n" for each in preferences))


def load(path: Path, vocabulary: Vocabulary | None = None) -> list[Preference]:
    """Load preferences: lines of JSON with prompt, chosen and rejected.

    Raises UserError if the file is missing or empty, and, with the number of the line, for an invalid line or for words
    outside the given vocabulary.
    """
    if not path.is_file():
        raise UserError(f"no preferences at {path}: {command('reward-model')} makes some")
    found: list[Preference] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            each = Preference(**json.loads(line))
            words = (each.prompt, each.chosen, each.rejected)
            if not all(isinstance(x, str) for x in words) or not isinstance(each.probability, float | int | None):
                raise TypeError
        except (TypeError, ValueError) as error:
            wanted = '{"prompt": "...", "chosen": "...", "rejected": "..."}'
            raise UserError(f"line {number} of {path} is no preference: it must be {wanted}") from error
        try:
            if vocabulary is not None:
                vocabulary.encode([each.prompt], [f"{each.chosen} {each.rejected}"])
        except ValueError as error:
            raise UserError(f"line {number} of {path}: {error}") from error
        found.append(each)
    if not found:
        raise UserError(f"{path} is empty")
    return found
