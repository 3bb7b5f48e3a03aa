"""The Python interface behind ``pgsuite.train``, ``pgsuite.evaluate`` and ``pgsuite.report``."""

from __future__ import annotations

import copy
import csv
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase
from omegaconf import DictConfig, open_dict, read_write

from pgsuite import distributed
from pgsuite.app import cli, schema
from pgsuite.app.build import to_dict
from pgsuite.app.evaluate import EvaluateConfig, evaluate_policy
from pgsuite.app.policy_io import Actor, restore
from pgsuite.app.train import Outcome, summary_of
from pgsuite.app.train import run as run_training
from pgsuite.errors import UserError, install
from pgsuite.settings import closest
from pgsuite.training.trainer import Callback
from pgsuite.trust import Trust

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
# Strings that need no quotes in an override.
WORD = re.compile(r"(?!(null|true|false|nan|inf)$)[a-z_][\w./-]*$", re.IGNORECASE)


class Run:
    """A run directory: what ``pgsuite.train`` returns, or ``pgsuite.Run(folder)`` of an earlier run.

    trust: as for ``pgsuite.load``, of a run that another user trained.  Raises UserError if the directory holds none.
    """

    def __init__(self, folder: str | Path, *, trust: Trust = False) -> None:
        self.trust: Trust = trust
        self.folder = Path(os.path.abspath(folder))  # valid also after a change of the working directory
        if not (self.folder / "config.yaml").is_file():
            raise UserError(f"{self.folder} holds no run: it has no config.yaml")

    def __repr__(self) -> str:
        summary = self.summary
        words = [repr(str(self.folder)), summary.get("status", "still runs, or was killed")]
        words += [f"{summary['steps']:,} steps"] if "steps" in summary else []
        if summary.get("return_mean") is not None:
            words.append(f"return {summary['return_mean']:,.1f} +- {summary['return_std']:,.1f}")
        return f"Run({', '.join(words)})"

    @property
    def summary(self) -> dict[str, Any]:
        """Contents of summary.json: status, steps, return_mean, return_window, ...; empty before the end of the run."""
        return summary_of(self.folder)

    @property
    def config(self) -> dict[str, Any]:
        """All settings of the run, nested, as in config.yaml."""
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    @cached_property
    def policy(self) -> Actor:
        """The policy of the newest checkpoint: ``policy.act(obs)`` takes and returns NumPy arrays or tensors.

        Actions are the modes of its distributions; ``pgsuite.load(run.folder, deterministic=False)`` samples.
        """
        return Actor(_as_user_errors(lambda: restore(self.folder, trust=self.trust)))

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """The columns of metrics.csv by name, float64 [L] for L logged lines; NaN where a line has no value.

        ``metrics["steps"]`` counts environment steps, ``metrics["episode/return"]`` is the mean undiscounted return of
        the episodes that finished since the line before.
        """
        path = self.folder / "metrics.csv"
        try:
            with path.open(newline="") as file:
                names, *rows = csv.reader(file)
            return {name: np.array([float(row[i] or "nan") for row in rows]) for i, name in enumerate(names)}
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"cannot read {path}: {error}") from error

    def evaluate(self, episodes: int = 20, *, deterministic: bool = True, seed: int = 0) -> dict[str, Any]:
        """``pgsuite.evaluate`` of this run."""
        return evaluate(self.folder, episodes, deterministic=deterministic, seed=seed, trust=self.trust)

    def plot(self, metric: str = "episode/return") -> Figure:
        """A metric over environment steps, as a matplotlib figure, which a notebook shows inline.

        Raises UserError for an unknown metric, or without matplotlib.
        """
        try:
            from pgsuite.app.plot import curve
        except ImportError as error:
            raise UserError(f"run.plot() needs matplotlib: {install('report')}") from error
        metrics = self.metrics
        if metric not in metrics:
            raise UserError(f"no metric {metric!r}; {closest(metric, metrics)}")
        return curve(metrics["steps"], metrics[metric], metric, self.folder.name)


