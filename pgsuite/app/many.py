"""Training of several runs at once: ``seeds=16``, ``algo.lr=batch(1e-3,3e-4)``."""

from __future__ import annotations

import copy
import itertools
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf

from pgsuite import distributed, errors
from pgsuite.app import recipes
from pgsuite.app.build import (
    build,
    build_env,
    check_memory,
    describe,
    instantiate,
    parse_run_config,
    pick_device,
    spaces_of,
    to_dict,
    versions,
)
from pgsuite.app.initialize import initialize
from pgsuite.app.resume import ResumePoint, holds_another, named_by_time, newest_like, resume_trainer
from pgsuite.app.schema import Run
from pgsuite.app.train import (
    Outcome,
    answering_signals,
    finished,
    recipe_line,
    recorders,
    refuse_unused,
    remove_empty,
    short,
)
from pgsuite.envs import TaskEnv, make
from pgsuite.envs.base import VectorEnvConfig
from pgsuite.envs.tasks import Task
from pgsuite.errors import UserError, command, counted
from pgsuite.execution.modes import missing_in_torch, why_not_compilable
from pgsuite.many.env import JointEnv, JointTaskEnv, SharedTask, SideBySide
from pgsuite.many.trainer import ManyTrainer
from pgsuite.nn.layers import Convolutions
from pgsuite.training import callbacks, checkpoint
from pgsuite.training.recovery import Recovery
from pgsuite.training.run_lock import RunLock
from pgsuite.training.trainer import Callback
from pgsuite.trust import sign

# Settings of how a method computes, not of what: the only choice that several runs can make together.
TOGETHER = {"early_stop": "masked", "backtracking": "batched", "fisher": "double-backward"}


def run_many(cfg: DictConfig, hydra: HydraConf) -> list[Outcome]:
    """Train the runs of a configuration at once, each in its own directory.  Raises UserError, also if a run ended by
    itself before its time, after the others have gone to their end."""
    made = Path(hydra.runtime.output_dir)
    with ExitStack() as stack:
        stack.callback(remove_empty, made, *made.parents[:2])  # Hydra created it; the runs have their own
        recipes.refuse_unknown(hydra)
        say: Callable[[str], None] = callbacks.console().print
        whole = to_dict(cfg)
        for name, value in how_together(whole).items():
            whole["algo"][name] = value
            say(f"algo.{name}={value}, which gives the same results, for runs at once")
        configs = expanded(whole)
        runs = [parse_run_config(config) for config, _ in configs]
        _refuse(runs[0])
        members = [
            Member(run, config, label, _place(hydra, config, label, f"-s{runs[0].seed}", stack, say))
            for run, (config, label) in zip(runs, configs, strict=True)
        ]
        outcomes = _train(hydra, whole, members, say)
    if failed := [(x.label, why) for x, why in zip(members, outcomes, strict=True) if isinstance(why, UserError)]:
        raise UserError("; ".join(f"{label} ended: {error}" for label, error in failed))
    return [outcome for outcome in outcomes if isinstance(outcome, Outcome)]


def run_together(
    runs: Sequence[tuple[dict[str, Any], Path, Sequence[Callback]]], hydra: HydraConf
) -> list[Outcome | UserError]:
    """Train runs at once whose settings differ in numbers of the method, each in its directory and with callbacks of
    its own; returns how each of them ended.  ``hydra`` is the node of the first.  Raises UserError where they cannot be
    trained at once."""
    say: Callable[[str], None] = callbacks.console().print
    with ExitStack() as stack:
        parsed = [parse_run_config(config) for config, *_ in runs]
        _refuse(parsed[0])
        members = []
        for run, (config, folder, parts) in zip(parsed, runs, strict=True):
            lock = RunLock()
            stack.callback(_leave, folder, lock)
            members.append(Member(run, config, folder.name, _held(hydra, config, folder, lock, say), parts))
        return _train(hydra, runs[0][0], members, say)


@dataclass
class Member:
    """One of several runs."""

    run: Run
    config: dict[str, Any]
    label: str
    place: Place
    parts: Sequence[Callback] = ()  # in addition to those of the configuration


