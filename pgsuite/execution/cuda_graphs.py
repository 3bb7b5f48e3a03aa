"""Iterations as CUDA graphs.  Algorithms and environments do not depend on this module.

Three functions are captured separately: collecting a rollout, learning from it, and packing the data that the trainer
reads back.  A function that cannot be captured runs eagerly, with a warning.

Replaying a graph repeats the recorded device operations at the recorded addresses and runs no Python.  Hence tensors
that live from one call to the next must keep their addresses, which ``TensorState`` ensures; numbers held on the host
must keep their values, otherwise the function is captured again; and nothing may be read back to the host.
"""

from __future__ import annotations

import gc
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

from pgsuite import distributed
from pgsuite.algorithms.base import Algorithm
from pgsuite.envs import TaskEnv, VectorEnv
from pgsuite.envs.physics.mujoco_warp import WarpPhysics
from pgsuite.errors import place
from pgsuite.kernel import Kernel
from pgsuite.rollout import Collector
from pgsuite.training.trainer import Trainer

FOREIGN = ("gymnasium", "mujoco", "mujoco_warp", "numpy", "warp")  # packages whose objects are not searched
CLOCKS = sys.intern("seconds")  # attribute with wall-clock times, which the search ignores
STEADY = 2  # consecutive calls, after the first, with unchanged host state before a function is captured
PATIENCE = 20  # calls after which a function that never became steady is given up
AROUND = (__file__, inspect.getfile(Kernel))  # files that every captured function is called through

COLLECTING, LEARNING, PACKING = "collecting", "learning", "packing the host data"
Uncapturable = Sequence[Kernel[..., None]]  # kernels whose launches cannot be part of a graph of torch


class ChangedError(Exception):
    """A value held on the host has changed; the message is its name."""


class TensorState:
    """Snapshot of every attribute and item that holds a tensor or a number and is reachable from some objects."""

    def __init__(self, *roots: Any) -> None:
        self.held: list[tuple[Any, Any, Any, str]] = []  # owner, key, value, dotted name
        self.generators: list[Generator] = []
        self.seen: dict[int, Any] = {}
        for root in roots:
            self.look(root, type(root).__name__)

    def look(self, x: Any, name: str) -> None:
        if id(x) in self.seen:
            return
        self.seen[id(x)] = x
        if isinstance(x, Generator):
            self.generators.append(x)
        for key, value in inside(x):
            where = f"{name}.{key if isinstance(key, str | int) else type(key).__name__}"
            if not isinstance(x, tuple):  # immutable: replaced as a whole by its owner
                self.held.append((owner(x), key, value, where))
            self.look(value, where)

    def restore(self, *also: tuple[Any, Any]) -> None:
        """Put the original tensors back, holding the current values; and copy the second of each pair in ``also`` into
        the first.  Raises ChangedError, without writing anything, if anything but tensor values differs."""
        pairs: list[tuple[Tensor, Tensor]] = []
        moved = []
        for x, key, value, name in self.held:
            try:
                current = x[key]
            except (KeyError, IndexError):
                raise ChangedError(name) from None
            if current is not value:
                match(value, current, name, pairs)
                moved.append((x, key, value))
        for old, new in also:
            match(old, new, "its argument", pairs)
        with torch.no_grad():
            values = [new.clone() for _, new in pairs]  # a current tensor may be the original of another attribute
            for (old, _), value in zip(pairs, values, strict=True):
                old.copy_(value)
        for x, key, value in moved:
            x[key] = value

    def undo(self) -> None:
        """Put the original objects back, without copying values; for when nothing was written in place."""
        for x, key, value, _ in self.held:
            x[key] = value


def owner(x: Any) -> Any:
    """The container that holds the parts of x by key: x itself or its ``__dict__``; None if its parts are not
    searched."""
    if isinstance(x, dict | list | tuple):
        return x
    if isinstance(x, Tensor | type | ModuleType) or hasattr(x, "__get__"):  # functions and methods
        return None
    return getattr(x, "__dict__", None) if type(x).__module__.partition(".")[0] not in FOREIGN else None


def inside(x: Any) -> list[tuple[Any, Any]]:
    """The parts of x that are numbers, tensors, generators or containers, with their keys."""
    parts = owner(x)
    items = enumerate(parts) if isinstance(parts, list | tuple) else (parts or {}).items()
    return [(key, y) for key, y in items if key is not CLOCKS and (is_number(y) or tells(y))]


