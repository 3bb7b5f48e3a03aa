"""The training loop: step budget, episode statistics, callbacks, training state."""

from __future__ import annotations

import math
import signal
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pgsuite import distributed
from pgsuite.algorithms.base import Algorithm
from pgsuite.envs.base import NotFiniteError, channels_of
from pgsuite.errors import counted
from pgsuite.kernel import Kernel, kernels_of, phase
from pgsuite.nn.optim import Optimizer
from pgsuite.rollout import Collector, EpisodeTracker
from pgsuite.settings import Checked
from pgsuite.training.memory import freed_memory
from pgsuite.types import Metrics

if TYPE_CHECKING:
    from pgsuite.training.run_dir import RunDir

Level = Literal["exact", "episode", "weights"]


@dataclass
class Report:
    """The results of one iteration, on the host."""

    before: int  # environment steps before the iteration
    steps: int  # environment steps after it
    metrics: dict[str, float]
    returns: list[float]  # of the episodes that finished in all processes; empty except in the first process
    lengths: list[float]  # in steps
    is_finite: bool  # whether rollout, metrics, parameters and statistics are finite
    channels: dict[str, list[float]] = field(default_factory=dict)  # the sums of each channel in these episodes

    def passes(self, every: float) -> bool:
        """Whether the number of steps passed a multiple of ``every`` in this iteration."""
        return self.steps // every > self.before // every


@dataclass(kw_only=True, eq=False)
class Callback(Checked):
    """Base class of callbacks; a subclass overrides the methods that it needs.

    If a subclass is a dataclass, its fields are its settings under ``callbacks.<name>``.
    """

    slot = ""  # key of its state in a checkpoint; empty takes the name of its class

    def setup(self, run: RunDir) -> None:
        """Called once in every process, before ``on_start``.  ``run.writes`` is true in the one that writes files."""

    def on_start(self, trainer: Trainer) -> None: ...

    def on_iteration(self, trainer: Trainer, report: Report) -> None: ...

    def on_end(self, trainer: Trainer) -> None:
        """Training is over, finished or not."""

    def state_dict(self) -> dict[str, Any]:
        """The state that the callback needs in a resumed run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class RecentReturns:
    """Undiscounted returns of recent training episodes, and which ones these are."""

    values: list[float]
    window: Literal["last tenth", "last episodes", "unfinished episodes"]
    steps: float  # a tenth of the run

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def std(self) -> float:
        return statistics.pstdev(self.values) if self.values else math.nan

    def __str__(self) -> str:
        n = len(self.values)
        match self.window:
            case "last tenth":
                return f"{counted(n, 'episode')} of the last {self.steps:,.0f} steps"
            case "last episodes":
                return f"the last {counted(n, 'episode')}, which ended before the last {self.steps:,.0f} steps"
            case "unfinished episodes":
                return f"{counted(n, 'unfinished episode')}, since none has ended"


def slots(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Callbacks by the names under which a checkpoint holds their states, each name once."""
    found: dict[str, Callback] = {}
    for callback in callbacks:
        name = key = callback.slot or type(callback).__name__
        count = 1
        while key in found:
            count += 1
            key = f"{name}#{count}"
        found[key] = callback
    return found


class FailureHandler(Protocol):
    """Called after each iteration, before the callbacks."""

    def on_start(self, trainer: Trainer) -> None: ...

    def on_finite(self, trainer: Trainer) -> None: ...

    def on_nonfinite(self, trainer: Trainer, report: Report | NotFiniteError) -> None:
        """Handle an iteration with non-finite numbers: restore the trainer, or raise."""
        ...


