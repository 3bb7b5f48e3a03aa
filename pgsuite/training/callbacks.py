"""The built-in callbacks: progress, logs, evaluations, checkpoints, summary."""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pgsuite import distributed
from pgsuite.files import write_text
from pgsuite.nn.policy import Policy
from pgsuite.settings import Checked, Count, Positive
from pgsuite.training import checkpoint
from pgsuite.training.run_dir import Logger
from pgsuite.training.run_lock import CONFIG, RunLock
from pgsuite.training.trainer import Callback, Report, Trainer, slots


@dataclass(kw_only=True)
class Checkpoint(Checked):
    """When checkpoints are saved, and how many are kept."""

    every: Count | None = 250_000  # environment steps between checkpoints; null saves at the end only
    minutes: Positive | None = None  # or minutes between them, whichever comes first
    keep: Count = 3  # number of newest checkpoints that are kept, in addition to the best


@dataclass(kw_only=True)
class Evaluation(Checked):
    """Evaluation by whole episodes, in separate environments, without effect on training."""

    every: Count | None = None  # environment steps between evaluations; null makes none
    episodes: Count = 10  # episodes of each evaluation, one in each of as many environments
    max_steps: Count | None = None  # steps after which an episode is cut; null is its time limit, or without one 30,000
    video_every: Count | None = None  # environment steps between videos of a first episode; null records none
    video: Literal["tensorboard", "mp4", "gif"] = (
        "tensorboard"  # format of videos; files are written to the run's videos/
    )


class EvaluationStoppedError(Exception):
    """An evaluation was asked to stop between two of its steps."""


# (policy, environment steps that it was trained for, whether to record a video, whether to stop, which is asked before
# each step) -> metrics of whole episodes.  Raises EvaluationStoppedError.
Evaluator = Callable[[Policy, int, bool, Callable[[], bool]], dict[str, float]]


class MetricAverager:
    """Accumulates the reports of the iterations between two log entries."""

    def __init__(self) -> None:
        self.returns: list[float] = []
        self.lengths: list[float] = []
        self.channels: dict[str, list[float]] = {}
        self.metrics: dict[str, list[float]] = {}

    def add(self, report: Report) -> None:
        self.returns += report.returns
        self.lengths += report.lengths
        for name, sums in report.channels.items():
            self.channels.setdefault(name, []).extend(sums)
        for name, value in report.metrics.items():
            self.metrics.setdefault(name, []).append(value)

    def scalars(self) -> dict[str, float]:
        """The means, under their names in the logs."""
        scalars = {f"algorithm/{name}": statistics.fmean(values) for name, values in self.metrics.items()}
        if self.returns:
            scalars["episode/return"] = statistics.fmean(self.returns)
            scalars["episode/return_std"] = statistics.pstdev(self.returns)
            scalars["episode/length"] = statistics.fmean(self.lengths)
            scalars["episode/count"] = float(len(self.returns))
            scalars |= {f"episode/{name}": statistics.fmean(sums) for name, sums in self.channels.items()}
        return scalars


class MetricLogger(Callback):
    """Writes the means of all metrics to the loggers, about ``points`` times in a run."""

    def __init__(self, loggers: Sequence[Logger], points: int = 500) -> None:
        self.loggers, self.points, self.averager = loggers, points, MetricAverager()

    def on_start(self, trainer: Trainer) -> None:
        self.logged, self.before = trainer.steps, self.clocks(trainer)

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        self.averager.add(report)
        if not report.passes(trainer.total_steps / self.points) and report.steps < trainer.total_steps:
            return
        scalars, now = self.averager.scalars(), self.clocks(trainer)
        spent = {name: now[name] - self.before[name] for name in now}
        total = max(spent.pop("total"), 1e-9)
        scalars |= {f"time/{name}": seconds / total for name, seconds in spent.items()}
        scalars["time/steps_per_second"] = (report.steps - self.logged) / total
        scalars["time/seconds"] = trainer.seconds["total"]
        for logger in self.loggers:
            logger.write(report.steps, scalars)
        self.averager, self.logged, self.before = MetricAverager(), report.steps, now

    def on_end(self, trainer: Trainer) -> None:
        results = {}
        if trainer.steps >= trainer.total_steps:
            speed = trainer.steps / max(trainer.seconds["total"], 1e-9)
            results = {"return_mean": trainer.return_mean, "steps_per_second": speed}
            played = [part.last["return"] for part in trainer.callbacks if isinstance(part, Evaluate) and part.last]
            results |= {"evaluation_return": played[0]} if played else {}
        for logger in self.loggers:
            logger.close(results)

    def state_dict(self) -> dict[str, Any]:
        return vars(self.averager)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self.averager).update(state)

    @staticmethod
    def clocks(trainer: Trainer) -> dict[str, float]:
        return trainer.seconds | trainer.collector.seconds


