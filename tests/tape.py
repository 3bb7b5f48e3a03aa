"""CUDA graphs' stand-in where there is no GPU: what was recorded is operations on tensors, and replaying does them
again, on the same tensors, with none of the Python around them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pgsuite.execution.cuda_graphs import Graphs
from pgsuite.testing import reads
from pgsuite.testing.reads import NothingRead

REFUSED = "CUDA error: operation not permitted when stream is capturing"


def bare(x: Any) -> Any:
    """The same memory, without a history."""
    return x.detach() if isinstance(x, Tensor) else x


class Registered(TorchFunctionMode):
    """Forbids draws from generators that no graph was told of, which CUDA refuses in a capture."""

    def __init__(self, generators: Sequence[Generator]) -> None:
        super().__init__()
        self.generators = generators

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for x in (*args, *(kwargs or {}).values()):
            known = not isinstance(x, Generator) or any(x is generator for generator in self.generators)
            assert known, f"{func.__name__} draws from a generator that was not registered"
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.tape.fail_at(len(self.operations))
        if func._schema.is_mutable:
            self.tape.keep(args, kwargs)
        outputs = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        fresh = [x for x, how in zip(pytree.tree_leaves(outputs), returns, strict=False) if how.alias_info is None]
        if len(returns) == 1 and returns[0].alias_info is None:
            fresh = pytree.tree_leaves(outputs)  # perhaps a list of them
        if fresh or func._schema.is_mutable:  # else a view, which stays one
            given = pytree.tree_map(bare, (args, kwargs or {}))
            self.operations.append((func, given, [bare(x) for x in fresh]))
        return outputs


class Tape(Graphs):
    """Recording runs what it records, so the first replay after it does nothing.  What a recording that fails has done
    is undone, for a capture would not have done it."""

    made = replays = 0
    fails: ClassVar[Literal["begin", "end", "launch"] | int | None] = None  # where: an int counts operations

    def __init__(self, generators: Any, uncapturable_calls: Any) -> None:
        self.generators, self.uncapturable_calls, self.launches, self.ran = generators, uncapturable_calls, [], False
        self.modes = ExitStack()
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.worlds: list[tuple[Any, Any]] = []  # physics, and their state before the first launch

    @staticmethod
    def rehearse(work: Any) -> tuple[Any, list[str]]:
        return work(), []

    def record(self, work: Any) -> Any:
        Tape.made += 1
        launches = [(kernel, kernel.run) for kernel in self.uncapturable_calls]
        for kernel, run in launches:
            kernel.run = partial(self.between, run)
        states = [(generator, generator.get_state()) for generator in self.generators]
        try:
            self.begin()
            outputs = work()
            self.end()
        except BaseException as error:
            self.modes.close()
            self.undo()
            for generator, state in states:
                generator.set_state(state)
            kind = RuntimeError if isinstance(error, AssertionError) else type(error)
            raise kind(*error.args).with_traceback(at_fault(error.__traceback__)) from None
        finally:
            for kernel, run in launches:
                kernel.run = run
        return outputs

    def fail_at(self, where: str | int) -> None:
        if where == self.fails:
            raise RuntimeError(REFUSED)

    def begin(self) -> None:
        self.fail_at("begin")
        self.recorder = Recorder(self)
        for mode in (NothingRead(), self.recorder, Registered(self.generators)):
            self.modes.enter_context(mode)

    def end(self) -> None:
        self.modes.close()
        self.fail_at("end")
        self.launches.append(partial(play, self.recorder.operations))

    def between(self, launch: Any, *args: Any) -> None:
        self.modes.close()
        if not self.worlds:
            self.worlds.append((launch.__self__, launch.__self__.state_dict()))
        launch(*args)
        super().between(launch, *args)
        self.fail_at("launch")

    def keep(self, *given: Any) -> None:
        """Remember the memory of tensors as it is before it is first written to."""
        for x in pytree.tree_leaves(given):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()).data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()

    def undo(self) -> None:
        for storage, old in self.before.values():
            storage.copy_(old)
        for world, state in self.worlds:
            world.load_state_dict(state)

    def replay(self) -> None:
        if self.ran:
            Tape.replays += 1
            super().replay()
        self.ran = True


def failing(where: Literal["begin", "end", "launch"] | int) -> type[Tape]:
    """Tapes whose every recording fails there."""
    return type("Failing", (Tape,), {"fails": where})


def at_fault(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of ``NothingRead``, in whose place CUDA would have refused."""
    if trace is None:
        return None
    rest, frame = at_fault(trace.tb_next), trace.tb_frame
    if frame.f_code.co_filename == reads.__file__:
        return rest
    return TracebackType(rest, frame, trace.tb_lasti, trace.tb_lineno)


@torch.no_grad()
def play(operations: list[Any]) -> None:
    for func, (args, kwargs), fresh in operations:
        outputs = func(*args, **kwargs)
        for old, new in zip(fresh, pytree.tree_leaves(outputs), strict=False):
            if isinstance(old, Tensor) and not old._is_zerotensor():
                old.copy_(new)
