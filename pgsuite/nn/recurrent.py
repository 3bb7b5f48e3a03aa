"""Memory: recurrences over [T, ...] sequences in time order, cleared where episodes start.

They are written out in plain operations, since fused ones give neither second derivatives nor a clearing between
steps: trust regions need the first, and rollouts in which episodes follow one another the second.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor, nn

from pgsuite.nn.layers import linear, tanh

Kind = Literal["none", "gru", "lstm"]


class Recurrence(nn.Module):
    """``size`` numbers about every step, given those before it in the episode; ``width`` numbers are remembered."""

    gates: int
    width: int

    def __init__(self, inputs: int, size: int, generator: Generator | None = None) -> None:
        super().__init__()
        self.size = size
        self.read = linear(inputs, self.gates * size, 1.0, generator)
        self.recall = linear(size, self.gates * size, 1.0, generator)

    def step(self, drive: Tensor, hidden_state: Tensor) -> Tensor:
        """The memory [..., width] after a step that drives it by [..., gates * size]."""
        raise NotImplementedError

    def forward(self, x: Tensor, hidden_state: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """What is made of inputs x [T, ..., inputs], as [T, ..., size], and what is remembered after each, as
        [T, ..., width], beginning with a memory [..., width] and forgetting all before the steps where start [T, ...].
        """
        after = []
        for drive, fresh in zip(self.read(x).unbind(), start.unsqueeze(-1).unbind(), strict=True):
            hidden_state = self.step(drive, torch.where(fresh, 0.0, hidden_state))
            after.append(hidden_state)
        memories = torch.stack(after)
        return memories[..., : self.size], memories


class GRU(Recurrence):
    """Gated recurrent unit (Cho et al., 2014), with the gates in torch's order: reset, update, new."""

    gates = 3

    def __init__(self, inputs: int, size: int, generator: Generator | None = None) -> None:
        super().__init__(inputs, size, generator)
        self.width = size

    def step(self, drive: Tensor, hidden_state: Tensor) -> Tensor:
        reset, update, new = drive.chunk(3, -1)
        reset_too, update_too, new_too = self.recall(hidden_state).chunk(3, -1)
        new = tanh(new + (reset + reset_too).sigmoid() * new_too)
        return torch.lerp(new, hidden_state, (update + update_too).sigmoid())


class LSTM(Recurrence):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997), with the gates in torch's order: input, forget, new,
    output.  It begins by remembering: the forget gate's bias is one (Jozefowicz et al., 2015)."""

    gates = 4

    def __init__(self, inputs: int, size: int, generator: Generator | None = None) -> None:
        super().__init__(inputs, size, generator)
        self.width = 2 * size
        with torch.no_grad():
            self.read.bias[size : 2 * size] = 1.0

    def step(self, drive: Tensor, hidden_state: Tensor) -> Tensor:
        output, cell = hidden_state.chunk(2, -1)
        take, keep, new, give = (drive + self.recall(output)).chunk(4, -1)
        cell = keep.sigmoid() * cell + take.sigmoid() * tanh(new)
        return torch.cat([give.sigmoid() * tanh(cell), cell], -1)


RECURRENCES: dict[str, type[Recurrence]] = {"gru": GRU, "lstm": LSTM}
