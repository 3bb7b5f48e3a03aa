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
ENOUGH = 100  # finite iterations after which attempts are counted anew
FEW = 8  # numbers of an observation that are shown one by one
MEND_ENV = "Its rewards and observations must be finite"
MEND_UPDATE = "A lower learning rate, gradient clipping or scale_reward=true may help"


class Recovery:
    """Keeps the training state after each finite iteration, and restores it after a non-finite one, with a new stream
    of actions, and with half the learning rate unless the environments are the cause.

    After ``attempts`` restorations, none of them followed by ``ENOUGH`` finite iterations, it stops the run with
    UserError.  The trainer is left in the last finite state, and crash.pt holds that state, the rollout and the reason.
    """

    def __init__(self, run: Path, facts: Mapping[str, Any], attempts: int, say: Callable[[str], None]) -> None:
        self.run, self.facts, self.attempts, self.say = run, dict(facts), attempts, say

    def on_start(self, trainer: Trainer) -> None:
        self.keep(trainer)

    def on_finite(self, trainer: Trainer) -> None:
        trainer.finite_iterations += 1
        if trainer.finite_iterations >= ENOUGH:
            trainer.attempts = 0
        self.keep(trainer)

    def on_nonfinite(self, trainer: Trainer, report: Report | NotFiniteError) -> None:
        rollout = None if isinstance(report, NotFiniteError) else trainer.collector.buffer.read()
        given = str(report) if isinstance(report, NotFiniteError) else given_nonfinite(trainer, report)
        why = given or diverged(trainer, report)  # pyright: ignore[reportArgumentType]
        trainer.load_training_state(self.good, trainer.level)
        if trainer.attempts < self.attempts:
            trainer.recoveries += 1
            trainer.attempts += 1
            trainer.finite_iterations = 0
            if not given:
                trainer.algorithm.slow_down()
            trainer.collector.reseed()
            self.keep(trainer)
            self.say(
                f"{why}; back at {trainer.steps:,} steps with {'other actions' if given else 'half the learning rate'} "
                f"(attempt {trainer.attempts} of {self.attempts})"
            )
            return
        hint = ""
        if rollout is not None:
            seen = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
            bundle = {"why": why, "steps": trainer.steps, "state": self.good, "rollout": seen} | self.facts
            if distributed.rank() == 0:
                checkpoint.save(clone(bundle), self.run / BUNDLE)
            hint = f"; {command('replay')} crash={self.run / BUNDLE} shows the update that failed"
        raise UserError(f"{why}, after {self.attempts} recoveries{hint}. {MEND_ENV if given else MEND_UPDATE}")

    def keep(self, trainer: Trainer) -> None:
        self.good = clone(trainer.training_state())


def clone(state: Any) -> Any:
    """A deep copy of a state, with each tensor on its device."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: clone(x) for key, x in state.items()}
    return type(state)(map(clone, state)) if isinstance(state, list | tuple) else state


def given_nonfinite(trainer: Trainer, report: Report) -> str | None:
    """A message that names what an environment gave that was not finite, and where; None if none did.  Collective."""
    found = distributed.gather(find_nonfinite(trainer.collector.buffer.read())) or []
    where = f"in the rollout that ended at {report.steps:,} steps"
    broken = next((f"{trainer.collector.env.name} broke: {x}, {where}" for x in found if x), None)
    return distributed.broadcast(broken)


def diverged(trainer: Trainer, report: Report) -> str:
    """A message that names the metrics of an update that were not finite, or else the parameters."""
    broken = [f"{name} = {value}" for name, value in report.metrics.items() if not math.isfinite(value)]
    broken = broken or nonfinite_parameters(trainer.algorithm) or ["actions"]
    return f"training diverged: {', '.join(broken)}: not finite at {report.steps:,} steps"


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
    before = asked.roll(1, 0)
    before[0] = True  # rollouts are finite that another one follows

    def look(name: str, x: Obs, answers: Tensor) -> str | None:
        if isinstance(x, dict):
            parts = (look(f"{name} {key!r}", part, answers) for key, part in x.items())
            return next(filter(None, parts), None)
        if bool((cells := ~finite_cells(x, rollout.mask) & answers).any()):
            t, i = cells.nonzero()[0].tolist()
            return f"environment {i} gave {name} {shown(x[t, i])} at step {t}"
        return None

    return (
        look("the reward", rollout.reward.unsqueeze(-1), asked)
        or look("the observation", rollout.next_obs, asked)
        or look("the first observation", rollout.obs, before & rollout.start & rollout.mask)
    )


def shown(x: Tensor) -> str:
    """All values of a small tensor, or of a large one how many are not finite, and the first of these."""
    if x.numel() <= FEW:
        return str(x.tolist())
    at = (~x.isfinite()).nonzero()
    first = at[0].tolist()
    return f"of {x.numel()} numbers, {len(at)} of them not finite, the first {x[tuple(first)].item()} at {first}"
