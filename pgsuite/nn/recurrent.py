"""Recurrent layers over [T, ...] sequences in time order; the hidden state is reset where episodes start.

On a CPU, sequences are cut where episodes start, and all stretches are processed side by side: as many steps as the
longest stretch has.  First derivatives of GRU and LSTM are written by hand, since most of the time of a loop over short
operations goes into recording and differentiating each of them.  On an accelerator, where cutting would read ``start``
back to the host, all T steps are taken.

Everything else, such as second derivatives, forward mode and ``vmap``, runs through the elementary operations of
``step``.  Fused kernels of torch support none of these, and do not return the cell states of an LSTM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear as affine

from pgsuite.nn.layers import linear, tanh
from pgsuite.settings import Count
from pgsuite.transfer import reads_freely


class Memory(nn.Module):
    """A layer with ``size`` outputs at every step and a hidden state of ``width`` numbers, zero where episodes start.

    A custom layer is chosen by ``policy.recurrent`` and constructed as ``cls(inputs, size, generator, **settings)``.
    """

    size: int
    width: int

    @property
    def label(self) -> str:
        """Its name for display."""
        return type(self).__name__.lower()

    def forward(self, x: Tensor, hidden_state: Tensor, start: Tensor) -> tuple[Tensor, Any]:
        """Outputs [T, ..., size] for inputs x [T, ..., inputs], and the hidden states [T, ..., width] after each step,
        from an initial hidden state [..., width].  It is reset to zero before steps where start [T, ...] is true.

        The hidden states need be no tensor, but indexing gives one."""
        raise NotImplementedError


class Recurrence(Memory):
    """A recurrent layer.

    A subclass defines ``gates``, the number of projections of the input to ``size`` numbers, ``width``, and ``step``.
    """

    gates: int

    def __init__(self, inputs: int, size: int, generator: Generator | None = None) -> None:
        super().__init__()
        self.size = self.width = size
        self.read = linear(inputs, self.gates * size, 1.0, generator)
        self.recall = linear(size, self.gates * size, 1.0, generator)

    def step(self, drive: Tensor, hidden_state: Tensor) -> Tensor:
        """The hidden state [..., width] after a step; its first ``size`` numbers are the outputs.  ``drive``
        [..., gates * size] is the projection of the inputs."""
        raise NotImplementedError

    def scan(self, drive: Tensor, hidden_state: Tensor, counts: Sequence[int]) -> Tensor:
        """The hidden states [C, width] after all steps of M stretches.  ``drive`` [C, gates * size] holds their first
        steps, then their second ones, and so on; step t is that of the first ``counts[t]`` stretches.  ``hidden_state``
        [M, width] is before their first steps."""
        return loop(self.step, drive, hidden_state, counts)

    def forward(self, x: Tensor, hidden_state: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        drive = self.read(x)
        if len(start) > 1 and reads_freely(start):
            stretches = Stretches(start.flatten(1))
            before = stretches.initial(hidden_state.flatten(0, -2))
            states = self.scan(stretches.pack(drive.flatten(0, -2)), before, stretches.counts)
            states = stretches.unpack(states).unflatten(0, start.shape)
        else:
            after = []
            for row, fresh in zip(drive.unbind(), start.unsqueeze(-1).unbind(), strict=True):
                hidden_state = self.step(row, torch.where(fresh, 0.0, hidden_state))
                after.append(hidden_state)
            states = torch.stack(after)
        return states[..., : self.size], states


def loop(
    step: Callable[[Tensor, Tensor], Tensor], drive: Tensor, hidden_state: Tensor, counts: Sequence[int]
) -> Tensor:
    """``Recurrence.scan`` in elementary operations."""
    after = []
    for row in drive.split(counts):
        hidden_state = step(row, hidden_state[: len(row)])
        after.append(hidden_state)
    return torch.cat(after)


class Stretches:
    """The M stretches into which episodes' starts cut columns [T, N], longest first.

    ``counts`` are the number of stretches with a first step, with a second one, and so on.  Reads ``start`` [T, N].
    """

    def __init__(self, start: Tensor) -> None:
        horizon, columns = start.shape
        self.start, self.counts = start, [columns] * horizon
        self.cells: Tensor | None = None  # [T * N] cells in the order of ``Recurrence.scan``; None if they are in it
        if not bool(start[1:].any()):
            return
        first = start.t().clone()
        first[:, 0] = True
        first = first.flatten()  # column after column
        begin = first.nonzero().squeeze(-1)  # [M]
        length = torch.diff(begin, append=begin.new_tensor([len(first)]))
        rank = length.argsort(descending=True, stable=True).argsort()
        stretch, cell = first.cumsum(0) - 1, torch.arange(len(first))
        step = cell - begin[stretch]
        order = (step * len(begin) + rank[stretch]).argsort()
        self.cells = order % horizon * columns + order // horizon
        self.counts = step.bincount().tolist()

    def initial(self, hidden_state: Tensor) -> Tensor:
        """The hidden states [M, H] before the first steps: those of ``hidden_state`` [N, H] for stretches that began
        earlier, zero for others."""
        fresh = self.start[0]
        if self.cells is not None:
            first = self.cells[: self.counts[0]]
            column = first % self.start.shape[1]
            hidden_state, fresh = hidden_state.index_select(0, column), fresh[column] | (first != column)
        return torch.where(fresh.unsqueeze(-1), 0.0, hidden_state)

    def pack(self, x: Tensor) -> Tensor:
        """Rows [T * N, ...] of cells, in the order of ``Recurrence.scan``."""
        return x if self.cells is None else x.index_select(0, self.cells)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of ``pack``."""
        if self.cells is None:
            return x
        back = torch.empty_like(self.cells)
        back[self.cells] = torch.arange(len(back))
        return x.index_select(0, back)