def is_number(x: Any) -> bool:
    return x is None or isinstance(x, int | float | str)


def tells(x: Any) -> bool:
    return isinstance(x, Tensor | Generator) or owner(x) is not None


def match(old: Any, new: Any, name: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Append the corresponding tensors of two nests to ``pairs``.  Raises ChangedError unless only values differ."""
    if old is new:
        return
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        if (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device):
            pairs.append((old, new))
            return
    elif type(old) is type(new):
        mine, theirs = dict(inside(old)), dict(inside(new))
        if is_number(old) and old == new:
            return
        if not is_number(old) and mine.keys() == theirs.keys():
            for key, value in mine.items():
                match(value, theirs[key], f"{name}.{key}", pairs)
            return
    raise ChangedError(name)


class Graphs:
    """The launches of one call of a function, in order: CUDA graphs, and the uncapturable calls between them."""

    def __init__(self, generators: Sequence[Generator], uncapturable_calls: Uncapturable) -> None:
        self.generators, self.uncapturable_calls = (
            [x for x in generators if x.device.type == "cuda"],
            uncapturable_calls,
        )
        self.launches: list[Callable[[], Any]] = []
        self.pool = torch.cuda.graph_pool_handle()  # shared, since the graphs are replayed in order

    @staticmethod
    def rehearse(work: Callable[[], Any]) -> tuple[Any, list[str]]:
        """Run work eagerly on a side stream, as capture would.  Returns its result, and the source lines at which it
        synchronized with the device."""
        stream, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
        stream.wait_stream(torch.cuda.current_stream())
        with warnings.catch_warnings(record=True) as told, torch.cuda.stream(stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(stream)
        waits = [x for x in told if "called a synchronizing CUDA operation" in str(x.message)]
        for x in told:
            if x not in waits and "Synchronization debug mode" not in str(x.message):
                warnings.warn_explicit(x.message, x.category, x.filename, x.lineno)
        return result, [f"{x.filename}:{x.lineno}" for x in waits]

    def record(self, work: Callable[[], Any]) -> Any:
        """Capture work and return its result, in memory that every replay overwrites.  Nothing runs on the device yet.
        Raises RuntimeError if work cannot be captured, with random generators as they were before."""
        torch.cuda.synchronize()
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()  # memory freed during a capture would become part of it
        launches = [(kernel, kernel.run) for kernel in self.uncapturable_calls]
        for kernel, run in launches:
            kernel.run = partial(self.between, run)
        states = [generator.get_state() for generator in self.generators]
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                self.begin()
                try:
                    result = work()
                except BaseException:
                    with suppress(RuntimeError):
                        self.graph.capture_end()
                    raise
                self.end()
        except BaseException:
            for generator, state in zip(self.generators, states, strict=True):
                leave_capture(generator, state)
            raise
        finally:
            for kernel, run in launches:
                kernel.run = run
            if collecting:
                gc.enable()
        return result

    def begin(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            self.graph.register_generator_state(generator)
        self.graph.capture_begin(pool=self.pool)

    def end(self) -> None:
        self.graph.capture_end()
        self.launches.append(self.graph.replay)

    def between(self, launch: Callable[..., None], *args: Any) -> None:
        self.end()
        self.launches.append(partial(launch, *args))
        self.begin()

    def replay(self) -> None:
        for launch in self.launches:
            launch()


def leave_capture(generator: Generator, state: Tensor) -> None:
    """Give a CUDA generator a state.  Where CUDA invalidated a capture, ``capture_end`` raises before torch tells the
    registered generators, and each later draw would fail because they still count as being captured; a state object of
    its own makes a generator forget the graph."""
    fresh = Generator(generator.device)
    fresh.set_state(state)
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


class Captured:
    """A function that is captured once its host state is steady, and replayed from then on.

    ``roots`` are the objects that hold its state between calls.  Its results are overwritten by the next call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        roots: Sequence[Any],
        what: str,
        uncapturable_calls: Uncapturable = (),
        record: type[Graphs] = Graphs,
    ) -> None:
        self.function, self.roots, self.what, self.uncapturable_calls, self.record = (
            function,
            roots,
            what,
            uncapturable_calls,
            record,
        )
        self.graphs: Graphs | None = None
        self.calls = self.steady = 0
        self.drawn_from: set[Generator] = set()  # by the rehearsals
        self.hopeless = False

    def __call__(self, *args: Any) -> Any:
        if self.hopeless:
            return self.function(*args)
        if self.graphs is None:
            return self.capture(args) if self.settled else self.rehearse(args)
        try:
            self.state.restore((self.args, args))
        except ChangedError:  # such as a scheduled number of epochs: capture again
            self.graphs, self.outputs, self.calls, self.steady = None, None, 0, 0
            return self.rehearse(args)
        self.graphs.replay()
        return self.outputs

    @property
    def settled(self) -> bool:
        return self.steady >= STEADY and self.calls > STEADY

    def rehearse(self, args: tuple[Any, ...]) -> Any:
        """Run the function eagerly, and check whether it can be captured."""
        state = TensorState(*self.roots)
        before = [generator.get_state() for generator in state.generators]
        outputs, waits = self.record.rehearse(partial(self.function, *args))
        for generator, kept in zip(state.generators, before, strict=True):
            if not torch.equal(generator.get_state(), kept):
                self.drawn_from.add(generator)
        self.calls += 1
        try:
            state.restore()
            self.steady += 1
        except ChangedError as change:
            self.steady = 0
            if self.calls == PATIENCE:
                self.leave(f"{change}, which the host holds, differs from call to call; a tensor on the device may")
        if self.settled and waits:
            places = ", ".join(dict.fromkeys(waits))
            self.leave(f"it waits for the device at {places}; what leaves its values there can be captured")
        return outputs

    def capture(self, args: tuple[Any, ...]) -> Any:
        state = TensorState(*self.roots)
        # Each generator that is registered with a graph costs launches at every replay.
        graphs = self.record([x for x in state.generators if x in self.drawn_from], self.uncapturable_calls)

        def work() -> Any:
            outputs = self.function(*args)
            state.restore()
            return outputs

        try:
            self.outputs = graphs.record(work)
        except (RuntimeError, ChangedError) as error:
            state.undo()
            where = place(error, except_for=(*AROUND, inspect.getfile(self.record)))
            self.leave(where + str(error).partition("\n")[0])
            return self.function(*args)
        self.state, self.args, self.graphs = state, args, graphs
        graphs.replay()
        return self.outputs

    def leave(self, why: str) -> None:
        self.hopeless = True
        warnings.warn(f"execution=cuda_graph: {self.what} is not captured: {why}", stacklevel=2)