class ProgressBar(Callback):
    """Shows steps, speed, mean of the recent returns and remaining time: as a bar in a terminal or a notebook,
    otherwise as lines of text."""

    def __init__(self, console: Console, lines: int = 20, refresh: float = 0.1) -> None:
        """lines: of text in a run.  refresh: seconds between updates of a bar, which a mean over many returns would
        otherwise hold up in each iteration."""
        self.console, self.lines, self.refresh = console, lines, refresh

    def on_start(self, trainer: Trainer) -> None:
        self.began, self.said, self.first = trainer.seconds["total"], trainer.steps, trainer.steps
        self.updated = -math.inf
        self.bar: Progress | None = None
        # In a notebook, rich needs ipywidgets for a bar.
        if self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets") is not None):
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=trainer.total_steps, completed=trainer.steps)
            self.bar.start()

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        elapsed = max(trainer.seconds["total"] - self.began, 1e-9)  # without evaluations and films
        speed = (report.steps - self.first) / elapsed
        if self.bar is None:
            due = report.steps - self.said >= trainer.total_steps / self.lines
        else:
            due = bool(trainer.stop) or perf_counter() - self.updated >= self.refresh
        if not due and report.steps < trainer.total_steps:
            return
        recent = trainer.recent_returns
        line = f"{report.steps:,} steps | {speed:,.0f} steps/s | return {recent.mean:,.1f} over {recent}"
        if self.bar is not None:
            self.bar.update(self.task, completed=report.steps, description=line)
            self.updated = perf_counter()
        else:
            left = max(0.0, (trainer.total_steps - report.steps) / max(speed, 1e-9))
            self.console.print(f"{line} | {left:,.0f} s left")
            self.said = report.steps

    def on_end(self, trainer: Trainer) -> None:
        if self.bar is not None:
            self.bar.stop()


class Checkpoints(Callback):
    """Saves a checkpoint at regular intervals of steps or minutes and at the end of the run, also after an interruption
    or an exception; keeps the last ``keep``.  The first process writes the state of all processes.
    """

    def __init__(self, run: Path, facts: Mapping[str, Any], wanted: Checkpoint) -> None:
        self.run, self.facts, self.wanted = run, dict(facts), wanted

    def on_start(self, trainer: Trainer) -> None:
        self.saved, self.at = trainer.steps, perf_counter()

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        minutes, every = self.wanted.minutes, self.wanted.every
        late = minutes is not None and distributed.any_of(perf_counter() - self.at > 60 * minutes)
        if late or (report.passes(every or math.inf) and trainer.steps > self.saved):
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        failed = trainer.steps < trainer.total_steps and not trainer.stop
        # Another process may not have failed and would not join the gathering.
        alone = failed and distributed.size() > 1
        if trainer.steps > self.saved and not alone:
            self.save(trainer)
        elif distributed.rank() == 0 and self.saved:
            checkpoint.prune(self.run, self.wanted.keep)  # a killed run may not have pruned

    def save(self, trainer: Trainer) -> Path | None:
        """Write the states of all processes and of the callbacks, and the facts.  Returns the path, in the first
        process only."""
        self.saved, self.at = trainer.steps, perf_counter()
        states = distributed.gather(trainer.state_dict())
        if states is None:
            return None
        told = {name: callback.state_dict() for name, callback in slots(trainer.callbacks).items()}
        state = states[0] | {"others": states[1:], "callbacks": told} | self.facts
        path = checkpoint.path_of(self.run, trainer.steps)
        checkpoint.save(state, path)
        checkpoint.prune(self.run, self.wanted.keep)
        return path


