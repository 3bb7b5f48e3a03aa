"""The loop around an algorithm: budget, bookkeeping and callbacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from pgsuite import parallel
from pgsuite.algorithms.base import Algorithm
from pgsuite.rollout import Collector, EpisodeTracker


@dataclass
class Report:
    """What one iteration did, on the host."""

    steps: int  # of the environments so far
    metrics: dict[str, float]
    returns: list[float]  # of the episodes that finished
    lengths: list[float]  # in steps


class Callback:
    """Told what happens; overrides what it cares for."""

    def on_start(self, trainer: Trainer) -> None: ...

    def on_iteration(self, trainer: Trainer, report: Report) -> None: ...

    def on_end(self, trainer: Trainer) -> None:
        """Training is over, finished or not."""


@dataclass
class Trainer:
    """Runs an algorithm until its environments have made ``total_steps`` steps.

    Only steps that something real happened in are counted, over all processes.  ``state_dict`` holds everything that
    the rest of the run depends on.
    """

    algorithm: Algorithm
    collector: Collector
    total_steps: int
    callbacks: Sequence[Callback] = ()
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("total", "learning"), 0.0))

    def __post_init__(self) -> None:
        for percent in reversed(range(101)):  # settings may change in the course of the run
            self.algorithm.progress(percent / 100)
            self.algorithm.validate(self.collector)
        env = self.collector.env
        self.tracker = EpisodeTracker(env.num_envs, env.device)
        self.recent: list[float] = []  # returns of the episodes that finished in the last tenth of the steps

    def fit(self) -> None:
        for callback in self.callbacks:
            callback.on_start(self)
        try:
            while self.steps < self.total_steps:
                report = self.iterate()
                for callback in self.callbacks:
                    callback.on_iteration(self, report)
        finally:
            for callback in self.callbacks:
                callback.on_end(self)

    def iterate(self) -> Report:
        began, collecting = perf_counter(), sum(self.collector.seconds.values())
        self.algorithm.progress(self.steps / self.total_steps)
        metrics = self.algorithm.iterate(self.collector)
        rollout = self.collector.buffer.read()
        returns, lengths = self.tracker.update(rollout)
        names, values = list(metrics), torch.stack([x.to(rollout.reward) for x in metrics.values()])
        read = parallel.mean(values).tolist()
        self.steps += int(parallel.total(rollout.mask.sum()))
        report = Report(self.steps, dict(zip(names, read, strict=True)), returns.tolist(), lengths.tolist())
        if self.steps > 0.9 * self.total_steps:
            self.recent += report.returns
        took = perf_counter() - began
        self.seconds["total"] += took
        self.seconds["learning"] += took - (sum(self.collector.seconds.values()) - collecting)
        return report

    @property
    def return_mean(self) -> float:
        """Mean undiscounted return of the training episodes that finished in the last tenth of the steps."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    @property
    def return_std(self) -> float:
        """Their deviation."""
        if not self.recent:
            return math.nan
        mean = self.return_mean
        return math.sqrt(sum((x - mean) ** 2 for x in self.recent) / len(self.recent))

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "recent": list(self.recent),
            "algorithm": self.algorithm.state_dict(),
            "collector": self.collector.state_dict(),
            "tracker": self.tracker.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.recent = state["steps"], list(state["recent"])
        self.algorithm.load_state_dict(state["algorithm"])
        self.collector.load_state_dict(state["collector"])
        self.tracker.load_state_dict(state["tracker"])
