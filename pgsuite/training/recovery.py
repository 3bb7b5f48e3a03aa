"""Recovery from non-finite numbers: restore the last finite state and continue at a lower learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from pgsuite import distributed
from pgsuite.algorithms.base import Algorithm
from pgsuite.envs.base import NotFiniteError
from pgsuite.errors import UserError, command
from pgsuite.training import checkpoint
from pgsuite.training.trainer import Report, Trainer
from pgsuite.types import Obs, Rollout, finite_cells

BUNDLE = "crash.pt"


class Recovery:
    """Keeps the training state after each finite iteration, and restores it after a non-finite one, with half the
    learning rate and a new stream of actions, up to ``attempts`` times in a run.

    After that it stops the run with UserError.  The trainer is left in the last finite state, and crash.pt holds that
    state, the rollout and the reason.
    """

    def __init__(self, run: Path, facts: Mapping[str, Any], attempts: int, say: Callable[[str], None]) -> None:
        self.run, self.facts, self.attempts, self.say = run, dict(facts), attempts, say

    def on_start(self, trainer: Trainer) -> None:
        self.keep(trainer)

    def on_finite(self, trainer: Trainer) -> None:
        self.keep(trainer)

    def on_nonfinite(self, trainer: Trainer, report: Report | NotFiniteError) -> None:
        rollout = None if isinstance(report, NotFiniteError) else trainer.collector.buffer.read()
        why = str(report) if isinstance(report, NotFiniteError) else diagnose(trainer, report)
        trainer.load_training_state(self.good, trainer.level)
        if trainer.recoveries < self.attempts:
            trainer.recoveries += 1
            trainer.algorithm.slow_down()
            trainer.collector.reseed()
            self.keep(trainer)
            self.say(
                f"{why}; back at {trainer.steps:,} steps with half the learning rate "
                f"(attempt {trainer.recoveries} of {self.attempts})"
            )
            return
        hint = ""
        if rollout is not None:
            seen = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
            bundle = {"why": why, "steps": trainer.steps, "state": self.good, "rollout": seen} | self.facts
            if distributed.rank() == 0:
                checkpoint.save(clone(bundle), self.run / BUNDLE)
            hint = f"; {command('replay')} crash={self.run / BUNDLE} shows the update that failed"
        advice = "A lower learning rate, gradient clipping or scale_reward=true may help"
        raise UserError(f"{why}, after {self.attempts} recoveries{hint}. {advice}")

    def keep(self, trainer: Trainer) -> None:
        self.good = clone(trainer.training_state())


def clone(state: Any) -> Any:
    """A deep copy of a state, with each tensor on its device."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: clone(x) for key, x in state.items()}
    return type(state)(map(clone, state)) if isinstance(state, list | tuple) else state


def diagnose(trainer: Trainer, report: Report) -> str:
    """A message that names what was not finite, and where."""
    if found := next(filter(None, distributed.gather(find_nonfinite(trainer.collector.buffer.read())) or ()), None):
        where = f"in the rollout that ended at {report.steps:,} steps"
        return f"{trainer.collector.env.name} broke: {found}, {where}"
    broken = [name for name, value in report.metrics.items() if not math.isfinite(value)]
    broken = broken or nonfinite_parameters(trainer.algorithm)
    return f"training diverged: {', '.join(broken)} not finite at {report.steps:,} steps"


def nonfinite_parameters(algorithm: Algorithm) -> list[str]:
    """The names of the parameters and running statistics that are not finite."""
    return [
        f"{name}.{key}"
        for name, part in algorithm.parts.items()
        for key, x in part.state_dict().items()
        if not bool(x.isfinite().all())
    ]


def find_nonfinite(rollout: Rollout) -> str | None:
    """The first non-finite reward or observation that followed a finite action, with environment and step; None if
    there is none."""
    asked = finite_cells(rollout.action, rollout.mask) & rollout.mask

    def look(name: str, x: Obs) -> str | None:
        if isinstance(x, dict):
            return next(filter(None, (look(f"{name} {key!r}", part) for key, part in x.items())), None)
        if bool((cells := ~finite_cells(x, rollout.mask) & asked).any()):
            t, i = cells.nonzero()[0].tolist()
            return f"environment {i} gave {name} {x[t, i].tolist()} at step {t}"
        return None

    return look("the reward", rollout.reward.unsqueeze(-1)) or look("the observation", rollout.next_obs)