@dataclass
class Trainer:
    """Trains an algorithm for ``total_steps`` environment steps, or until ``stop`` is set.

    Steps are counted over all processes, without masked ones.  ``state_dict`` holds everything that the rest of the
    run depends on.
    """

    algorithm: Algorithm
    collector: Collector
    total_steps: int
    callbacks: Sequence[Callback] = ()
    failure_handler: FailureHandler | None = None
    steps: int = 0
    execution: str = "eager"  # mode of execution, for display
    recoveries: int = 0  # number of restorations by the failure handler
    attempts: int = 0  # those of them that count towards its limit
    finite_iterations: int = 0  # since the last one
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("total", "learning"), 0.0))
    asked: int = 0  # number of the signal by which this process was asked to stop
    stop: int = 0  # the same over all processes, agreed upon at the end of each iteration
    ended_early: str = ""  # why a callback ended the run

    def __post_init__(self) -> None:
        self.collector.validate(self.algorithm.policy)
        for percent in reversed(range(101)):  # scheduled settings must be valid throughout the run
            self.algorithm.update_schedules(percent / 100)
            self.algorithm.validate(self.collector)
        env = self.collector.env
        self.tracker = EpisodeTracker(env.num_envs, env.device, channels_of(env))
        self.pack_host_data = Kernel("pack host data", self._pack_host_data)
        self.finished: list[tuple[int, float]] = []  # of episodes: steps at their end, and return

    def fit(self) -> None:
        self.start()
        try:
            while self.steps < self.total_steps and not self.stop:
                self.step()
        finally:
            self.end()

    def start(self) -> None:
        for part in (*self.callbacks, *([self.failure_handler] if self.failure_handler else [])):
            part.on_start(self)

    def end(self) -> None:
        for callback in self.callbacks:
            callback.on_end(self)

    def end_early(self, why: str) -> None:
        """End the run when this iteration is over, as a signal would; for callbacks, of several processes in each of
        them."""
        self.stop, self.ended_early = signal.SIGTERM, why

    def step(self) -> None:
        """Run one iteration, and call the callbacks if all its numbers are finite."""
        try:
            report = self.iterate()
        except NotFiniteError as error:
            self.conclude(error)
        else:
            self.conclude(report)

    def conclude(self, report: Report | NotFiniteError) -> None:
        """End an iteration: recover from non-finite numbers, or call the callbacks."""
        if isinstance(report, NotFiniteError):
            if self.failure_handler is None or distributed.size() > 1:
                raise report
            self.failure_handler.on_nonfinite(self, report)
            return
        if self.failure_handler is not None:
            if not report.is_finite:
                self.failure_handler.on_nonfinite(self, report)
                return
            with phase("keep the state"):
                self.failure_handler.on_finite(self)
        self.finished += [(self.steps, x) for x in report.returns]
        del self.finished[: self._start_of_recent()]
        for callback in self.callbacks:
            callback.on_iteration(self, report)
        freed_memory.give_back()

    def iterate(self) -> Report:
        began, collecting = perf_counter(), sum(self.collector.seconds.values())
        self.algorithm.update_schedules(self.steps / self.total_steps)
        metrics = self.algorithm.iterate(self.collector)
        packed = self.pack_host_data(metrics).cpu()  # the only transfer to the host in an iteration
        values, episodes = packed.split([len(metrics) + 2, len(packed) - len(metrics) - 2])
        report = self.report(list(metrics), values, episodes.view(2 + len(self.tracker.channels), -1))
        took = perf_counter() - began
        self.seconds["total"] += took
        self.seconds["learning"] += took - (sum(self.collector.seconds.values()) - collecting)
        return report

    def report(self, names: Sequence[str], values: Tensor, episodes: Tensor) -> Report:
        """The results of an iteration from what was read back of it: the values of the named metrics, number of steps
        and whether anything is not finite [len(names) + 2], and in each cell returns, lengths and the sums of channels
        [2 + channels, T N].  Counts the steps.  Collective."""
        before = self.steps
        values = distributed.total(torch.cat([values, values.new_tensor([bool(self.asked)])]))
        *read, steps, nonfinite, asked = values.tolist()
        read = [x / distributed.size() for x in read]
        self.steps += int(steps)
        self.stop = (self.asked or signal.SIGTERM) if asked else 0
        is_finite = not nonfinite and all(map(math.isfinite, read))
        gathered = distributed.gather(episodes[:, episodes[1] > 0].tolist()) or [[[] for _ in episodes]]
        returns, lengths, *sums = ([x for part in parts for x in part] for parts in zip(*gathered, strict=True))
        channels = dict(zip(self.tracker.channels, sums, strict=True))
        return Report(before, self.steps, dict(zip(names, read, strict=True)), returns, lengths, is_finite, channels)

    def _pack_host_data(self, metrics: Metrics) -> Tensor:
        """Pack everything that the host needs of an iteration into one float64 vector on the device: the metrics, the
        number of environment steps, whether anything is not finite, and, for each cell [T, N], the returns, then the
        lengths, then the sums of each channel of the episodes that finished there; the length is zero where none
        did."""
        rollout = self.collector.buffer.read()
        nonfinite = ~(rollout.finite() & self.algorithm.finite())
        values = torch.stack([*metrics.values(), rollout.mask.sum().double(), nonfinite])
        return torch.cat([values, *(x.flatten() for x in self.tracker.update(rollout))])

    @property
    def kernels(self) -> dict[str, Kernel[..., Any]]:
        """The kernels of the trainer, the algorithm, the collector and the environments, by owner and attribute."""
        env = self.collector.env
        task = getattr(env, "task", None)
        owners: dict[str, Any] = self.algorithm.held
        owners = {name: x for name, x in owners.items() if isinstance(x, nn.Module | Optimizer)}
        owners |= {"algorithm": self.algorithm, "collector": self.collector, "trainer": self}
        owners |= {} if self.collector.stepper is self.collector else {"stepper": self.collector.stepper}
        owners |= {"env": env, "task": task, "physics": getattr(task, "physics", None)}
        return kernels_of(**{name: x for name, x in owners.items() if hasattr(x, "__dict__")})

    @property
    def recent_returns(self) -> RecentReturns:
        """Returns of the episodes that finished in the last tenth of ``total_steps`` up to now; if none did, of the
        last to finish, at most one for each environment; if none has finished at all, what this process' environments
        have gathered in the episodes under way."""
        tenth = self.total_steps / 10
        found = self.finished[self._start_of_recent() :]
        if not found:
            values = self.tracker.reward.tolist() if self.steps else []
            return RecentReturns(values, "unfinished episodes", tenth)
        late = found[-1][0] > self._end_of_earlier()
        return RecentReturns([x for _, x in found], "last tenth" if late else "last episodes", tenth)

    def _end_of_earlier(self) -> float:
        """The number of steps at which the last tenth of ``total_steps`` up to now begins."""
        return min(self.steps, self.total_steps) - self.total_steps / 10

    def _start_of_recent(self) -> int:
        """Index of the first finished episode that counts as recent."""
        late = bisect_right(self.finished, self._end_of_earlier(), key=lambda episode: episode[0])
        count = self.collector.env.num_envs * distributed.size()
        return late if late < len(self.finished) else max(0, len(self.finished) - count)

    @property
    def return_mean(self) -> float:
        """The mean of ``recent_returns``."""
        return self.recent_returns.mean

    @property
    def level(self) -> Level:
        """How exactly a run in these environments can be resumed."""
        return "exact" if self.collector.env.is_resumable else "episode"

    def training_state(self) -> dict[str, Any]:
        """The state that the next iteration depends on."""
        return {
            "steps": self.steps,
            "recoveries": self.recoveries,
            "attempts": self.attempts,
            "finite_iterations": self.finite_iterations,
            "algorithm": self.algorithm.state_dict(),
            "collector": self.collector.state_dict(),
            "tracker": self.tracker.state_dict(),
        }

    def load_training_state(self, state: dict[str, Any], level: Level) -> None:
        """Restore a training state: ``exact``; at ``episode`` borders, with environments that start new episodes; or
        the ``weights`` only, with new random streams as well."""
        self.steps, self.recoveries = state["steps"], state["recoveries"]
        self.attempts, self.finite_iterations = state["attempts"], state["finite_iterations"]
        self.algorithm.load_state_dict(state["algorithm"], weights_only=level == "weights")
        if level != "weights":
            self.collector.load_state_dict(state["collector"])
        if level == "exact":
            self.tracker.load_state_dict(state["tracker"])
        else:
            self.collector.started = False
        if level == "weights":
            self.collector.reseed()

    def state_dict(self) -> dict[str, Any]:
        return self.training_state() | {"seconds": dict(self.seconds), "finished": list(self.finished)}

    def load_state_dict(self, state: dict[str, Any], level: Level = "exact") -> None:
        self.load_training_state(state, level)
        self.seconds, self.finished = dict(state["seconds"]), [(int(steps), x) for steps, x in state["finished"]]
