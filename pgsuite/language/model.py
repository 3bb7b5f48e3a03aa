"""A language model that knows its words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from pgsuite.language import files
from pgsuite.language.tokens import BEGIN, PAD, STOP, Vocabulary, pad
from pgsuite.nn.transformer import LanguageModel, Transformer
from pgsuite.types import Memory

FILE = "model.pt"
LONGEST = 32  # tokens of a response, STOP with them; the corpus has none over 24


class WordModel(LanguageModel):
    """The probability of every text over a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, body: Transformer, generator: Generator | None = None) -> None:
        super().__init__(body, generator)
        self.vocabulary = vocabulary

    def log_probability(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Of each token of tokens [T, N] but the first, given those before it [T - 1, N]; 0 where it is not real."""
        logp = self(tokens[:-1], real[:-1]).log_softmax(-1)
        return logp.gather(-1, tokens[1:].unsqueeze(-1)).squeeze(-1).where(real[1:], 0.0)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], generator: Generator, longest: int = LONGEST) -> list[str]:
        """A response to each prompt, drawn from the model, of at most so many tokens.

        Raises ValueError for unknown words.
        """
        rows = [[BEGIN, *self.vocabulary.numbers_of(prompt)] for prompt in prompts]
        tokens, _ = pad([[*row, *[PAD] * longest] for row in rows])
        place, lengths = torch.arange(len(tokens)).unsqueeze(-1), torch.tensor([len(row) for row in rows])
        response = (place >= lengths) & (place < lengths + longest)
        real, finished = torch.ones(1, len(rows), dtype=torch.bool), torch.zeros(len(rows), dtype=torch.bool)
        cache: Memory = {}
        for t in range(1, len(tokens)):  # all columns together: those whose prompt is longer read on in it
            features, cache = self.body.extend(tokens[t - 1 : t], real, cache)
            drawn = torch.multinomial(self.out(features[0]).softmax(-1), 1, generator=generator).squeeze(-1)
            tokens[t] = torch.where(response[t] & ~finished, drawn, tokens[t])
            finished |= tokens[t] == STOP
            if bool(finished.all()):
                break
        return self.vocabulary.decode(tokens.where(response, PAD))

    def save(self, path: Path, **facts: Any) -> None:
        """Write a file that ``load`` reads, with further facts for people.

        Raises UserError if it cannot be written.
        """
        files.save(path, "language model", self.vocabulary, self.body.config, self.state_dict(), facts)

    @classmethod
    def load(cls, path: str | Path) -> WordModel:
        """The model in a run directory of scripts/pretrain.py, or in a file.  Raises UserError if there is none."""
        vocabulary, config, state, where = files.load(path, FILE, "language model", "python scripts/pretrain.py")
        with files.fitting(where):
            model = cls(vocabulary, Transformer(**config))
            model.load_state_dict(state)
        return model.requires_grad_(False).eval()
