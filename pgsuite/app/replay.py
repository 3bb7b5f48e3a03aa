"""Replay of the update at which a run failed."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from pgsuite import settings
from pgsuite.app.build import build, instantiate, parse_run_config, to_dict
from pgsuite.errors import UserError, reason
from pgsuite.training import checkpoint
from pgsuite.training.callbacks import console
from pgsuite.training.recovery import BUNDLE, find_nonfinite, nonfinite_parameters
from pgsuite.trust import Trust, source_of, within
from pgsuite.types import Rollout


@dataclass(kw_only=True)
class Replaying:
    """The settings of a replay."""

    crash: str = ""  # a crash.pt, or the run directory that contains it
    trust: Trust = False  # classes from outside pgsuite that a bundle of another user may name; true for any

    def __post_init__(self) -> None:
        settings.check(self, label="")
        if not self.crash:
            raise ValueError("crash must be a crash bundle, such as crash=runs/ppo-HalfCheetah/.../crash.pt")


def replay(cfg: DictConfig) -> None:
    """Repeat the update of a crash bundle on its rollout, and print where non-finite numbers first occur.

    Raises UserError.
    """
    wanted: Replaying = instantiate(to_dict(cfg), "the replay")
    given = Path(wanted.crash)
    bundle = checkpoint.load(given / BUNDLE if given.is_dir() else given)
    if "rollout" not in bundle:
        raise UserError(f"{given} is no crash bundle: a run writes one, {BUNDLE}, when it has to give up")
    try:
        with within(source_of(given, bundle, wanted.trust)):
            _replay(bundle)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{given} does not fit the run that it says it is of: {reason(error)[:200]}") from error


def _replay(bundle: dict[str, Any]) -> None:
    say = console().print
    # Compiled operations could not be located in the source.
    trainer = build(parse_run_config(bundle["config"] | {"execution": "eager", "callbacks": {}, "loggers": {}}))
    algorithm, env = trainer.algorithm, trainer.collector.env
    say(f"seed {bundle['config']['seed']}, at {bundle['steps']:,} steps: {bundle['why']}")
    algorithm.load_state_dict(bundle["state"]["algorithm"])
    algorithm.update_schedules(bundle["steps"] / trainer.total_steps)
    rollout = Rollout(**bundle["rollout"]).map(lambda x: x.to(env.device))
    before = [*nonfinite_parameters(algorithm), *filter(None, [find_nonfinite(rollout)])]
    say(f"before the update: {'; '.join(before) or 'everything is finite'}")
    with warnings.catch_warnings(record=True) as told, torch.autograd.set_detect_anomaly(True):
        try:
            metrics = algorithm.train_on(rollout)
        except RuntimeError as error:
            say(f"in the update: {error}")
            for line in filter(None, map(origin, told)):
                say(line)
            return
    for name, value in metrics.items():
        say(f"{'  ' if bool(value.isfinite()) else '! '}{name} = {float(value):.6g}")
    after = nonfinite_parameters(algorithm)
    say(f"after it: {', '.join(after)} not finite" if after else "after it: everything is finite")


def origin(told: warnings.WarningMessage) -> str | None:
    """Location of the operation with the non-finite gradient, from the traceback in torch's warning."""
    frames = re.findall(r'File "(.+)", line (\d+), in .+\n +(.+)', str(told.message))
    return "which is the gradient of {}:{}: {}".format(*frames[-1]) if frames else None


def main() -> None:
    """The command line."""
    from pgsuite.app import cli  # which configures Hydra

    cli.main(replay, "replay")