class Gated(Recurrence):
    """A layer whose next state is a function of the inputs' projections, the outputs' projections and the state.

    A subclass defines that function, ``cell``, and by hand ``run``, all steps at once, and ``pull``, its derivative.
    Its second gate decides what is kept.

    With ``span``, the gates' initial biases make units keep what they hold for 1 to ``span`` steps, drawn uniformly
    (Tallec and Ollivier, 2018, section 3); without, they are those of the subclass.
    """

    def __init__(
        self, inputs: int, size: int, generator: Generator | None = None, *, span: Count | None = None
    ) -> None:
        super().__init__(inputs, size, generator)
        if span is not None:
            with torch.no_grad():
                kept = torch.empty(size).uniform_(1, max(span, 2) - 1, generator=generator)
                self.read.bias[size : 2 * size] = kept.log()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "step" in vars(cls) or ("cell" in vars(cls) and "run" not in vars(cls)):  # which ``run`` does not compute
            cls.scan = Recurrence.scan

    @staticmethod
    def cell(drive: Tensor, recalled: Tensor, hidden_state: Tensor) -> Tensor:
        """The hidden state [..., width] after a step, of the projections [..., gates * size] of inputs and outputs."""
        raise NotImplementedError

    @staticmethod
    def run(counts: Sequence[int], drive: Tensor, hidden_state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """As ``scan``, with the weights and biases of ``recall``."""
        raise NotImplementedError

    @staticmethod
    def pull(counts: Sequence[int], gradient: Tensor, states: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the four tensors ``inputs`` of ``run``, given its result ``states`` and the gradient of
        that."""
        raise NotImplementedError

    def step(self, drive: Tensor, hidden_state: Tensor) -> Tensor:
        return self.cell(drive, self.recall(hidden_state[..., : self.size]), hidden_state)

    def scan(self, drive: Tensor, hidden_state: Tensor, counts: Sequence[int]) -> Tensor:
        inputs = drive, hidden_state, self.recall.weight, self.recall.bias
        if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
            return super().scan(drive, hidden_state, counts)
        return Scan.apply(type(self), counts, *inputs)


class Scan(torch.autograd.Function):
    """``Gated.run``, with ``Gated.pull`` as its derivative.  Second derivatives are those of elementary operations."""

    @staticmethod
    def elementary(
        layer: type[Gated], counts: Sequence[int], drive: Tensor, hidden_state: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        def step(row: Tensor, before: Tensor) -> Tensor:
            return layer.cell(row, affine(before[:, : weight.shape[1]], weight, bias), before)

        return loop(step, drive, hidden_state, counts)

    @staticmethod
    def forward(layer: type[Gated], counts: Sequence[int], *inputs: Tensor) -> Tensor:  # pyright: ignore
        return layer.run(counts, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.layer, ctx.counts, *tensors = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, states = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, None, *ctx.layer.pull(ctx.counts, gradient, states, *inputs)
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True) if needed]
        states = Scan.elementary(ctx.layer, ctx.counts, *inputs)
        found = iter(torch.autograd.grad(states, wanted, gradient, create_graph=True))
        return None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[2:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        layer, counts, *inputs = args
        return torch.vmap(partial(Scan.elementary, layer, counts), in_dims[2:])(*inputs), 0


def preceding(hidden_state: Tensor, states: Tensor, counts: Sequence[int]) -> Tensor:
    """The states [C, width] before each step, of those [M, width] before the first steps and those after each step."""
    rows, sizes = [hidden_state, *states.split(counts)], [counts[0], *counts]
    return torch.cat([x if n == count else x[:count] for x, n, count in zip(rows, sizes, counts, strict=False)])


class GRU(Gated):
    """Gated recurrent unit (Cho et al., 2014), with the gates in torch's order: reset, update, new."""

    gates = 3

    @staticmethod
    def cell(drive: Tensor, recalled: Tensor, hidden_state: Tensor) -> Tensor:
        reset, update, new = drive.chunk(3, -1)
        reset_too, update_too, new_too = recalled.chunk(3, -1)
        new = tanh(new + (reset + reset_too).sigmoid() * new_too)
        return torch.lerp(new, hidden_state, (update + update_too).sigmoid())

    @staticmethod
    def run(counts: Sequence[int], drive: Tensor, hidden_state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        size, weight = weight.shape[1], weight.t()
        states = drive.new_empty(len(drive), size)
        gates = both = reset = update = new = drive[:0]
        parts = drive[:, : 2 * size], drive[:, 2 * size :], states
        width = 0  # of the buffer
        for count, gate_drive, new_drive, after in zip(counts, *(x.split(counts) for x in parts), strict=True):
            if count != width:
                width, hidden_state = count, hidden_state[:count]
                gates = drive.new_empty(count, 3 * size)
                both, (reset, update, new) = gates[:, : 2 * size], gates.chunk(3, -1)
            torch.addmm(bias, hidden_state, weight, out=gates)
            both.add_(gate_drive).sigmoid_()
            torch.addcmul(new_drive, reset, new, out=after)
            torch.lerp(after.tanh_(), hidden_state, update, out=after)
            hidden_state = after
        return states

    @staticmethod
    def pull(counts: Sequence[int], gradient: Tensor, states: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        drive, hidden_state, weight, bias = inputs
        size, before = weight.shape[1], preceding(hidden_state, states, counts)
        recalled = torch.addmm(bias, before, weight.t())
        reset, update = (drive[:, : 2 * size] + recalled[:, : 2 * size]).sigmoid_().chunk(2, -1)
        new_too = recalled[:, 2 * size :]
        new = torch.addcmul(drive[:, 2 * size :], reset, new_too).tanh_()
        # The derivative of a state by the arguments of its gates' activations.
        into_new = (1 - update) * (1 - new * new)
        slope = drive.new_empty(len(drive), 3, size)
        torch.mul(into_new, reset, out=slope[:, 2])
        torch.mul(slope[:, 2] * new_too, 1 - reset, out=slope[:, 0])
        torch.mul((before - new) * update, 1 - update, out=slope[:, 1])
        total, pulled = gradient.clone(memory_format=torch.contiguous_format), torch.empty_like(slope)
        parts = total, total.unsqueeze(1), update, slope, pulled, pulled.flatten(1)
        steps = [*zip(counts, *(x.split(counts) for x in parts), strict=True)]
        back, width = total[:0], 0
        for count, through, spread, kept, steep, out, flat in reversed(steps):
            (through if count == width else through[:width]).add_(back)
            torch.mul(steep, spread, out=out)
            back, width = torch.addmm(through * kept, flat, weight), count
        of_recalled = pulled.flatten(1)
        of_drive = of_recalled.clone()
        torch.mul(into_new, total, out=of_drive[:, 2 * size :])
        return of_drive, back, of_recalled.t() @ before, of_recalled.sum(0)


class LSTM(Gated):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997), with the gates in torch's order: input, forget, new,
    output.  The forget gate's bias is initially one (Jozefowicz et al., 2015), unless ``span`` is given."""

    gates = 4

    def __init__(
        self, inputs: int, size: int, generator: Generator | None = None, *, span: Count | None = None
    ) -> None:
        super().__init__(inputs, size, generator, span=span)
        self.width = 2 * size
        with torch.no_grad():
            if span is None:
                self.read.bias[size : 2 * size] = 1.0
            else:
                self.read.bias[:size] = -self.read.bias[size : 2 * size]

    @staticmethod
    def cell(drive: Tensor, recalled: Tensor, hidden_state: Tensor) -> Tensor:
        cell = hidden_state.chunk(2, -1)[1]
        take, keep, new, give = (drive + recalled).chunk(4, -1)
        cell = keep.sigmoid() * cell + take.sigmoid() * tanh(new)
        return torch.cat([give.sigmoid() * tanh(cell), cell], -1)

    @staticmethod
    def run(counts: Sequence[int], drive: Tensor, hidden_state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        size, weight = weight.shape[1], weight.t()
        states = drive.new_empty(len(drive), 2 * size)
        output, cell = hidden_state.chunk(2, -1)
        gates = both = take = keep = new = give = drive[:0]
        parts = drive + bias, states[:, :size], states[:, size:]
        width = 0  # of the buffer
        for count, row, output_after, cell_after in zip(counts, *(x.split(counts) for x in parts), strict=True):
            if count != width:
                width, output, cell, gates = count, output[:count], cell[:count], torch.empty_like(row)
                both, (take, keep, new, give) = gates[:, : 2 * size], gates.chunk(4, -1)
            torch.addmm(row, output, weight, out=gates)
            both.sigmoid_()
            torch.mul(keep, cell, out=cell_after).addcmul_(take, new.tanh_())
            torch.tanh(cell_after, out=output_after).mul_(give.sigmoid_())
            output, cell = output_after, cell_after
        return states

    @staticmethod
    def pull(counts: Sequence[int], gradient: Tensor, states: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        drive, hidden_state, weight, bias = inputs
        size, before = weight.shape[1], preceding(hidden_state, states, counts)
        output, cell = before.chunk(2, -1)
        gates = torch.addmm(drive + bias, output, weight.t())
        take, keep, new, give = gates.chunk(4, -1)
        gates[:, : 2 * size].sigmoid_()
        new.tanh_()
        give.sigmoid_()
        squashed = states[:, size:].tanh()
        # The derivatives of a cell state, and last of an output, by the arguments of the gates' activations.
        slope = drive.new_empty(len(drive), 4, size)
        torch.mul(take * new, 1 - take, out=slope[:, 0])
        torch.mul(cell * keep, 1 - keep, out=slope[:, 1])
        torch.mul(take, 1 - new * new, out=slope[:, 2])
        torch.mul(squashed * give, 1 - give, out=slope[:, 3])
        into_output = give * (1 - squashed * squashed)  # the derivative of an output by the cell state
        of_output, of_cell = (x.clone(memory_format=torch.contiguous_format) for x in gradient.chunk(2, -1))
        pulled = torch.empty_like(slope)
        parts = of_output, of_cell, of_cell.unsqueeze(1), into_output, keep, slope[:, :3], slope[:, 3]
        parts += pulled[:, :3], pulled[:, 3], pulled.flatten(1)
        steps = [*zip(counts, *(x.split(counts) for x in parts), strict=True)]
        back_output, back_cell, width = of_output[:0], of_cell[:0], 0
        for count, through, through_cell, spread, steep, kept, slopes, last, out, last_out, flat in reversed(steps):
            (through if count == width else through[:width]).add_(back_output)
            (through_cell if count == width else through_cell[:width]).add_(back_cell)
            through_cell.addcmul_(through, steep)
            torch.mul(slopes, spread, out=out)
            torch.mul(last, through, out=last_out)
            back_output, back_cell, width = flat @ weight, through_cell * kept, count
        of_drive = pulled.flatten(1)
        return of_drive, torch.cat([back_output, back_cell], -1), of_drive.t() @ output, of_drive.sum(0)


RECURRENCES: dict[str, type[Recurrence]] = {"gru": GRU, "lstm": LSTM}
