"""Between texts and the numbers that a language model reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pgsuite.settings import closest

PAD, BEGIN, STOP = 0, 1, 2  # nothing, before the first word, after the last one
SPECIAL = 3


class Vocabulary:
    """Words, and the number of each: its place in ``words`` after those of padding, beginning and stop."""

    pad, stop = PAD, STOP

    def __init__(self, words: Iterable[str]) -> None:
        self.words = list(words)
        self.numbers = {word: number for number, word in enumerate(self.words, SPECIAL)}

    def __len__(self) -> int:
        return SPECIAL + len(self.words)

    def numbers_of(self, text: str) -> list[int]:
        """Raises ValueError for a word that is not in the vocabulary."""
        try:
            return [self.numbers[word] for word in text.split()]
        except KeyError as error:
            (word,) = error.args
            raise ValueError(f"{word!r} is no word of the {len(self.words)}; {closest(word, self.numbers)}") from None

    def encode(self, prompts: Sequence[str], responses: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [T, N] and which of them are real [T, N]: BEGIN and a prompt each, and with responses the response and
        STOP as well; what is missing to the longest is PAD at the end.

        Raises ValueError for unknown words, and where there are not as many responses as prompts.
        """
        rows = [[BEGIN, *self.numbers_of(prompt)] for prompt in prompts]
        if responses is not None:
            rows = [[*row, *self.numbers_of(text), STOP] for row, text in zip(rows, responses, strict=True)]
        return pad(rows)

    def decode(self, tokens: Tensor) -> list[str]:
        """The texts of tokens [T, N], each up to its first STOP, without PAD and BEGIN."""
        texts: list[str] = []
        for column in tokens.T.tolist():
            end = column.index(STOP) if STOP in column else len(column)
            texts.append(" ".join(self.words[x - SPECIAL] for x in column[:end] if x >= SPECIAL))
        return texts


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as columns [T, N], filled with PAD at the end, and which cells are real [T, N]."""
    lengths = torch.tensor([len(row) for row in rows])
    columns = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], padding_value=PAD)
    return columns, torch.arange(len(columns)).unsqueeze(-1) < lengths
