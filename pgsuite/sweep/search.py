"""Search for settings by Optuna: ``sweep=search``.

Each trial is a run, in a directory of its own.  The study is an SQLite file, which this process alone asks for settings
and tells the results; workers write the returns of trials under way, by which pruning ends hopeless ones.
"""

from __future__ import annotations

import itertools
import math
import shlex
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pgsuite import seeding
from pgsuite.app.recipes import written
from pgsuite.app.train import objective, short
from pgsuite.errors import UserError, command, counted, install
from pgsuite.settings import Count, Fraction, Natural
from pgsuite.sweep.space import Dimension
from pgsuite.sweep.workers import ASKED, Ended, Job, Plan, Pool, SettingsSweep, first
from pgsuite.training.callbacks import Evaluate
from pgsuite.training.trainer import Callback, Report, Trainer

STUDY = "search"  # name of the study in its file
POINTS = 20  # of a run at which its return is compared with those of others
PRUNED = "pruned"
HOPELESS = 3  # trials; where the first all fail, the search ends
ENOUGH = 10  # finished trials from which importances are computed

Pruning = Literal["median", "halving", "none"]


def load_optuna() -> Any:
    """Optuna, with its log messages turned off.  Raises UserError if version 4 or later is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"sweep=search needs optuna: {install('search')}") from error
    if int(optuna.__version__.split(".")[0]) < 4:
        raise UserError(
            f"sweep=search needs optuna from version 4 on, here is {optuna.__version__}: {install('search')}"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # pyright: ignore[reportPrivateImportUsage]
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return optuna


def open_study(folder: Path, pruning: Pruning = "none", warmup: float = 0.0, startup: int = 0) -> tuple[Any, Any]:
    """The study of a directory and its storage, which waits for other processes to have written."""
    optuna = load_optuna()
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{folder / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60}}
    )
    begin = max(1, round(warmup * POINTS))
    pruner = {
        "none": lambda: optuna.pruners.NopPruner(),
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=begin),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=begin, reduction_factor=3),
    }[pruning]()
    study = optuna.create_study(
        study_name=STUDY, storage=storage, direction="maximize", load_if_exists=True, pruner=pruner
    )
    return study, storage


@dataclass(kw_only=True)
class Prune(Callback):
    """Writes the return of a running trial to the study, and ends the run if other trials had higher returns at the
    same step."""

    folder: Path  # of the search
    number: int  # of the trial
    pruning: Pruning
    warmup: float
    startup: int

    def on_start(self, trainer: Trainer) -> None:
        self.study, self.storage = open_study(self.folder, self.pruning, self.warmup, self.startup)
        self.trial = self.study.trials[self.number]._trial_id

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        evaluations = [part.last for part in trainer.callbacks if isinstance(part, Evaluate)]
        if evaluations and evaluations[0].get("steps") != report.steps:
            return
        if report.steps >= trainer.total_steps or not (evaluations or report.passes(trainer.total_steps / POINTS)):
            return
        value = evaluations[0]["return"] if evaluations else trainer.return_mean
        point = math.floor(POINTS * report.steps / trainer.total_steps)
        self.storage.set_trial_intermediate_value(self.trial, point, value)
        if self.study.pruner.prune(self.study, self.storage.get_trial(self.trial)):
            trainer.end_early(PRUNED)

    def on_end(self, trainer: Trainer) -> None:
        self.storage.remove_session()


@dataclass(kw_only=True)
class Search(SettingsSweep):
    """A search for the settings with the highest return, by Optuna."""

    trials: Count = 30  # runs in all; a grid makes one for each combination instead
    sampler: Literal["tpe", "random", "cmaes", "grid"] = "tpe"  # how settings are proposed
    pruning: Pruning = "median"  # what ends trials: a return below the median of others, or successive halving
    warmup: Fraction = 0.2  # fraction of a run before which it is not pruned
    startup: Natural = 5  # finished trials before which none is pruned by the median

    def run(self, plan: Plan, pool: Pool) -> float | None:
        if self.sampler == "grid" and (wrong := [name for name, x in plan.space.items() if x.kind != "choice"]):
            raise UserError(
                f"sweep.sampler=grid tries choices, and sweep.space.{wrong[0]} is a range: give {{choice: ...}}"
            )
        record = plan.record("search", **{"sweep.sampler": self.sampler, "sweep.pruning": self.pruning})
        study, _ = open_study(plan.folder)
        plan.write(record)
        labels = {name: _labels(dimension) for name, dimension in plan.space.items()}
        if self.sampler == "grid":
            for values in itertools.product(*labels.values()):
                study.enqueue_trial(dict(zip(labels, values, strict=True)), skip_if_exists=True)
        count = math.prod(map(len, labels.values())) if self.sampler == "grid" else self.trials
        begun = [t for t in study.trials if t.state.name != "WAITING"]
        left = [t.number for t in begun if t.state.name == "RUNNING"]
        if begun:
            ended = len(begun) - len(left)
            plan.say(f"{ended} of {counted(count, 'trial')} ended, {len(left)} to go on where they were")
        failures: list[str] = []
        going: dict[Future[list[Ended]], list[int]] = {}
        asked = len(begun)
        while True:
            while not pool.asked and len(going) < self.jobs and (left or asked < count):
                numbers, left = left[: self.at_once], left[self.at_once :]
                while len(numbers) < self.at_once and asked < count:
                    numbers.append(self._ask(study, plan))
                    asked += 1
                going[pool.submit([self._job(study, number, plan) for number in numbers])] = numbers
            if not going:
                break
            for number, outcome in first(going):
                self._tell(study, number, outcome, plan)
                plan.write(record | self._told(study, plan))
                failures += [outcome] if isinstance(outcome, str) else []
            ended = [t for t in study.trials if t.state.is_finished()]
            if len(failures) >= HOPELESS and len(failures) == len(ended):
                raise UserError(f"the first {len(failures)} trials all failed, the last with: {failures[-1]}")
        return self._conclude(study, plan)

    def _ask(self, study: Any, plan: Plan) -> int:
        """A new trial.  Its sampler depends on the seed and its number, and so proposes the same after a kill."""
        samplers, number = load_optuna().samplers, len(study.trials)
        seed = seeding.number(plan.config["seed"], f"trial {number}")
        study.sampler = {
            "tpe": lambda: samplers.TPESampler(seed=seed, constant_liar=True),
            "random": lambda: samplers.RandomSampler(seed=seed),
            "grid": lambda: samplers.RandomSampler(seed=seed),
            "cmaes": lambda: samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
        }[self.sampler]()
        try:
            return study.ask({name: _distribution(x) for name, x in plan.space.items()}).number
        except ImportError as error:
            raise UserError(f"sweep.sampler=cmaes needs cmaes: {install('search')}") from error

    def _job(self, study: Any, number: int, plan: Plan) -> Job:
        folder = plan.folder / f"trial-{number:03d}"
        prune = Prune(folder=plan.folder, number=number, pruning=self.pruning, warmup=self.warmup, startup=self.startup)
        return Job(plan, folder, _values(study.trials[number], plan), [prune])

    def _tell(self, study: Any, number: int, outcome: Ended, plan: Plan) -> None:
        """Tell the study how a trial ended, and print it.  A trial that was asked to stop has not ended."""
        trial, states = study.trials[number], load_optuna().trial.TrialState
        if isinstance(outcome, str):
            study.tell(number, state=states.FAIL)
            how = f"failed: {outcome}"
        elif outcome.stopped or outcome.ended_early == ASKED:
            return
        elif outcome.ended_early == PRUNED:
            study.tell(number, state=states.PRUNED)
            value = trial.intermediate_values[max(trial.intermediate_values)]
            how = f"pruned at {outcome.steps:,} steps, return {value:,.1f}"
        elif (value := objective(outcome.folder)) is None:
            study.tell(number, state=states.FAIL)
            how = "failed: no episode has a return"
        else:
            study.tell(number, value)
            how = f"return {value:,.1f}"
        plan.say(f"trial {number}: {how} | {spelled(_values(trial, plan))}")

    def _told(self, study: Any, plan: Plan) -> dict[str, Any]:
        """What a report shows of the search."""
        trials = [
            {
                "number": t.number,
                "state": t.state.name.lower(),
                "value": t.value,
                "values": _values(t, plan),
                "points": [[point / POINTS, x] for point, x in sorted(t.intermediate_values.items())],
            }
            for t in study.trials
            if t.params
        ]
        return {"trials": trials, "importances": _importances(study)}

    def _conclude(self, study: Any, plan: Plan) -> float | None:
        ended = {name: [t for t in study.trials if t.state.name == name] for name in ("COMPLETE", "PRUNED", "FAIL")}
        if not ended["COMPLETE"]:
            if ended["FAIL"]:
                raise UserError(f"no trial of {plan.folder} has finished; the last messages are in its .log files")
            return None
        best = max(ended["COMPLETE"], key=lambda t: t.value)
        how = ", ".join(f"{len(x)} {word}" for word, x in (("pruned", ended["PRUNED"]), ("failed", ended["FAIL"])) if x)
        line = shlex.join(plan.given(_values(best, plan)))
        plan.say(
            f"best of {counted(sum(map(len, ended.values())), 'trial')}{f' ({how})' if how else ''}: "
            f"trial {best.number}, return {best.value:,.1f} | {short(plan.folder)}\n{command('train')} {line}"
        )
        return best.value


def _labels(dimension: Dimension) -> list[Any]:
    """The choices in a form that Optuna accepts: numbers, strings and booleans as they are, anything else as text."""
    plain = (bool, int, float, str, type(None))
    return [x if isinstance(x, plain) else written(x) for x in dimension.values]


def _distribution(dimension: Dimension) -> Any:
    distributions = load_optuna().distributions
    if dimension.kind == "choice":
        return distributions.CategoricalDistribution(_labels(dimension))
    low, high = dimension.values
    if dimension.kind == "int":
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(low, high, log=dimension.kind == "log")


def _values(trial: Any, plan: Plan) -> dict[str, Any]:
    """The values of a trial by setting."""
    found = {}
    for name, x in plan.space.items():
        value = trial.params[name]
        found[name] = x.values[_labels(x).index(value)] if x.kind == "choice" else value
    return found


def spelled(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={f'{x:.4g}' if isinstance(x, float) else written(x)}" for name, x in values.items())


def _importances(study: Any) -> dict[str, float]:
    """The share of each setting in how the returns of the finished trials differ (PED-ANOVA, Watanabe et al., 2023);
    empty for too few of them."""
    importance = load_optuna().importance
    finished = [t for t in study.trials if t.state.name == "COMPLETE"]
    if len(finished) < ENOUGH or len({t.value for t in finished}) == 1:
        return {}
    found = importance.get_param_importances(study, evaluator=importance.PedAnovaImportanceEvaluator())
    return {name: float(x) for name, x in found.items()}
