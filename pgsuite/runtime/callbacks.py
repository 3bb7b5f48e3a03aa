"""What happens around training: progress, logs, checkpoints, the watch for divergence."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pgsuite.runtime import checkpoint
from pgsuite.runtime.loggers import Logger
from pgsuite.runtime.schema import UserError
from pgsuite.runtime.trainer import Callback, Report, Trainer
from pgsuite.types import Obs, Rollout


class Window:
    """Reports gathered between two log lines."""

    def __init__(self) -> None:
        self.returns: list[float] = []
        self.lengths: list[float] = []
        self.metrics: dict[str, list[float]] = {}

    def add(self, report: Report) -> None:
        self.returns += report.returns
        self.lengths += report.lengths
        for name, value in report.metrics.items():
            self.metrics.setdefault(name, []).append(value)

    def scalars(self) -> dict[str, float]:
        """Means, by the names that the logs carry."""
        scalars = {f"algorithm/{name}": sum(values) / len(values) for name, values in self.metrics.items()}
        if self.returns:
            mean = sum(self.returns) / len(self.returns)
            scalars["episode/return"] = mean
            scalars["episode/return_std"] = math.sqrt(sum((x - mean) ** 2 for x in self.returns) / len(self.returns))
            scalars["episode/length"] = sum(self.lengths) / len(self.lengths)
            scalars["episode/count"] = float(len(self.returns))
        return scalars


class Log(Callback):
    """Writes means of everything to the loggers, about ``points`` times in a run."""

    def __init__(self, loggers: list[Logger], points: int = 500) -> None:
        self.loggers, self.points = loggers, points

    def on_start(self, trainer: Trainer) -> None:
        self.window, self.logged = Window(), trainer.steps
        self.before = self.clocks(trainer)

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        self.window.add(report)
        if report.steps - self.logged < trainer.total_steps / self.points and report.steps < trainer.total_steps:
            return
        scalars, now = self.window.scalars(), self.clocks(trainer)
        spent = {name: now[name] - self.before[name] for name in now}
        total = max(spent.pop("total"), 1e-9)
        scalars |= {f"time/{name}": seconds / total for name, seconds in spent.items()}
        scalars["time/steps_per_second"] = (report.steps - self.logged) / total
        for logger in self.loggers:
            logger.write(report.steps, scalars)
        self.window, self.logged, self.before = Window(), report.steps, now

    def on_end(self, trainer: Trainer) -> None:
        for logger in self.loggers:
            logger.close({"return_mean": trainer.return_mean})

    @staticmethod
    def clocks(trainer: Trainer) -> dict[str, float]:
        return trainer.seconds | trainer.collector.seconds


class Bar(Callback):
    """Steps, speed, mean return of the last hundred episodes and time left: a bar in a terminal, else plain lines."""

    def __init__(self, console: Console, lines: int = 20) -> None:
        self.console, self.lines = console, lines

    def on_start(self, trainer: Trainer) -> None:
        self.returns: list[float] = []
        self.began, self.said, self.first = perf_counter(), trainer.steps, trainer.steps
        self.bar: Progress | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=trainer.total_steps, completed=trainer.steps)
            self.bar.start()

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        self.returns = (self.returns + report.returns)[-100:]
        elapsed = max(perf_counter() - self.began, 1e-9)
        speed = (report.steps - self.first) / elapsed
        mean = f"{sum(self.returns) / len(self.returns):,.1f}" if self.returns else "none yet"
        line = f"{report.steps:,} steps | {speed:,.0f} steps/s | return {mean}"
        if self.bar is not None:
            self.bar.update(self.task, completed=report.steps, description=line)
        elif report.steps - self.said >= trainer.total_steps / self.lines or report.steps >= trainer.total_steps:
            left = max(0.0, (trainer.total_steps - report.steps) / max(speed, 1e-9))
            self.console.print(f"{line} | {left:,.0f} s left", highlight=False)
            self.said = report.steps

    def on_end(self, trainer: Trainer) -> None:
        if self.bar is not None:
            self.bar.stop()


class Checkpoints(Callback):
    """Saves the run every ``every`` steps and at the end, however it comes about."""

    def __init__(self, run: Path, facts: Mapping[str, Any], every: int) -> None:
        self.run, self.facts, self.every = run, dict(facts), every  # every checkpoint holds the facts
        self.sealed = False  # whether what comes is no longer worth saving

    def on_start(self, trainer: Trainer) -> None:
        self.saved = trainer.steps

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        if report.steps - self.saved >= self.every:
            self.save(trainer.state_dict())

    def on_end(self, trainer: Trainer) -> None:
        if trainer.steps > self.saved and not self.sealed:
            self.save(trainer.state_dict())

    def save(self, state: dict[str, Any]) -> Path:
        path = checkpoint.path_of(self.run, state["steps"])
        checkpoint.save(state | self.facts, path)
        self.saved = state["steps"]
        return path


class DivergenceWatch(Callback):
    """Stops a run whose rollouts, loss or parameters are no longer finite, after saving the last state in which they
    were.

    A good state is kept in memory about every ``interval`` seconds, so what is saved is at most that old.  It comes
    before ``Checkpoints`` among the callbacks, so that nothing broken is ever saved.
    """

    def __init__(self, checkpoints: Checkpoints, interval: float = 1.0) -> None:
        self.checkpoints, self.interval = checkpoints, interval

    def on_start(self, trainer: Trainer) -> None:
        self.keep(trainer)

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        due = perf_counter() - self.kept > self.interval
        if where := unreal(trainer.collector.buffer.read()):
            self.stop(
                f"{trainer.collector.env.name} broke: {where}, in the rollout that ended at {report.steps:,} steps"
            )
        broken = [name for name, value in report.metrics.items() if not math.isfinite(value)]
        if not broken and due:
            modules = [part for part in vars(trainer.algorithm).items() if hasattr(part[1], "named_parameters")]
            broken = [
                f"{part}.{name}"
                for part, module in modules
                for name, p in module.named_parameters()
                if not bool(p.isfinite().all())
            ]
        if broken:
            self.stop(
                f"training diverged: {', '.join(broken)} not finite at {report.steps:,} steps. A lower learning rate, "
                "gradient clipping or scale_reward=true may help"
            )
        if due:
            self.keep(trainer)

    def stop(self, why: str) -> NoReturn:
        path = self.checkpoints.save(self.good)
        self.checkpoints.sealed = True
        raise UserError(f"{why}; the last good state, at {self.checkpoints.saved:,} steps, is in {path}")

    def keep(self, trainer: Trainer) -> None:
        self.good, self.kept = copy.deepcopy(trainer.state_dict()), perf_counter()


def unreal(rollout: Rollout) -> str | None:
    """Which environment gave what that is no number, and when, if any did; nothing if the actions were none either."""

    def look(name: str, x: Obs) -> str | None:
        if isinstance(x, dict):
            return next(filter(None, (look(f"{name} {key!r}", part) for key, part in x.items())), None)
        if x.is_floating_point() and bool((cells := (~x.isfinite()).flatten(2).any(-1) & rollout.mask).any()):
            t, i = cells.nonzero()[0].tolist()
            return f"environment {i} gave {name} {x[t, i].tolist()} at step {t}"
        return None

    if not bool(rollout.action.isfinite().all()):
        return None
    return look("the reward", rollout.reward.unsqueeze(-1)) or look("the observation", rollout.next_obs)


class Summary(Callback):
    """Writes summary.json at the end, finished or not."""

    def __init__(self, path: Path, facts: Mapping[str, Any], versions: Callable[[], dict[str, str]]) -> None:
        self.path, self.facts, self.versions = path, dict(facts), versions

    def on_end(self, trainer: Trainer) -> None:
        mean, std = (None if math.isnan(x) else x for x in (trainer.return_mean, trainer.return_std))
        seconds = trainer.seconds["total"]
        env = trainer.collector.env
        summary = self.facts | {
            "steps": trainer.steps,
            "seconds": seconds,
            "steps_per_second": trainer.steps / seconds if seconds else 0.0,
            "return_mean": mean,
            "return_std": std,
            "episodes": len(trainer.recent),
            "backend": env.backend,
            "device": str(env.device),
            "versions": self.versions(),
        }
        self.path.write_text(json.dumps(summary, indent=2) + "\n")


def console() -> Console:
    """Where a run talks to people."""
    return Console(file=sys.stdout, soft_wrap=True)