def how_together(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the method that runs at once must have, and do not have."""
    algo = config["algo"]
    without_effect = {"early_stop"} if algo.get("target_kl") is None else set()
    return {
        name: value for name, value in TOGETHER.items() if algo.get(name, value) != value and name not in without_effect
    }


def _train(
    hydra: HydraConf, whole: dict[str, Any], members: list[Member], say: Callable[[str], None]
) -> list[Outcome | UserError]:
    """Train runs in the directories that they hold; returns how each ended."""
    console = callbacks.console()
    places, labels, runs = [x.place for x in members], [x.label for x in members], [x.run for x in members]
    if all(place.is_finished(run.total_steps) for place, run in zip(places, runs, strict=True)):
        say(f"{counted(len(runs), 'run')} at once: all steps are made")
        return [Outcome(place.folder, place.steps) for place in places]
    runs = [run if place.before is None else replace(run, init=None) for place, run in zip(places, runs, strict=True)]
    with recipes.naming(hydra, whole):
        many = build_many(runs, labels, say)
    given = [override.lstrip("+").partition("=")[0] for override in hydra.overrides.task]
    refuse_unused(runs[0], many.algorithm, given)
    env, trainers = many.env, many.trainers
    for trainer, run, member in zip(trainers, runs, members, strict=True):

        def tell(line: str, label: str = member.label) -> None:
            say(f"{label}: {line}")

        place, config = member.place, member.config
        folder, before = place.folder, place.before
        choices = before.state["choices"] if before else dict(hydra.runtime.choices)
        config = config | {"resume": None, "trust": False}
        facts = {"config": config, "signature": sign(config), "choices": choices, "versions": versions()}
        facts |= {"device": env.device.type, "spaces": spaces_of(trainer.collector.env)}
        if place.is_finished(run.total_steps):
            tell(f"has made its {place.steps:,} steps")
        else:
            if before is not None:
                checkpoint.retire_newer(folder, before.steps)
            there = set(folder.iterdir())
            try:
                begun = before.steps if before else None
                found = recorders(trainer, run, place.lock, folder, facts, begun, console, member.parts)
            except UserError:
                if before is None:
                    for path in set(folder.iterdir()) - there:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                raise
            trainer.callbacks = [part for part in found if not isinstance(part, callbacks.ProgressBar)]
        trainer.failure_handler = Recovery(folder, facts, run.recover.attempts, tell)
        if before is not None:
            resume_trainer(trainer, before.state, tell)
    many.progress = callbacks.ProgressBar(console)
    for line in (*describe(trainers[0], runs[0]), recipe_line(hydra, dict(hydra.runtime.choices))):
        say(line)
    say(f"{counted(len(runs), 'run')} at once: {', '.join(labels[:3])}{', ...' * (len(labels) > 3)}")
    with answering_signals(many):
        try:
            many.fit()
        except (RuntimeError, NotImplementedError) as error:
            if many.steps or "vmap" not in str(error):
                raise
            where, reason = errors.place(error), " ".join(str(error).split())
            raise UserError(f"{where}these runs cannot be trained at once: {reason}; {ONE_BY_ONE}") from error
    for trainer, place in zip(trainers, places, strict=True):
        if trainer.ended_early and trainer.steps < trainer.total_steps:
            way = f"go on with: {command('train')} resume={short(place.folder)}"
            say(f"{trainer.ended_early} at {trainer.steps:,} steps, saved; {way}")
    if many.stop and any(trainer.steps < trainer.total_steps for trainer in trainers):
        reached = f"{signal.Signals(many.stop).name} at {many.steps:,} steps of {counted(len(runs), 'run')}, saved"
        say(f"{reached}; go on with the same command and resume=auto")
    returns = [trainer.return_mean for trainer in trainers if trainer.steps >= trainer.total_steps]
    if returns:
        seconds, home = many.seconds["total"], short(places[0].folder.parent)
        say(
            f"return {fmean(returns):,.1f} +- {pstdev(returns):,.1f} over {counted(len(returns), 'run')} | "
            f"{many.steps:,} steps in {seconds:,.1f} s ({many.steps / seconds:,.0f}/s) | {home}"
        )
    return [
        many.failures.get(s)
        or Outcome(place.folder, x.steps, 0 if x.ended_early or x.steps >= x.total_steps else many.stop, x.ended_early)
        for s, (x, place) in enumerate(zip(trainers, places, strict=True))
    ]


def build_many(runs: list[Run], labels: list[str], say: Callable[[str], None] = print) -> ManyTrainer:
    """A trainer of several runs, without callbacks.  Raises UserError for runs that cannot be trained at once."""
    env = joint_env(runs)
    trainers = [build(replace(run, execution="eager"), each) for run, each in zip(runs, env.runs, strict=True)]
    if (why := trainers[0].algorithm.host_sync_reason) is not None:
        raise UserError(f"these runs cannot be trained at once: {why}; {ONE_BY_ONE}")
    if any(isinstance(module, Convolutions) for module in trainers[0].algorithm.policy.modules()):
        raise UserError(f"these runs cannot be trained at once: torch.vmap does not take images; {ONE_BY_ONE}")
    for trainer, run in zip(trainers, runs, strict=True):
        if run.init is not None:
            initialize(trainer, run.init, say)
    try:
        many = ManyTrainer(trainers, env, labels, say)
    except ValueError as error:
        raise UserError(f"these runs cannot be trained at once: {error}; {ONE_BY_ONE}") from error
    _compile(many, runs[0])
    return many


ONE_BY_ONE = "train them one by one with -m and seed=0,1,2"


def expanded(config: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """The configuration of each run, and what tells it from the others, such as ``s3-lr0.001``."""
    batch = _flat(config["batch"])
    first, count = config["seed"], 1 if config["seeds"] is None else config["seeds"]
    if count < 1:
        raise UserError(f"seeds must be a whole number at least 1 or null, got {count}")
    found = []
    for seed, *values in itertools.product(range(first, first + count), *batch.values()):
        own = OmegaConf.create(copy.deepcopy(config) | {"seed": seed, "seeds": None, "batch": {}})
        for key, value in zip(batch, values, strict=True):
            if OmegaConf.select(own, key, default=...) is ...:
                raise UserError(f"no setting {key!r} for batch(...)")
            OmegaConf.update(own, key, value)
        words = [f"{key.removeprefix('algo.')}{value}" for key, value in zip(batch, values, strict=True)]
        assert isinstance(own, DictConfig)
        found.append((to_dict(own), "-".join([f"s{seed}", *words])))
    return found


def _flat(batch: dict[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """The values of settings by dotted name.  Raises UserError for anything but lists of numbers."""
    found: dict[str, list[Any]] = {}
    for key, value in batch.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(x, float | int) for x in value):
            found[f"{prefix}{key}"] = value
        else:
            raise UserError(f"batch(...) takes numbers, as in algo.lr=batch(1e-3,3e-4), got {prefix}{key}={value}")
    return found


def _refuse(run: Run) -> None:
    """Raise UserError for settings that several runs at once cannot have."""
    because = {
        "overlap=true has a thread for one run": run.overlap,
        "resume=<directory> goes on with one run: give resume=auto, or the directory by itself": run.resume
        not in (None, "auto"),
        "demonstrations= are read by one run": run.demonstrations is not None,
        "profile=true times one run": run.profile,
        "logging.wandb logs one run in a process": run.logging.wandb.project is not None,
        "torch_threads=measure measures one run: give a number": run.torch_threads == "measure",
        f"execution={run.execution} captures one run: leave it out": run.execution.endswith("cuda_graph"),
        "torchrun trains one run in several processes": distributed.size() > 1,
    }
    for reason, holds in because.items():
        if holds:
            raise UserError(f"seeds= and batch(...) train several runs at once, and {reason}")


def _compile(many: ManyTrainer, run: Run) -> None:
    """Compile the kernels of the runs if that is asked for.  Raises UserError if nothing can be compiled here."""
    if run.execution == "eager":
        return
    if (why := why_not_compilable(many.env.device) or missing_in_torch()) is not None:
        if run.execution == "auto":
            return
        raise UserError(f"execution={run.execution} {why}, or leave it out")
    from pgsuite.many.compile import compile_many

    compile_many(many)
    for trainer in many.trainers:
        trainer.execution = "compile"


def joint_env(runs: list[Run]) -> JointEnv:
    """The environments of several runs.  Raises UserError."""
    run, device = runs[0], pick_device(runs[0].device)
    task = instantiate(run.env, "env", Task | VectorEnvConfig)
    if not isinstance(task, Task):
        envs = [build_env(each, each.num_envs, device) for each in runs]
        if hasattr(envs[0], "collector"):
            raise UserError(f"{envs[0].name} collects in its own way, for one run: {ONE_BY_ONE}")
        return SideBySide(envs)
    try:
        count = len(runs) * run.num_envs
        whole = make(task, count, device=device, backend=run.backend, threads=run.env_threads)
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(whole, TaskEnv)
    env = SharedTask(JointTaskEnv(task, [x.seed for x in runs], device=whole.device, dtype=whole.dtype))
    check_memory(env, run.horizon or env.max_episode_steps or 1)
    return env


def _leave(folder: Path, lock: RunLock) -> None:
    """Release a run directory, and remove it if the run did not start."""
    lock.release()
    for path in (folder, folder.parent):
        with suppress(OSError):  # unless it is empty
            path.rmdir()


@dataclass
class Place:
    """The directory of a run, which is held, and the run that is there to go on with."""

    folder: Path
    lock: RunLock
    before: ResumePoint | None = None

    @property
    def steps(self) -> int:
        return 0 if self.before is None else self.before.steps

    def is_finished(self, total_steps: int) -> bool:
        return self.steps >= total_steps and finished(self.folder)


def _place(
    hydra: HydraConf, config: dict[str, Any], label: str, first: str, stack: ExitStack, say: Callable[[str], None]
) -> Place:
    """Make and hold the directory of one of several runs: beside the one that is named by the time, whose name has the
    seed of the ``first`` run, or within the given one.  With ``resume=auto`` it is that of the newest run with equal
    settings."""
    home, lock = Path(hydra.runtime.output_dir), RunLock()
    place = _held(hydra, config, home if named_by_time(hydra) else home / label, lock, say)
    if place.before is None and named_by_time(hydra):
        head, _, tail = home.name.rpartition(first)
        place.folder = lock.claim(home.parent / f"{head}-{label}{tail}")
    stack.callback(_leave, place.folder, lock)
    return place


def _held(hydra: HydraConf, config: dict[str, Any], folder: Path, lock: RunLock, say: Callable[[str], None]) -> Place:
    """Hold the directory of a run, which is to be resumed if there is one with equal settings and ``resume=auto``."""
    before = newest_like(config, hydra, folder, lock, say) if config["resume"] == "auto" else None
    if before is not None:
        return Place(before.folder, lock, before)
    if not named_by_time(hydra):
        lock.take(folder)
        if holds_another(folder, config):
            raise UserError(f"{folder} already holds a run: go on with resume=auto, or give another hydra.run.dir=")
    return Place(folder, lock)
