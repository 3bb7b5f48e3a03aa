"""Recurrent layers over [T, ...] sequences in time order; the hidden state is reset where episodes start.

They are written in elementary operations: fused kernels support neither second derivatives, which trust regions need,
nor resets within a sequence, which rollouts with several episodes need.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from pgsuite.nn.layers import linear, tanh


class Recurrence(nn.Module):
    """A recurrent layer with ``size`` outputs at every step and a hidden state of ``width`` numbers.

    A subclass defines ``gates``, the number of projections of the input to ``size`` numbers, ``width``, and ``step``.
    A custom layer is chosen by ``policy.recurrent`` and constructed as ``cls(inputs, size, generator, **settings)``.
    """

    gates: int
    width: int

    def __init__(self, inputs: int, size: int, generator: Generator | None = None) -> None:
        super().__init__()
        self.size = self.width = size
        self.read = linear(inputs, self.gates * size, 1.0, generator)
        self.recall = linear(size, self.gates * size, 1.0, generator)

    def step(self, drive: Tensor, hidden_state: Tensor) -> Tensor:
        """The hidden state [..., width] after a step; its first ``size`` numbers are the outputs.  ``drive``
        [..., gates * size] is the projection of the inputs."""
        raise NotImplementedError

    def forward(self, x: Tensor, hidden_state: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [T, ..., size] for inputs x [T, ..., inputs], and the hidden states [T, ..., width] after each step,
        from an initial hidden state [..., width].  It is reset to zero before steps where start [T, ...] is true."""
        after = []
        for drive, fresh in zip(self.read(x).unbind(), start.unsqueeze(-1).unbind(), strict=True):
            hidden_state = self.step(drive, torch.where(fresh, 0.0, hidden_state))
            after.append(hidden_state)
        states = torch.stack(after)
        return states[..., : self.size], states


class GRU(Recurrence):
    """Gated recurrent unit (Cho et al., 2014), with the gates in torch's order: reset, update, new."""

    gates = 3

    def step(self, drive: Tensor, hidden_state: Tensor) -> Tensor:
        reset, update, new = drive.chunk(3, -1)
        reset_too, update_too, new_too = self.recall(hidden_state).chunk(3, -1)
        new = tanh(new + (reset + reset_too).sigmoid() * new_too)
        return torch.lerp(new, hidden_state, (update + update_too).sigmoid())


class LSTM(Recurrence):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997), with the gates in torch's order: input, forget, new,
    output.  The forget gate's bias is initially one (Jozefowicz et al., 2015)."""

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
