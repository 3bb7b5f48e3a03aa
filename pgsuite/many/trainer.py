"""The training loop of several runs at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from pgsuite.envs.base import channels_of
from pgsuite.errors import UserError
from pgsuite.many.collect import JointCollector
from pgsuite.many.env import JointEnv
from pgsuite.many.stack import Stack
from pgsuite.rollout import EpisodeTracker
from pgsuite.training.callbacks import ProgressBar
from pgsuite.training.trainer import RecentReturns, Report, Trainer
from pgsuite.types import Metrics, Rollout


class ManyTrainer:
    """Trains the algorithms of S trainers together, each as it would train alone.

    Collecting and learning are one computation for all runs; callbacks, recovery, schedules and training state are each
    trainer's own.  A run that has made its steps, that a callback ends, or whose recovery gives up, is ended alone, and
    the others go on.
    """

    def __init__(
        self,
        trainers: Sequence[Trainer],
        env: JointEnv,
        labels: Sequence[str] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """labels: the names of the runs, for messages.  Raises ValueError for runs that differ in more than numbers."""
        self.trainers, self.env, self.say = list(trainers), env, say
        self.labels = labels or [f"run {s}" for s in range(len(trainers))]
        for kernel in trainers[0].kernels.values():
            kernel.reset()  # what reads from the host for one run cannot for many
        env.poll = getattr(trainers[0].collector, "poll", None)
        self.stack = Stack([trainer.algorithm for trainer in trainers])
        self.algorithm = trainers[0].algorithm
        self.collector = JointCollector([trainer.collector for trainer in trainers], env, self.stack)
        self.tracker = EpisodeTracker(env.num_envs, env.device, channels_of(env))
        for s, trainer in enumerate(trainers):
            for name in ("reward", "length"):
                mine = getattr(self.tracker, name)[s * env.each :][: env.each]
                setattr(trainer.tracker, name, mine.copy_(getattr(trainer.tracker, name)))
            for name, x in trainer.tracker.channels.items():
                mine = self.tracker.channels[name][s * env.each :][: env.each]
                trainer.tracker.channels[name] = mine.copy_(x)
        self.failures: dict[int, UserError] = {}  # by run
        self.left: dict[int, list[Tensor]] = {}  # the tensors of ended runs, which stay as they are
        self.progress: ProgressBar | None = None
        self.stop = 0

    def fit(self) -> None:
        for trainer in self.trainers:
            trainer.start()
        if self.progress is not None:
            self.progress.on_start(self)  # pyright: ignore[reportArgumentType]
        try:
            self.leave_ended()
            while any(self.env.live) and not self.stop:
                self.step()
        finally:
            for trainer, live in zip(self.trainers, self.env.live, strict=True):
                if live:
                    trainer.end()
            if self.progress is not None:
                self.progress.on_end(self)  # pyright: ignore[reportArgumentType]

    def step(self) -> None:
        """Run one iteration of every run."""
        before = self.steps
        reports = self.iterate()
        for s, (trainer, report) in enumerate(zip(self.trainers, reports, strict=True)):
            if not self.env.live[s]:
                continue
            try:
                trainer.conclude(self.env.errors.get(s, report))
            except UserError as error:
                self.failures[s] = error
                self.say(f"{self.labels[s]} is ended, and the others go on: {error}")
                self.leave(s)
        self.leave_ended()
        self.stop = max((trainer.stop for trainer in self.trainers if not trainer.ended_early), default=0)
        if self.progress is not None:
            self.progress.on_iteration(self, Report(before, self.steps, {}, [], [], True))  # pyright: ignore[reportArgumentType]

    def leave_ended(self) -> None:
        """End the runs that have made their steps, and those that a callback ended."""
        for s, trainer in enumerate(self.trainers):
            if self.env.live[s] and (trainer.steps >= trainer.total_steps or trainer.ended_early):
                self.leave(s)

    def leave(self, s: int) -> None:
        """End a run."""
        self.env.live[s] = False
        self.left[s] = self.stack.values_of(s)
        self.trainers[s].end()

    def iterate(self) -> list[Report]:
        """Collect and learn; returns the results of each run, of which those of ended runs are of no meaning."""
        began, collecting = perf_counter(), sum(self.collector.whole.seconds.values())
        for trainer in self.trainers:
            trainer.algorithm.update_schedules(trainer.steps / trainer.total_steps)
        rollout = self.collector.collect(self.algorithm.policy)
        metrics: Metrics = self.stack(self.algorithm.train_on, rollout)
        for s, values in self.left.items():
            self.stack.restore(s, values)
        values, episodes = (x.cpu() for x in self.pack_host_data(rollout, metrics))
        took = perf_counter() - began
        learning = took - (sum(self.collector.whole.seconds.values()) - collecting)
        reports = []
        for s, trainer in enumerate(self.trainers):
            if not self.env.live[s]:
                reports.append(Report(trainer.steps, trainer.steps, {}, [], [], True))
                continue
            reports.append(trainer.report(list(metrics), values[s], episodes[s]))
            trainer.seconds["total"] += took
            trainer.seconds["learning"] += learning
        return reports

    def pack_host_data(self, rollout: Rollout, metrics: Metrics) -> tuple[Tensor, Tensor]:
        """As of a ``Trainer``: [S, len(metrics) + 2], and the returns, lengths and sums of channels of episodes
        [S, 2 + channels, T N]."""
        count = self.stack.count
        finite = self.stack(Rollout.finite, rollout) & self.stack.finite()
        values = [x.double() for x in (*metrics.values(), rollout.mask.sum((1, 2)), ~finite)]
        cells = self.tracker.update(rollout.map(lambda x: x.movedim(0, 1).flatten(1, 2)))
        episodes = [x.unflatten(1, (count, -1)).movedim(1, 0).flatten(1) for x in cells]
        return torch.stack(values, 1), torch.stack(episodes, 1)

    @property
    def asked(self) -> int:
        """Number of the signal by which the runs were asked to stop."""
        return self.trainers[0].asked

    @asked.setter
    def asked(self, number: int) -> None:
        for trainer in self.trainers:
            trainer.asked = number

    @property
    def steps(self) -> int:
        """Environment steps of all runs."""
        return sum(trainer.steps for trainer in self.trainers)

    @property
    def total_steps(self) -> int:
        return sum(trainer.total_steps for trainer in self.trainers)

    @property
    def seconds(self) -> dict[str, float]:
        return {"total": max(trainer.seconds["total"] for trainer in self.trainers)}

    @property
    def recent_returns(self) -> RecentReturns:
        """The recent returns of all runs."""
        found = [trainer.recent_returns for trainer in self.trainers]
        return RecentReturns([x for each in found for x in each.values], found[0].window, found[0].steps)
