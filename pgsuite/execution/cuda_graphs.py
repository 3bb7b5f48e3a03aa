"""Iterations as CUDA graphs: the host launches what the device did before.  Algorithms and environments know nothing
of it.

Collecting, learning and the digest that the trainer reads are captured one by one, and what cannot be stays as it is.
Replayed, none of their Python runs: it counts for what it did to tensors, at the addresses that they had.  So whatever
is held from one call to the next must stay where it is (``Slots`` sees to that), numbers that the host holds must stay
the same (if one does not, the part is captured anew), and nothing may be read back to the host.
"""

from __future__ import annotations

import gc
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
from pgsuite.envs import TaskEnv, VectorEnv
from pgsuite.envs.physics.mujoco_warp import WarpPhysics
from pgsuite.kernel import Kernel
from pgsuite.training.trainer import Trainer

FOREIGN = ("gymnasium", "mujoco", "mujoco_warp", "numpy", "warp")  # packages whose objects hold nothing of ours
CLOCKS = sys.intern("seconds")  # the name of what the host measures, and nothing depends on
STEADY = 2  # calls in a row, after the first, by which a function has shown that it does the same each time
PATIENCE = 20  # calls to become so

Outside = Sequence[Kernel[..., None]]  # which launch what no graph of torch's can hold


class ChangedError(Exception):
    """Something that the host holds is not what it was; says what."""


class Slots:
    """The places in reach of some objects that hold a tensor or a number, and what they held when this was made."""

    def __init__(self, *roots: Any) -> None:
        self.held: list[tuple[Any, Any, Any, str]] = []  # owner, key, value, and a name for people
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
            if not isinstance(x, tuple):  # whose places cannot be written to; it is held as a whole
                self.held.append((owner(x), key, value, where))
            self.look(value, where)

    def restore(self, *also: tuple[Any, Any]) -> None:
        """Put the same tensors in their places again, with the values of those that have taken them; and into each
        first of ``also`` the values of the second.  Raises ChangedError, and does nothing, where more than values
        changed."""
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
            values = [new.clone() for _, new in pairs]  # for a new one may be the old one of another place
            for (old, _), value in zip(pairs, values, strict=True):
                old.copy_(value)
        for x, key, value in moved:
            x[key] = value

    def undo(self) -> None:
        """Put everything back, values and all, where nothing was written in place."""
        for x, key, value, _ in self.held:
            x[key] = value


def owner(x: Any) -> Any:
    """What the parts of x can be read from and written to by key; None for what has none that matter here."""
    if isinstance(x, dict | list | tuple):
        return x
    if isinstance(x, Tensor | type | ModuleType) or hasattr(x, "__get__"):  # which functions and methods have
        return None
    return getattr(x, "__dict__", None) if type(x).__module__.partition(".")[0] not in FOREIGN else None


def inside(x: Any) -> list[tuple[Any, Any]]:
    """The parts of x that matter here, by key."""
    parts = owner(x)
    items = enumerate(parts) if isinstance(parts, list | tuple) else (parts or {}).items()
    return [(key, y) for key, y in items if key is not CLOCKS and (is_number(y) or tells(y))]


def is_number(x: Any) -> bool:
    return x is None or isinstance(x, int | float | str)


def tells(x: Any) -> bool:
    return isinstance(x, Tensor | Generator) or owner(x) is not None


