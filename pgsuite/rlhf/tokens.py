"""The word-level tokenizer of the generated corpus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pgsuite.settings import closest

PAD, BEGIN, STOP = 0, 1, 2  # padding, beginning of a text, end of a text
SPECIAL = 3


class Vocabulary:
    """Words and their token numbers, in the order of ``words``, after the three special tokens."""

    pad, stop = PAD, STOP

    def __init__(self, words: Iterable[str]) -> None:
        self.words = list(words)
        self.numbers = {word: number for number, word in enumerate(self.words, SPECIAL)}

    def __len__(self) -> int:
        return SPECIAL + len(self.words)

    def numbers_of(self, text: str) -> list[int]:
        """The tokens of a text.  Raises ValueError for a word outside the vocabulary."""
        try:
            return [self.numbers[word] for word in text.split()]
        except KeyError as error:
            (word,) = error.args
            raise ValueError(f"{word!r} is no word of the {len(self.words)}; {closest(word, self.numbers)}") from None

    def encode(
        self, prompts: Sequence[str], responses: Sequence[str] | None = None, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Right-padded tokens [T, N] and the mask of real ones [T, N].  Each column is BEGIN and a prompt, followed by
        the response and STOP if responses are given.

        Raises ValueError for unknown words, and unless there are as many responses as prompts.
        """
        rows = [[BEGIN, *self.numbers_of(prompt)] for prompt in prompts]
        if responses is not None:
            rows = [[*row, *self.numbers_of(text), STOP] for row, text in zip(rows, responses, strict=True)]
        tokens, real = pad(rows)
        return tokens.to(device), real.to(device)

    def decode(self, tokens: Tensor) -> list[str]:
        """The texts of tokens [T, N], each up to its first STOP, without PAD and BEGIN."""
        texts: list[str] = []
        for column in tokens.T.tolist():
            end = column.index(STOP) if STOP in column else len(column)
            texts.append(" ".join(self.words[x - SPECIAL] for x in column[:end] if x >= SPECIAL))
        return texts


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as right-padded columns [T, N], and the mask of real cells [T, N]."""
    lengths = torch.tensor([len(row) for row in rows])
    columns = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], padding_value=PAD)
    return columns, torch.arange(len(columns)).unsqueeze(-1) < lengths
