"""CUDA graphs' stand-in where there is no GPU: what was recorded is operations on tensors, and replaying does them
again, on the same tensors, with none of the Python around them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pgsuite.execution.cuda_graphs import Graphs
from pgsuite.testing.reads import NothingRead


def bare(x: Any) -> Any:
    """The same memory, without a history."""
    return x.detach() if isinstance(x, Tensor) else x


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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
    """Recording runs what it records, so the first replay after it does nothing."""

    made = replays = 0

    def __init__(self, generators: Any, uncapturable_calls: Any) -> None:
        self.generators, self.uncapturable_calls, self.launches, self.ran = generators, uncapturable_calls, [], False

    @staticmethod
    def rehearse(work: Any) -> tuple[Any, list[str]]:
        return work(), []

    def record(self, work: Any) -> Any:
        Tape.made += 1
        launches = [(kernel, kernel.run) for kernel in self.uncapturable_calls]
        for kernel, run in launches:
            kernel.run = partial(self.between, run)
        self.begin()
        try:
            return work()
        except AssertionError as error:
            raise RuntimeError(*error.args) from error
        finally:
            self.end()
            for kernel, run in launches:
                kernel.run = run

    def begin(self) -> None:
        self.host_sync_reason, self.recorder = NothingRead(), Recorder()
        self.host_sync_reason.__enter__()
        self.recorder.__enter__()

    def end(self) -> None:
        self.recorder.__exit__(None, None, None)
        self.host_sync_reason.__exit__(None, None, None)
        self.launches.append(lambda operations=self.recorder.operations: play(operations))

    def between(self, launch: Any, *args: Any) -> None:
        launch(*args)
        super().between(launch, *args)

    def replay(self) -> None:
        if self.ran:
            Tape.replays += 1
            super().replay()
        self.ran = True


@torch.no_grad()
def play(operations: list[Any]) -> None:
    for func, (args, kwargs), fresh in operations:
        outputs = func(*args, **kwargs)
        for old, new in zip(fresh, pytree.tree_leaves(outputs), strict=False):
            if isinstance(old, Tensor) and not old._is_zerotensor():
                old.copy_(new)