def train(
    algo: str | None = None,
    env: str | None = None,
    *,
    total_steps: int | None = None,
    seed: int | None = None,
    callbacks: Sequence[Callback] = (),
    folder: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train in this process, as ``pgsuite train`` does, and return the run.

    algo, env: names of configurations, as on the command line; None takes ppo and HalfCheetah, or those of the resumed
    run.  total_steps: environment steps; None takes the recipe's, or the default.
    callbacks: instances of ``pgsuite.training.trainer.Callback``, called after those of the configuration.
    folder: the run directory; None makes ``runs/<algo>-<env>/<date_time>-s<seed>``.
    settings: any other setting by its dotted name, as in ``**{"algo.clip": 0.1, "algo/estimator": "n_step"}``.  Values
    are Python objects: numbers, strings, booleans, None, lists and dictionaries.  ``**{"~tuned": None}`` leaves the
    recipe out.

    Except for times, the run directory is bitwise equal to that of the command line.  A keyboard interrupt stops after
    the current iteration, saves a checkpoint and raises KeyboardInterrupt; a second one stops at once.  Raises
    UserError, with the message of the command line, for mistakes that the caller can correct.
    """
    _check(callbacks)
    given = _overrides({"algo": algo, "env": env, "total_steps": total_steps, "seed": seed}, folder, settings)
    return _handed_on([train_with(given, callbacks)])[0]


def train_many(
    algo: str | None = None,
    env: str | None = None,
    *,
    seeds: int = 1,
    batch: Mapping[str, Sequence[float]] | None = None,
    total_steps: int | None = None,
    seed: int | None = None,
    folder: str | Path | None = None,
    **settings: Any,
) -> list[Run]:
    """Train several runs at once in this process, as ``pgsuite train seeds=16`` does, and return them.

    seeds: their number, with ``seed`` and the numbers after it.  batch: settings by dotted name that differ between
    runs, as in ``{"algo.lr": [1e-3, 3e-4]}``; every combination is trained with every seed.  The runs are in the order
    of seeds, and of the values given for each.  folder: the directory of their run directories, by default
    ``runs/<algo>-<env>``.  Other arguments, interrupts and errors are those of ``pgsuite.train``.
    """
    from pgsuite.app.many import run_many

    given = _overrides({"algo": algo, "env": env, "total_steps": total_steps, "seed": seed}, folder, settings)
    given += [override("seeds", seeds), *(override(f"+batch.{key}", list(x)) for key, x in (batch or {}).items())]
    return _handed_on(_trained(given, run_many))


def _overrides(named: dict[str, Any], folder: str | Path | None, settings: dict[str, Any]) -> list[str]:
    """Arguments of ``train`` as overrides of the command line.  Raises UserError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and distributed.size() == 1:
        raise UserError("pgsuite.train trains in one process; for several: torchrun -m pgsuite train <settings>")
    given: dict[str, Any] = {key: x for key, x in named.items() if x is not None} | settings
    if folder is not None:
        given["hydra.run.dir"] = str(folder)
    return [override(key, x) for key, x in given.items()]


def _handed_on(outcomes: Sequence[Outcome]) -> list[Run]:
    """The trained runs.  A signal that stopped them is handed on to this process' own handler."""
    if stopped := next((x.stopped for x in outcomes if x.stopped), 0):
        signal.raise_signal(stopped)  # SIGINT raises KeyboardInterrupt
        if stopped == signal.SIGINT:
            raise KeyboardInterrupt  # where it is ignored, as shells have it in background jobs
    return [Run(outcome.folder, trust=True) for outcome in outcomes]  # with whose code they have just been trained


def train_with(overrides: Sequence[str], callbacks: Sequence[Callback] = ()) -> Outcome:
    """Train one run in this process with overrides of the command line.  Raises UserError."""

    def work(cfg: DictConfig, hydra: HydraConf) -> Outcome:
        if cfg.seeds is not None or cfg.batch or cfg.sweep is not None:
            several = "pgsuite train sweep=search <settings>" if cfg.sweep is not None else "pgsuite.train_many"
            raise UserError(f"pgsuite.train trains one run; for several: {several}")
        return run_training(cfg, hydra, resume_with=_resume_call, callbacks=tuple(callbacks))

    return _trained(overrides, work)


def train_together(
    commands: Sequence[tuple[Sequence[str], Sequence[Callback]]],
) -> list[Outcome | UserError]:
    """Train runs at once in this process, each with overrides of the command line, which give its directory, and
    callbacks; returns how each of them ended.  Raises UserError where they cannot be trained at once."""
    from pgsuite.app.many import run_together

    runs = []
    for overrides, callbacks in commands:
        with composed(overrides) as (cfg, hydra):
            runs.append((to_dict(cfg), Path(hydra.runtime.output_dir), callbacks))
    return _trained(commands[0][0], lambda _, hydra: run_together(runs, hydra))


def _trained(overrides: Sequence[str], work: Callable[[DictConfig, HydraConf], T]) -> T:
    """The result of work with the configuration of these overrides.  Raises UserError."""
    threads = torch.get_num_threads()
    try:
        with composed(overrides) as (cfg, hydra):
            return _as_user_errors(lambda: work(cfg, hydra))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def composed(overrides: Sequence[str]) -> Iterator[tuple[DictConfig, HydraConf]]:
    """The configuration of training with these overrides, and Hydra's node of it, with Hydra's global state set for it
    until the context ends.  Raises UserError."""
    with _hydra_of_its_own():
        yield _compose(list(overrides))


def evaluate(
    run: str | Path | Run,
    episodes: int = 20,
    *,
    deterministic: bool = True,
    seed: int = 0,
    video: str | None = None,
    record: str | None = None,
    max_steps: int | None = None,
    env: dict[str, Any] | None = None,
    trust: Trust = False,
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or a given checkpoint, on whole episodes on the CPU.

    Returns the contents of evaluation.json: ``return_mean``, ``return_std``, ``returns`` [episodes], ``lengths``
    [episodes], ``steps`` of the checkpoint, ...  video: file of a video of the first episode, mp4 or gif.  record: .npz
    file of the episodes, as for ``algo=bc``.  max_steps: steps after which an episode is cut; None takes its time
    limit, or without one 30,000.  env: settings of the environment other than the run's, nested, as in ``{"options":
    {"size": 5}}``.  trust: as for ``pgsuite.load``.  Raises UserError.
    """
    path = run.folder if isinstance(run, Run) else run
    trust = trust or (isinstance(run, Run) and run.trust)
    threads = torch.get_num_threads()

    def work() -> dict[str, Any]:
        try:
            wanted = EvaluateConfig(
                run=str(path),
                episodes=episodes,
                max_steps=max_steps,
                deterministic=deterministic,
                seed=seed,
                video=video,
                record=record,
                trust=trust,
                env=env or {},
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        return evaluate_policy(wanted)[0]

    try:
        return _as_user_errors(work)
    finally:
        torch.set_num_threads(threads)


def report(*runs: str | Path | Run, out: str | Path = "report") -> Path:
    """Write a comparison of runs, and return the path of its page: ``out``/index.html.

    runs: runs, run directories, directories that contain some at any depth, or globs.  Requires the extra ``report``.
    Raises UserError if there is no run to report.
    """
    from pgsuite.reports import report as write

    paths = [str(run.folder if isinstance(run, Run) else run) for run in runs]
    write(paths, Path(out), f"pgsuite.report({', '.join(map(repr, paths))}, out={str(out)!r})")
    return Path(out) / "index.html"


def override(key: str, value: Any) -> str:
    """A setting as an override of Hydra's command line."""
    return key if key.startswith("~") and value is None else f"{key}={_literal(value)}"


def _literal(value: Any) -> str:
    """A Python value in the grammar of Hydra's overrides.  Raises UserError for types that settings cannot have."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    if isinstance(value, str | Path):
        text = str(value)
        # Within quotes, backslashes before a quote or at the end are escapes.
        quoted = re.sub(r"(\\*)(')", r"\1\1\\\2", re.sub(r"(\\+)$", r"\1\1", text))
        return text if WORD.match(text) else f"'{quoted}'"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    raise UserError(f"a setting is a number, string, boolean, None, list or dictionary, not {value!r}")


def _check(callbacks: Sequence[Any]) -> None:
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise UserError(f"callbacks must be instances of pgsuite.training.trainer.Callback, got {callback!r}")


@contextmanager
def _hydra_of_its_own() -> Iterator[None]:
    """Reset Hydra's global state, and restore the caller's afterwards."""
    states, instances = (GlobalHydra, HydraConfig, JobRuntime, VersionBase), Singleton._instances
    kept = {kind: instances.pop(kind) for kind in states if kind in instances}
    try:
        yield
    finally:
        for kind in states:
            instances.pop(kind, None)
        instances.update(kept)


def _compose(overrides: list[str]) -> tuple[DictConfig, HydraConf]:
    """Compose train.yaml with overrides, as ``hydra.main`` does; returns the configuration and its ``hydra`` node."""
    schema.register()
    parts = [part for each in overrides for part in cli.replacing(each)]
    try:
        initialize_config_dir(str(cli.CONFIGS), job_name="train", version_base="1.3")
        whole = compose("train", parts, return_hydra_config=True)
        HydraConfig.instance().set_config(whole)  # for ${hydra:...} in the directory's name
        folder = os.path.abspath(whole.hydra.run.dir)
    except (*cli.MENDABLE, *cli.UNCOMPOSABLE) as error:
        raise UserError(cli.shorten(cli.uncomposable(error, parts))) from error
    with read_write(whole.hydra.runtime):
        whole.hydra.runtime.output_dir = folder
    HydraConfig.instance().set_config(whole)
    cfg = copy.deepcopy(whole)
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    return cfg, HydraConfig.get()


def _as_user_errors(work: Callable[[], T]) -> T:
    """work(), with a UserError in place of every error for which the command line prints a message."""
    try:
        return work()
    except UserError:
        raise
    except cli.MENDABLE as error:
        raise UserError(cli.shorten(cli.explain(error))) from error


def _resume_call(folder: Path) -> str:
    return f"pgsuite.train(resume={str(folder)!r})"