def capture(trainer: Trainer, record: type[Graphs] = Graphs) -> None:
    """Capture the iterations of a trainer.  Each part that cannot be captured runs eagerly, and a warning gives the
    reason and a remedy."""
    algorithm, collector, env = trainer.algorithm, trainer.collector, trainer.collector.env
    physics = getattr(getattr(env, "task", None), "physics", None)
    uncapturable_calls = [physics.launch] if isinstance(physics, WarpPhysics) else []
    parts: dict[str, tuple[Kernel[..., Any], tuple[Any, ...], Uncapturable]] = {
        COLLECTING: (collector.collect, (collector, algorithm.policy), uncapturable_calls),
        LEARNING: (algorithm.training_step, (algorithm,), ()),
        PACKING: (trainer.pack_host_data, (trainer.tracker, collector.buffer), ()),
    }
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)  # streams for capture are created on the current device
    reasons = why_not_captured(algorithm, collector)
    for what, (kernel, roots, between) in parts.items():
        captured = Captured(kernel.run, roots, what, between, record)
        if what in reasons:
            captured.leave(reasons[what])
        else:
            kernel.run = captured.__call__  # a bound method, which TensorState does not search


def why_not_captured(algorithm: Algorithm, collector: Collector) -> dict[str, str]:
    """The parts of an iteration that cannot be captured, each with the reason and a remedy, as far as is known before
    they run."""
    reasons = {
        COLLECTING: why_not_capturable(collector.env) or collector.host_sync_reason,
        LEARNING: algorithm.host_sync_reason,
        PACKING: None,
    }
    if distributed.size() > 1:
        reasons = dict.fromkeys(reasons, f"{distributed.size()} processes meet in it; one alone can be captured")
    return {what: why for what, why in reasons.items() if why is not None}


def why_not_capturable(env: VectorEnv) -> str | None:
    """Why steps of these environments cannot be captured, and which environments can; None if they can."""
    if isinstance(env, TaskEnv) and env.task.device == env.device:
        return None
    return f"{env.name} runs on {env.backend}, which torch does not see; a Task in torch can be captured, or on Warp"
