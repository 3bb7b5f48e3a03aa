"""Searches and populations: many runs of one command, in worker processes that end with the process that began them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgsuite.app.api import override, train_together, train_with
from pgsuite.app.many import how_together
from pgsuite.app.recipes import flat
from pgsuite.app.resume import identity
from pgsuite.app.sweeps import Command, Sweep, cores_each
from pgsuite.app.train import Outcome, answering_signals
from pgsuite.errors import UserError, reason
from pgsuite.files import write_text
from pgsuite.settings import Count, flatten
from pgsuite.sweep import space
from pgsuite.sweep.space import Dimension
from pgsuite.training import callbacks
from pgsuite.training.run_lock import RunLock
from pgsuite.training.trainer import Callback, Report, Trainer

Ended = Outcome | str  # how a run ended: with its outcome, or why it failed
RECORD = "sweep.json"  # by which the directory of a search or a population is known
ASKED = "asked to stop"


@dataclass
class Plan:
    """What a sweep varies, and where it is kept."""

    folder: Path
    config: dict[str, Any]  # of the runs, with the values of the command line
    overrides: list[str]  # of the command line, without those of the sweep
    space: dict[str, Dimension]
    choices: dict[str, Any]
    threads: list[str]  # overrides by which runs at a time share the cores

    def say(self, line: str) -> None:
        callbacks.console().print(line)

    def given(self, values: dict[str, Any]) -> list[str]:
        """The overrides of a run with these values of the varied settings."""
        present = flat(self.config)
        return [*self.overrides, *(space.override(name, x, present[name]) for name, x in values.items())]

    def record(self, kind: str, **own: Any) -> dict[str, Any]:
        """The beginning of the sweep's record, with what may not change where it goes on: the settings of the runs, the
        ranges, and the sweep's ``own`` settings.  Raises UserError if the directory holds a sweep in which these are
        different."""
        ranges = {f"sweep.space.{name}": {x.kind: x.values} for name, x in self.space.items()}
        judged = {"evaluation.every": self.config["evaluation"]["every"]}
        settings = json.loads(json.dumps(flatten(identity(self.config)) | judged | ranges | own))
        facts = {"kind": kind, "algo": self.choices["algo"], "env": self.choices["env"], "settings": settings}
        try:
            before = json.loads((self.folder / RECORD).read_text())
        except FileNotFoundError:
            return facts
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder / RECORD} cannot be read ({reason(error)}): give another hydra.run.dir="
            ) from error
        if before.get("kind") != kind:
            raise UserError(f"{self.folder} holds a {before.get('kind')}: give another hydra.run.dir=")
        old = before["settings"]
        if differing := [key for key in sorted(old | settings) if old.get(key, ...) != settings.get(key, ...)]:
            raise UserError(f"{self.folder} holds a {kind} with another {differing[0]}: give another hydra.run.dir=")
        return before

    def write(self, record: dict[str, Any]) -> None:
        write_text(self.folder / RECORD, json.dumps(record) + "\n")


@dataclass
class Job:
    """A run of a sweep."""

    plan: Plan
    folder: Path
    values: dict[str, Any]  # of what varies
    parts: Sequence[Callback]


class Pool:
    """Worker processes, which end at once when this process does, however it ends."""

    def __init__(self, jobs: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.event, self.number = context.Event(), 0
        self.executor = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(self.event,))

    @property
    def asked(self) -> int:
        """Number of the signal by which the sweep was asked to stop; its runs then stop after their iterations."""
        return self.number

    @asked.setter
    def asked(self, number: int) -> None:
        self.number = number
        self.event.set()

    def submit(self, jobs: Sequence[Job]) -> Future[list[Ended]]:
        """Have runs trained, at once if they are several, each from its last checkpoint if it has one; what they print
        is in a file beside the directory of the first."""
        given = []
        for job in jobs:
            own = [override("hydra.run.dir", str(job.folder)), "resume=auto"]
            given.append(([*job.plan.given(job.values), *job.plan.threads, *own], list(job.parts)))
        return self.executor.submit(train, given, jobs[0].folder.with_suffix(".log"))

    def close(self) -> None:
        self.event.set()
        self.executor.shutdown(cancel_futures=True)


def first(going: dict[Future[list[Ended]], list[int]]) -> list[tuple[int, Ended]]:
    """Take from ``going`` what is done, of which there is at least one: the numbers of runs, each with its outcome, or
    why it failed.  Raises UserError if a worker process was lost."""
    found: list[tuple[int, Ended]] = []
    for future in wait(list(going), return_when=FIRST_COMPLETED).done:
        numbers = going.pop(future)
        try:
            found += zip(numbers, future.result(), strict=True)
        except BrokenProcessPool as error:
            why = "a worker process was lost, perhaps for want of memory"
            raise UserError(f"{why}: the same command goes on, also with another sweep.jobs=") from error
        except UserError as error:
            found += [(number, str(error)) for number in numbers]
        except Exception as error:
            found += [(number, reason(error)) for number in numbers]
    return found


def train(commands: Sequence[tuple[list[str], list[Callback]]], log: Path) -> list[Ended]:
    """Train runs in this process, and print to a file."""
    commands = [(overrides, [*parts, StopIfAsked()]) for overrides, parts in commands]
    with log.open("a") as file, redirect_stdout(file):
        outcomes = train_together(commands) if len(commands) > 1 else [train_with(*commands[0])]
    return [str(x) if isinstance(x, UserError) else x for x in outcomes]


_event: Any = None  # in a worker, set when the sweep was asked to stop


class StopIfAsked(Callback):
    def on_start(self, trainer: Trainer) -> None:
        if _event is not None and _event.is_set():
            trainer.end_early(ASKED)

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        self.on_start(trainer)


def _begin(event: Any) -> None:
    """Prepare a worker process."""
    global _event
    _event = event
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between runs: the process that began it has the worker stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # as kill -9 would: what is saved is whole


@dataclass(kw_only=True)
class SettingsSweep(Sweep):
    """A sweep over ranges of settings."""

    jobs: Count = 2  # processes at a time
    at_once: Count = 1  # runs that a process trains at once, as seeds=16 does; of these, only numbers may vary
    space: dict[str, Any] = field(
        default_factory=dict
    )  # ranges of settings, as sweep.space.algo.lr={log: [1e-5, 1e-2]}

    @abstractmethod
    def run(self, plan: Plan, pool: Pool) -> float | None:
        """Train until all is done or the pool is asked to stop; returns the best run's objective.  Raises UserError."""

    def start(self, command: Command) -> tuple[float | None, int]:
        config = command.config
        for setting in ("resume", "seeds", "batch"):
            if config[setting]:
                raise UserError(f"a sweep over settings goes without {setting}=: leave it out")
        if config["torch_threads"] == "measure":
            raise UserError("torch_threads=measure measures one run: give a number")
        given = [x for x in command.overrides if not _is_of_sweep(x)]
        threads = [] if config["env_threads"] else [f"env_threads={cores_each(self.jobs)}"]
        plan = Plan(command.folder, config, given, space.parse(self.space, config), command.choices, threads)
        for name in plan.space:
            is_schedule = isinstance(flat(config)[name], dict)  # whose form is given, and its size varied
            if not is_schedule and any(x.lstrip("+~").partition("=")[0] == name for x in given):
                raise UserError(f"{name} is varied, so it cannot be given: leave it out, or sweep.space.{name}=null")
        if self.at_once > 1:
            for name, x in plan.space.items():
                is_number = x.kind in ("uniform", "log") or all(isinstance(value, float) for value in x.values)
                if not (is_number and name.startswith("algo.")):
                    raise UserError(
                        f"sweep.at_once={self.at_once} trains runs at once, which differ in real numbers of the method "
                        f"alone, and sweep.space.{name} is none: sweep.space.{name}=null leaves it out"
                    )
            plan.overrides += [f"algo.{name}={value}" for name, value in how_together(config).items()]
        lock = RunLock()
        lock.take(plan.folder)
        try:
            pool = Pool(self.jobs)
            try:
                with answering_signals(pool):
                    best = self.run(plan, pool)
            except UserError:
                if not pool.asked:  # which a worker that was still starting did not live through
                    raise
                best = None
            finally:
                pool.close()
        finally:
            lock.release()
        if pool.asked:
            plan.say(f"{signal.Signals(pool.asked).name}, saved; the same command goes on")
        return best, pool.asked


def _is_of_sweep(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0]
    return key == "sweep" or key.startswith(("sweep.", "sweep/"))