def match(old: Any, new: Any, name: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Pair the tensors of a nest with those of another one.  Raises ChangedError unless they differ in values only."""
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
    """What one call of a function launches, in order: CUDA graphs, and between them what no graph can hold."""

    def __init__(self, generators: Sequence[Generator], outside: Outside) -> None:
        self.generators, self.outside = [x for x in generators if x.device.type == "cuda"], outside
        self.launches: list[Callable[[], Any]] = []
        self.pool = torch.cuda.graph_pool_handle()  # one for all of them, since they are replayed in their order

    @staticmethod
    def rehearse(work: Callable[[], Any]) -> tuple[Any, list[str]]:
        """What work returns, on a stream that is not the default one, as when it is captured; and where it waited for
        the device."""
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
        """What work returns, in memory that every replay writes to.  Nothing of it runs on the device yet.  Raises
        RuntimeError where it cannot be captured."""
        torch.cuda.synchronize()
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()  # what is freed in the midst of a capture would become part of it
        launches = [(kernel, kernel.run) for kernel in self.outside]
        for kernel, run in launches:
            kernel.run = partial(self.between, run)
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


class Captured:
    """A function that is captured once it does the same each time it is called, and replayed from then on.

    ``roots`` hold whatever it depends on from call to call.  What it returns is overwritten by the next call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        roots: Sequence[Any],
        what: str,
        outside: Outside = (),
        record: type[Graphs] = Graphs,
    ) -> None:
        self.function, self.roots, self.what, self.outside, self.record = function, roots, what, outside, record
        self.graphs: Graphs | None = None
        self.calls = self.steady = 0
        self.hopeless = False

    def __call__(self, *args: Any) -> Any:
        if self.hopeless:
            return self.function(*args)
        if self.graphs is None:
            return self.capture(args) if self.settled else self.rehearse(args)
        try:
            self.slots.restore((self.args, args))
        except ChangedError:  # such as a scheduled number of epochs
            self.graphs, self.outputs, self.calls, self.steady = None, None, 0, 0
            return self.rehearse(args)
        self.graphs.replay()
        return self.outputs

    @property
    def settled(self) -> bool:
        return self.steady >= STEADY and self.calls > STEADY

    def rehearse(self, args: tuple[Any, ...]) -> Any:
        """Run it as it is written, and see whether it can be captured."""
        slots = Slots(*self.roots)
        outputs, waits = self.record.rehearse(partial(self.function, *args))
        self.calls += 1
        try:
            slots.restore()
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
        slots = Slots(*self.roots)
        graphs = self.record(slots.generators, self.outside)

        def work() -> Any:
            outputs = self.function(*args)
            slots.restore()
            return outputs

        try:
            self.outputs = graphs.record(work)
        except (RuntimeError, ChangedError) as error:
            slots.undo()
            self.leave(str(error).partition("\n")[0])
            return self.function(*args)
        self.slots, self.args, self.graphs = slots, args, graphs
        graphs.replay()
        return self.outputs

    def leave(self, why: str) -> None:
        self.hopeless = True
        warnings.warn(f"execution=cuda_graph: {self.what} is not captured: {why}", stacklevel=2)


def capture(trainer: Trainer, record: type[Graphs] = Graphs) -> None:
    """Have iterations captured, as far as they can be; warns of each part that cannot, and says what could."""
    algorithm, collector, env = trainer.algorithm, trainer.collector, trainer.collector.env
    physics = getattr(getattr(env, "task", None), "physics", None)
    outside = [physics.launch] if isinstance(physics, WarpPhysics) else []
    why, roots = distant(env) or collector.host_sync_reason, (collector, algorithm.policy)
    parts: list[tuple[Kernel[..., Any], tuple[Any, ...], str, str | None, Outside]] = [
        (collector.collect, roots, "collecting", why, outside),
        (algorithm.training_step, (algorithm,), "learning", algorithm.host_sync_reason, ()),
        (trainer.pack_host_data, (trainer.tracker, collector.buffer), "the digest of an iteration", None, ()),
    ]
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)  # of the streams that graphs are captured on
    for kernel, roots, what, why, between in parts:
        captured = Captured(kernel.run, roots, what, between, record)
        if distributed.size() > 1:
            why = f"{distributed.size()} processes meet in it; one alone can be captured"
        if why is not None:
            captured.leave(why)
        else:
            kernel.run = captured.__call__  # a method, into which no search for slots goes


def distant(env: VectorEnv) -> str | None:
    """Why steps of these environments cannot be part of a graph, and what can; None where they can."""
    if isinstance(env, TaskEnv) and env.task.device == env.device:
        return None
    return f"{env.name} runs on {env.backend}, which torch does not see; a Task in torch can be captured, or on Warp"
