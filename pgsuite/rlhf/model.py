"""A language model with its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from pgsuite.errors import command
from pgsuite.nn.transformer import LanguageModel, Transformer
from pgsuite.rlhf import files
from pgsuite.rlhf.generation import generate
from pgsuite.rlhf.policy import language_policy
from pgsuite.rlhf.tokens import BEGIN, PAD, STOP, Vocabulary

FILE = "model.pt"
LONGEST = 32  # tokens of a response, STOP with them; the corpus has none over 24


class WordModel(LanguageModel):
    """A causal language model over the words of a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, body: Transformer, generator: Generator | None = None) -> None:
        super().__init__(body, generator)
        self.vocabulary = vocabulary

    @property
    def device(self) -> torch.device:
        return self.out.weight.device

    def log_probability(self, tokens: Tensor, real: Tensor) -> Tensor:
        """The log-probability [T - 1, N] of each token but the first, given the preceding ones, for tokens [T, N]; zero
        where it is not real."""
        logp = self(tokens[:-1], real[:-1]).log_softmax(-1)
        return logp.gather(-1, tokens[1:].unsqueeze(-1)).squeeze(-1).where(real[1:], 0.0)

    def generate(self, prompts: Sequence[str], generator: Generator, longest: int = LONGEST) -> list[str]:
        """Sample a response of at most ``longest`` tokens to each prompt.  The generator is on the model's device.

        Raises ValueError for unknown words.
        """
        rows = [torch.tensor([BEGIN, *self.vocabulary.numbers_of(prompt)]) for prompt in prompts]
        tokens = pad_sequence(rows, padding_value=PAD, padding_side="left").to(self.device)
        policy = language_policy(self.body, self.out)
        text = generate(policy, tokens, tokens != PAD, longest, STOP, generator, pad=PAD)
        return self.vocabulary.decode(text.tokens[len(tokens) :])

    def save(self, path: Path, **facts: Any) -> None:
        """Write a file for ``load``, with additional facts.

        Raises UserError if it cannot be written.
        """
        files.save(path, "language model", self.vocabulary, self.body.config, self.state_dict(), facts)

    @classmethod
    def load(cls, path: str | Path) -> WordModel:
        """Load the model of a run directory of scripts/pretrain.py, or a file.  Raises UserError if there is none."""
        vocabulary, config, state, where = files.load(path, FILE, "language model", command("pretrain"))
        with files.fitting(where):
            model = cls(vocabulary, Transformer(**config))
            model.load_state_dict(state)
        return model.requires_grad_(False).eval()
