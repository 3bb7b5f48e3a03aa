"""Training: from a composed configuration to a run directory."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any, Protocol

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from pgsuite import distributed
from pgsuite.app import recipes
from pgsuite.app.build import (
    build,
    check_alike,
    commit,
    describe,
    instantiate,
    parse_run_config,
    spaces_of,
    to_dict,
    versions,
)
from pgsuite.app.evaluate import make_evaluator
from pgsuite.app.initialize import initialize
from pgsuite.app.resume import find_run_to_resume, new_run_dir, resume_trainer
from pgsuite.app.schema import Run
from pgsuite.app.sweeps import Command, Sweep
from pgsuite.app.threads import measured
from pgsuite.errors import UserError, command
from pgsuite.files import write_text
from pgsuite.nn.configs import CriticConfig
from pgsuite.settings import flatten
from pgsuite.training import callbacks, checkpoint, loggers
from pgsuite.training.profiling import Profile
from pgsuite.training.recovery import Recovery
from pgsuite.training.run_dir import RunDir
from pgsuite.training.run_lock import CONFIG, RunLock
from pgsuite.training.trainer import Callback, Trainer
from pgsuite.training.video import Gif
from pgsuite.trust import adopt, sign, within


@dataclass
class Outcome:
    """Result of ``run``."""

    folder: Path  # the run directory; of a resumed run, its original one
    steps: int  # environment steps
    stopped: int = 0  # number of the signal that stopped the run; 0 if it finished, or a callback ended it
    ended_early: str = ""  # why a callback ended it


def train(cfg: DictConfig) -> float | None:
    """Train, and write config.yaml, TensorBoard events, metrics.csv, checkpoints and summary.json to Hydra's run
    directory, or to that of the resumed run.

    Returns the objective of sweeps: the return of the last evaluation, or without evaluations the ``return_mean`` of
    the run.  Exits with code 0 after SIGINT and 143 after SIGTERM.  Raises UserError.
    """
    if cfg.sweep is not None:
        return _sweep(cfg)
    if cfg.seeds is not None or cfg.batch:
        return _train_many(cfg)
    outcome = run(cfg, HydraConfig.get(), resume_with=_resume_command)
    if outcome.stopped:
        sys.exit(0 if outcome.stopped == signal.SIGINT else 128 + outcome.stopped)
    return objective(outcome.folder) if distributed.rank() == 0 else None


def _train_many(cfg: DictConfig) -> float | None:
    """Train several runs at once; returns the mean of their objectives."""
    from pgsuite.app.many import run_many

    outcomes = run_many(cfg, HydraConfig.get())
    if stopped := next((x.stopped for x in outcomes if x.stopped), 0):
        sys.exit(0 if stopped == signal.SIGINT else 128 + stopped)
    found = [objective(outcome.folder) for outcome in outcomes]
    return None if None in found else fmean(x for x in found if x is not None)


def _sweep(cfg: DictConfig) -> float | None:
    """Train the runs of a search or a population; returns the objective of the best."""
    config, hydra = to_dict(cfg), HydraConfig.get()
    given, folder = config.pop("sweep"), Path(hydra.runtime.output_dir)
    sources = [source for source in hydra.runtime.config_sources if source.schema == "file"]
    paths = [f"file://{source.path}" for source in sources if source.provider != "main"]  # as of --config-dir
    overrides = [*hydra.overrides.task, *([f"hydra.searchpath={paths}"] if paths else [])]
    command_line = Command(folder, config, overrides, dict(hydra.runtime.choices))
    try:
        recipes.refuse_unknown(hydra)
        if hydra.mode is RunMode.MULTIRUN:
            raise UserError("a sweep over settings goes without -m and sweep=local: leave it out")
        if distributed.size() > 1:
            raise UserError("a sweep over settings starts its processes itself: start it without torchrun")
        sweep: Sweep = instantiate(given, "sweep", Sweep)
        best, stopped = sweep.start(command_line)
    finally:
        remove_empty(folder, *folder.parents[:2])
    if stopped:
        sys.exit(0 if stopped == signal.SIGINT else 128 + stopped)
    return best


def _resume_command(folder: Path) -> str:
    start = command("train")
    if distributed.size() > 1:
        start = f"torchrun --nproc-per-node={distributed.local_size()} {start.removeprefix('python ')}"
    return f"{start} resume={folder}"


def run(
    cfg: DictConfig, hydra: HydraConf, *, resume_with: Callable[[Path], str], callbacks: Sequence[Callback] = ()
) -> Outcome:
    """Train with a composed configuration, in ``hydra.runtime.output_dir`` or in the directory of the resumed run,
    which no other process may use meanwhile.  A directory that is named by the time takes another name where it is
    taken.

    hydra: Hydra's node of the configuration, with the choices, overrides and config sources of this run.
    resume_with: the command that resumes a run directory, for the message after a signal.  callbacks: in addition to
    those of the configuration.  Raises UserError.
    """
    made, lock = Path(hydra.runtime.output_dir), RunLock()
    try:
        with within():
            return _run(cfg, hydra, lock, resume_with, callbacks)
    finally:
        made_here = (lock.folder or made, made, *made.parents[:2]) if distributed.rank() == 0 else ()
        lock.release()
        remove_empty(*made_here)  # Hydra and the lock created them, and the run did not start here


def _run(
    cfg: DictConfig,
    hydra: HydraConf,
    lock: RunLock,
    resume_with: Callable[[Path], str],
    callbacks_given: Sequence[Callback],
) -> Outcome:
    console = callbacks.console()

    def say(line: str) -> None:
        if distributed.rank() == 0:
            console.print(line)

    recipes.refuse_unknown(hydra)
    given = [override.lstrip("+").partition("=")[0] for override in hydra.overrides.task]
    config = to_dict(cfg)
    composed = config = recipes.with_one_for_images(config, hydra, parse_run_config(config))
    settings = parse_run_config(config)
    before = find_run_to_resume(config, hydra, lock, say)
    if before is not None:
        if before.source is not None:
            adopt(before.source)
        folder, config, settings = before.folder, before.config, parse_run_config(before.config)
        if before.steps >= settings.total_steps and distributed.broadcast(finished(folder)):
            say(f"{short(folder)} has made all its {before.steps:,} steps; a greater total_steps would go on")
            return Outcome(folder, before.steps)
    else:
        folder = distributed.broadcast(new_run_dir(config, hydra, lock) if distributed.rank() == 0 else None)
        settings = measured(settings, say)
        config = config | {"torch_threads": settings.torch_threads, "env_threads": settings.env_threads}
    with recipes.naming(hydra, composed) if before is None else nullcontext():  # a resumed run keeps its settings
        trainer = build(settings)
    if before is None:
        refuse_unused(settings, trainer.algorithm, given)
        if settings.init is not None:
            initialize(trainer, settings.init, say)
    if before is not None and distributed.rank() == 0:
        checkpoint.retire_newer(folder, before.steps)
    choices = before.state["choices"] if before else dict(hydra.runtime.choices)
    config = config | {"resume": None, "trust": False}  # which are of this call
    facts = {"config": config, "signature": sign(config), "choices": choices, "versions": versions()}
    facts |= {"device": trainer.collector.env.device.type, "spaces": spaces_of(trainer.collector.env)}
    there = set(folder.iterdir()) if folder.is_dir() else set()
    try:
        begun = before.steps if before else None
        trainer.callbacks = recorders(trainer, settings, lock, folder, facts, begun, console, callbacks_given)
    except UserError:
        if before is None and distributed.rank() == 0:  # a refused run leaves no files
            for path in set(folder.iterdir()) - there:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    trainer.failure_handler = Recovery(folder, facts, settings.recover.attempts, say)
    for line in (*describe(trainer, settings), recipe_line(hydra, choices)):
        say(line)
    if before is not None:
        resume_trainer(trainer, before.state, say)
    check_alike(trainer, config)
    with answering_signals(trainer):
        trainer.fit()
        distributed.barrier()  # torchrun ends the others when one exits with 143, and the first may still be writing
    if trainer.stop and trainer.steps < trainer.total_steps:
        how = f"go on with: {resume_with(short(folder))}"
        why = trainer.ended_early or signal.Signals(trainer.stop).name
        say(f"{why} at {trainer.steps:,} steps, saved; {how}")
        stopped = 0 if trainer.ended_early else trainer.stop
        return Outcome(folder, trainer.steps, stopped, trainer.ended_early)
    seconds = trainer.seconds["total"]
    recent = trainer.recent_returns
    say(
        f"return {recent.mean:,.1f} +- {recent.std:,.1f} over {recent} | {trainer.steps:,} steps in "
        f"{seconds:,.1f} s ({trainer.steps / seconds:,.0f}/s) | {short(folder)}"
    )
    return Outcome(folder, trainer.steps)


def remove_empty(*folders: Path) -> None:
    """Remove those of these directories that are empty, in this order."""
    for folder in folders:
        if not Path.cwd().is_relative_to(folder):
            with suppress(OSError):  # unless it is empty
                folder.rmdir()


def refuse_unused(run: Run, algorithm: Any, given: Sequence[str]) -> None:
    """Raise UserError for settings of the command line that have no effect because of another setting."""
    critic = [f"critic.{f.name}" for f in fields(CriticConfig)]
    own = [f"algo.{f.name}" for f in fields(algorithm) if f.name.startswith("critic_")]
    heads = ("head", "normalize_values", "zero_init")  # of any network
    layers = [f.name for f in fields(CriticConfig) if f.name not in ("body", "shared", *heads)]
    adaptive = ("target", "horizon")
    without_critic = "a method that has no critic"
    if hasattr(algorithm, "baseline"):
        without_critic = f"algo.baseline={algorithm.baseline}"
    unused: list[tuple[str, bool, list[str]]] = [
        (without_critic, getattr(algorithm, "critic", None) is None, [*critic, *own]),
        ("critic.shared=true", run.critic.shared, [f"critic.{x}" for x in ("body", *layers)]),
        ("reference.coef=null", run.reference.coef is None, [f"reference.{x}" for x in ("penalty", *adaptive)]),
        ("symmetry.augment=false symmetry.coef=0", algorithm.symmetry is None, ["symmetry.mirror"]),
        ("reference.target=null", run.reference.target is None, ["reference.horizon"]),
        ("standardize_obs=false", not run.standardize_obs, ["clip_obs"]),
    ]
    for name, network in (("policy", run.policy), ("critic", run.critic)):
        unused.append((f"{name}.body", getattr(network, "body", None) is not None, [f"{name}.{x}" for x in layers]))
    for reason, holds, names in unused:
        if holds and (found := [x for x in given if x in names]):
            raise UserError(f"{', '.join(found)} would have no effect with {reason}: leave it out")


def recorders(
    trainer: Trainer,
    run: Run,
    lock: RunLock,
    folder: Path,
    facts: dict[str, Any],
    begun: int | None,
    console: Console,
    given: Sequence[Callback] = (),
) -> list[Callback]:
    """Write config.yaml, and return the callbacks of a run: loggers, evaluation, those of the configuration, those
    ``given`` from Python, checkpoints and summary.  begun: steps before the resume; None for a new run."""
    env, config = trainer.collector.env, facts["config"]
    names = {key: facts["choices"][key] for key in ("algo", "env")}
    described = flatten(config) | names
    checkpoints = callbacks.Checkpoints(folder, facts, run.checkpoint)
    parts: list[Callback] = []
    logs: list[loggers.Logger] = []
    if writes := distributed.rank() == 0:
        if begun is None and (folder / CONFIG).exists():
            begun = -1  # the run was killed before its first checkpoint
        described_as = OmegaConf.to_yaml(config)
        write_text(folder / CONFIG, described_as)
        parts.append(callbacks.KeepRunDir(lock, described_as, console.print))
        # W&B first: it may raise, and TensorBoard's thread writes at any time.
        online = [loggers.WandB(folder, described, run.logging.wandb)] if run.logging.wandb.project is not None else []
        logs = [loggers.Csv(folder / "metrics.csv", begun), loggers.TensorBoard(folder, described, begun), *online]
        logs += run.loggers.values()
    about = RunDir(folder, facts, console, run.seed, described, begun, logs)
    if writes:
        for logger in run.loggers.values():
            logger.setup(about)
        parts += [callbacks.MetricLogger(logs, run.logging.points), callbacks.ProgressBar(console)]
        if run.profile:
            parts.append(Profile(folder, console.print))
    if run.evaluation.every is not None:

        def show(film: Gif, steps: int) -> None:
            for logger in logs:
                logger.log_video(film, steps)

        play = make_evaluator(run, folder / "videos", show, console.print)
        table = loggers.Csv(folder / "evaluation.csv", begun) if writes else None
        parts.append(callbacks.Evaluate(play, table, logs[1:], checkpoints, run.evaluation))
    for name, callback in run.callbacks.items():
        callback.slot = f"callbacks.{name}"
        parts.append(callback)
    parts += [*given, checkpoints]
    if writes:
        found = {"seed": run.seed, "backend": env.backend, "device": str(env.device), "processes": distributed.size()}
        found |= {"resume": trainer.level, "versions": facts["versions"], "commit": commit()}
        parts.append(callbacks.Summary(folder / "summary.json", names | found))
    for part in parts:
        part.setup(about)
    return parts


class Answering(Protocol):
    """What a signal stops: a trainer, of one run or of several."""

    @property
    def asked(self) -> int: ...
    @asked.setter
    def asked(self, number: int) -> None: ...


@contextmanager
def answering_signals(trainer: Answering) -> Iterator[None]:
    """Let SIGINT and SIGTERM stop the trainer after the current iteration, and a second signal at once."""
    asked = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # Python permits signal handlers only there
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.asked = number
        for each in asked:
            signal.signal(each, signal.SIG_DFL)

    others = [signal.signal(each, stop) for each in asked]
    try:
        yield
    finally:
        for each, other in zip(asked, others, strict=True):
            signal.signal(each, other)


def summary_of(folder: Path) -> dict[str, Any]:
    """Contents of a run's summary.json; empty if it cannot be read."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}


def finished(folder: Path) -> bool:
    return summary_of(folder).get("status") == "finished"


def objective(folder: Path) -> float | None:
    """The return of the last evaluation, or without evaluations the ``return_mean`` of the run."""
    summary = summary_of(folder)
    return (summary.get("evaluation") or {}).get("return", summary.get("return_mean"))


def recipe_line(hydra: HydraConf, choices: dict[str, Any]) -> str:
    """Which recipe a run of these choices has."""
    name = choices.get("tuned")
    have = {path.stem for path in recipes.available(hydra)}
    return f"recipe {name}" if name in have else "recipe none: the method's defaults"


def short(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def main() -> None:
    """The command line."""
    from pgsuite.app import cli  # which configures Hydra

    cli.main(train, "train", processes=True)