class Evaluate(Callback):
    """Evaluates copies of the policy over whole episodes at regular intervals, logs the results, and marks the
    checkpoint of the best evaluation, by ``Algorithm.rank``.

    Each evaluation makes new environments and random streams.  Hence training is the same bit for bit with and without
    evaluations, and every evaluation starts from the same initial states.  Only the first process evaluates.  A signal
    ends an evaluation between two steps, and its results are dropped.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        table: Logger | None,
        loggers: Sequence[Logger],
        checkpoints: Checkpoints,
        wanted: Evaluation,
    ) -> None:
        self.evaluator, self.table, self.loggers = evaluator, table, loggers
        self.checkpoints, self.wanted = checkpoints, wanted
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}

    def on_start(self, trainer: Trainer) -> None:
        best = checkpoint.path_of(self.checkpoints.run, int(self.best.get("steps", 0)))
        if distributed.rank() == 0 and best.exists():
            checkpoint.mark_best(best)  # a killed run may not have marked it

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        wanted, due = self.wanted, report.steps >= trainer.total_steps
        if trainer.stop or not (due or report.passes(wanted.every or math.inf)):
            return
        found: dict[str, float] = {}
        if distributed.rank() == 0:
            film = wanted.video_every is not None and (due or report.passes(wanted.video_every))
            with suppress(EvaluationStoppedError):  # by a signal, after which training stops too
                policy = copy.deepcopy(trainer.algorithm.policy)
                found = self.evaluator(policy, report.steps, film, lambda: bool(trainer.asked))
        found = distributed.broadcast(found)
        if not found:
            return
        if distributed.rank() == 0:
            scalars = {f"evaluation/{name}": x for name, x in found.items()}
            if self.table is not None:
                self.table.write(report.steps, {"time/seconds": trainer.seconds["total"]} | scalars)
            for logger in self.loggers:
                logger.write(report.steps, scalars)
        self.last = {"steps": report.steps} | found
        rank = trainer.algorithm.rank
        if not self.best or rank(found) > rank(self.best):
            self.best = self.last
            path = self.checkpoints.save(trainer)
            if path is not None:
                checkpoint.mark_best(path)

    def on_end(self, trainer: Trainer) -> None:
        if self.table is not None:
            self.table.close({})

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last, self.best = state["last"], state["best"]


class Summary(Callback):
    """Writes summary.json at the start, at least every ``patience`` seconds, and at the end."""

    def __init__(self, path: Path, facts: Mapping[str, Any], patience: float = 10.0) -> None:
        self.path, self.facts, self.patience, self.status = path, dict(facts), patience, "running"

    def on_start(self, trainer: Trainer) -> None:
        self.write(trainer)

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        if perf_counter() - self.at > self.patience:
            self.write(trainer)

    def on_end(self, trainer: Trainer) -> None:
        done = trainer.steps >= trainer.total_steps
        self.status = "finished" if done else "interrupted" if trainer.stop else "failed"
        self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        self.at = perf_counter()
        recent = trainer.recent_returns
        seconds = trainer.seconds["total"]
        evaluations = [part for part in trainer.callbacks if isinstance(part, Evaluate) and part.last]
        summary = self.facts | {
            "status": self.status,
            "steps": trainer.steps,
            "total_steps": trainer.total_steps,
            "seconds": seconds,
            "steps_per_second": trainer.steps / seconds if seconds else 0.0,
            "return_mean": recent.mean if recent.values else None,
            "return_std": recent.std if recent.values else None,
            "return_window": recent.window,
            "episodes": len(recent.values),
            "evaluation": evaluations[0].last | {"best": evaluations[0].best} if evaluations else None,
            "recoveries": trainer.recoveries,
        }
        write_text(self.path, json.dumps(summary, indent=2) + "\n")


class KeepRunDir(Callback):
    """Makes the run directory again where it is deleted or moved during the run, so that what is saved from then on is
    not lost."""

    def __init__(self, lock: RunLock, settings: str, say: Callable[[str], None]) -> None:
        self.lock, self.settings, self.say = lock, settings, say

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        folder = self.lock.folder
        if folder is None or (folder / CONFIG).exists():
            return
        self.lock.take(folder)
        write_text(folder / CONFIG, self.settings)
        self.say(
            f"{folder} was deleted or moved while the run was at {report.steps:,} steps; it is made again, without "
            "earlier checkpoints and without TensorBoard's events, and the run goes on"
        )


class Output:
    """A text stream that drops what it can no longer write, as after ``| head``, instead of raising OSError."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            with suppress(OSError):  # at its end Python flushes the buffer, and would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.stream = open(os.devnull, "w")  # noqa: SIM115
            with suppress(OSError):
                print(f"standard output is lost ({error.strerror}); going on without it", file=sys.stderr, flush=True)


def console() -> Console:
    """The console that commands print to.  Text is printed as it is: markup, emoji codes and numbers in it are not
    interpreted."""
    stream: Any = sys.stdout if sys.stdout is None or isinstance(sys.stdout, Output) else Output(sys.stdout)
    return Console(file=stream, soft_wrap=True, markup=False, emoji=False, highlight=False)
