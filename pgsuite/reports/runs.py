"""Reading and grouping of run directories: runs that differ only in their seed form a group."""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pgsuite.errors import UserError
from pgsuite.settings import INCIDENTAL, flatten

# Settings without effect on learning; runs that differ only in these are seeds of one group.
IDLE = ("seed", *INCIDENTAL, "checkpoint_every", "wandb")
# Facts that may change the task or the speed; runs that differ in these form separate groups.
ENV_VERSIONS = ("gymnasium", "mujoco", "mujoco-warp", "envpool", "ale-py")
FACTS = ("backend", "device", "processes", *ENV_VERSIONS)
RECORD = "sweep.json"  # by which the directory of a search or a population is known
LARGEST = 1e30  # number that a report computes with
LONGEST = 1 << 28  # bytes of a file
WIDEST = 100  # characters of a name
WORDS = 3  # maximum number of settings in the name of a group
LAST_TENTH = "last tenth"  # the usual window of a score
FEW = 5  # seeds; groups with fewer get a remark


class DamagedError(Exception):
    """A directory cannot be read as a run; the message gives the reason."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Returns over a run, in R rows; every array is [R]."""

    steps: np.ndarray
    returns: np.ndarray
    weights: np.ndarray  # number of episodes of each row
    seconds: np.ndarray | None  # training time since the start


@dataclass(frozen=True, kw_only=True)
class Run:
    """Contents of one run directory; None for what the run has not recorded."""

    folder: Path
    algo: str
    env: str
    settings: dict[str, Any]  # flat, with dotted names
    facts: dict[str, str]  # back end, device, processes, versions of the environment's packages
    origin: dict[str, str]  # other versions, and the commit
    seed: int
    status: str  # "finished", or the state of an unfinished run in words
    steps: int
    total_steps: int | None
    score: float | None  # mean return of the training episodes in the last tenth of the steps
    window: str  # the episodes of the score
    evaluation: float | None
    speed: float | None  # steps per second
    training: Curve | None
    evaluations: Curve | None

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the runs of a group have in common."""
        return {k: v for k, v in self.settings.items() if k.split(".")[0] not in IDLE} | self.facts


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one configuration with different seeds."""

    env: str
    method: str  # the algorithm, and the settings in which this group differs from others of the same name
    runs: list[Run]  # by seed; finished ones, if any finished
    others: list[Run] = field(default_factory=list)  # unfinished runs, if any finished

    @property
    def name(self) -> str:
        return f"{self.method} on {self.env}"

    @property
    def scores(self) -> np.ndarray:
        """Final training returns [n] of finished runs."""
        return np.array([run.score for run in self.runs if run.finished and run.score is not None])

    @property
    def evaluations(self) -> np.ndarray:
        return np.array([run.evaluation for run in self.runs if run.finished and run.evaluation is not None])


def find(paths: Sequence[str], sweeps: bool = False) -> tuple[list[Run], list[str]]:
    """All runs at or below the paths, which may be globs, and a line on every skipped directory; without those of
    searches and populations.

    Raises UserError if a path does not exist, or if there is no run; with ``sweeps``, there need be none.
    """
    runs, skipped = [], []
    for folder in directories(paths, skipped):
        if (folder / RECORD).exists():
            continue
        try:
            runs.append(read(folder))
        except Exception as error:  # whatever is wrong with one directory, the others are reported
            skipped.append(f"{printable(str(folder))}: {reason_of(error)}")
    if not runs and not sweeps:
        raise UserError("no run to report on; skipped " + "; skipped ".join(skipped))
    return runs, skipped


def directories(paths: Sequence[str], skipped: list[str]) -> Iterator[Path]:
    """Directories of runs, and those of searches and populations, at or below the paths, each once; adds a line on
    every path without any to ``skipped``.  Raises UserError if a path does not exist."""
    seen = set()
    for path in paths:
        matches = (
            sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not Path(path).exists() else [path]
        )
        if not matches:
            raise UserError(f"nothing matches {path!r}")
        for match in map(Path, matches):
            if not match.exists():
                raise UserError(f"there is no {str(match)!r}: give run directories, or directories that hold some")
            folder = match if match.is_dir() else match.parent
            inside = list(_beneath(folder))
            if not inside:
                skipped.append(f"{printable(str(folder))}: no run in it")
            for each in inside:
                if (real := each.resolve()) in seen:
                    continue
                seen.add(real)
                yield each


def _beneath(folder: Path) -> Iterator[Path]:
    """Directories that contain files of a run, or the record of a search or a population, whose runs are left out, at
    any depth, in order; every link is followed once."""
    walked = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in walked:
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "checkpoints")
        if RECORD in files:
            folders.clear()
        if {"config.yaml", "summary.json", "metrics.csv", RECORD} & set(files):
            yield Path(root)


def read(folder: Path) -> Run:
    """Read a run directory.  Raises DamagedError."""
    config, summary = _config(folder / "config.yaml"), _summary(folder / "summary.json")
    algo = config.get("algo")
    target = algo.get("_target_") if isinstance(algo, dict) else None
    if not isinstance(target, str) or not isinstance(config.get("env"), dict):
        raise DamagedError("its config.yaml is not one of pgsuite's: it names no algo and env")
    env = config["env"]
    # Choices such as gym have many tasks, distinguished by their id.
    task = env.get("id") or env.get("entry") or summary.get("env") or _last(str(env.get("_target_"))) or "unnamed"
    training = _curve(folder / "metrics.csv", "episode/return", "episode/count")
    evaluations = _curve(folder / "evaluation.csv", "evaluation/return")
    total = _number(config.get("total_steps"))
    steps = _number(summary.get("steps")) or (float(training.steps[-1]) if training else 0.0)
    evaluated = summary.get("evaluation")
    evaluation = _number(evaluated.get("return_mean")) if isinstance(evaluated, dict) else None
    if evaluation is None and evaluations is not None:
        evaluation = float(evaluations.returns[-1])
    versions = summary.get("versions")
    versions = {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {}
    facts = {"backend": summary.get("backend"), "processes": summary.get("processes")} | versions
    facts["device"] = str(summary["device"]).split(":")[0] if summary.get("device") else None
    origin = {k: v for k, v in versions.items() if k not in ENV_VERSIONS}
    if summary.get("commit"):
        origin["commit"] = str(summary["commit"])
    return Run(
        folder=folder,
        algo=printable(str(summary.get("algo") or _last(target).lower())),
        env=printable(str(task)),
        settings=json.loads(json.dumps(flatten(config), default=str)),  # of types that can be compared and sorted
        facts={key: str(facts[key]) for key in FACTS if facts.get(key) is not None},
        origin=origin,
        seed=int(_number(config.get("seed")) or 0),
        status=_status(summary, steps, total),
        steps=int(steps),
        total_steps=None if total is None else int(total),
        score=_number(summary.get("return_mean")),
        window=str(summary.get("return_window") or LAST_TENTH),
        evaluation=evaluation,
        speed=_number(summary.get("steps_per_second")),
        training=training,
        evaluations=evaluations,
    )


def _status(summary: dict[str, Any], steps: float, total: float | None) -> str:
    match summary.get("status"):
        case "finished":
            return "finished"
        case "failed":
            return "failed"
        case "interrupted":
            return "was interrupted"
        case "running":
            return "still runs, or was killed"
    if not summary:
        return "left no summary: it still runs, or was killed"
    return "finished" if total is None or steps >= total else "was interrupted"


class _Loader(yaml.SafeLoader):
    """Refuses aliases, which no run writes: they can make a document that is endless, or far larger than its file."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise DamagedError("its config.yaml has aliases (*), so no run has written it")
        return super().compose_node(parent, index)


def text_of(path: Path) -> str | None:
    """Contents of a file; None if there is none.  Raises DamagedError for what is no regular file, since reading a pipe
    or a device may never end, and for a file of more than ``LONGEST`` bytes."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(facts.st_mode):
        raise DamagedError(f"its {path.name} is no regular file")
    if facts.st_size > LONGEST:
        raise DamagedError(f"its {path.name} is larger than {LONGEST:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedError(f"its {path.name} cannot be read ({_first_line(error)})") from error


def _config(path: Path) -> dict[str, Any]:
    if (text := text_of(path)) is None:
        raise DamagedError("it has no config.yaml")
    try:
        config = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DamagedError(f"its config.yaml cannot be read ({_first_line(error)})") from error
    if not isinstance(config, dict):
        raise DamagedError("its config.yaml holds no settings")
    return {str(key): value for key, value in config.items()}


def _summary(path: Path) -> dict[str, Any]:
    """Contents of summary.json; empty if there is none."""
    if (text := text_of(path)) is None:
        return {}
    try:
        summary = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its summary.json cannot be read ({_first_line(error)})") from error
    if not isinstance(summary, dict):
        raise DamagedError("its summary.json holds no summary")
    return summary


def _curve(path: Path, column: str, weight: str | None = None) -> Curve | None:
    """The rows of a CSV file that have a return; None if there are none.  Raises DamagedError."""
    rows: list[tuple[float, float, float, float]] = []
    clock, before = 0.0, 0.0
    if (text := text_of(path)) is None:
        return None
    try:
        for row in csv.DictReader(io.StringIO(text, newline="")):
            steps, value = _number(row.get("steps")), _number(row.get(column))
            if steps is None:
                continue
            seconds, speed = _number(row.get("time/seconds")), _number(row.get("time/steps_per_second"))
            if seconds is None:
                seconds = clock + (steps - before) / speed if speed else math.nan
            clock, before = seconds, steps
            if value is not None and steps >= 1:
                count = _number(row.get(weight)) if weight else None
                rows.append((steps, value, count if count is not None and count >= 1 else 1.0, seconds))
    except (csv.Error, ValueError) as error:
        raise DamagedError(f"its {path.name} cannot be read ({_first_line(error)})") from error
    kept: list[tuple[float, float, float, float]] = []
    for row in reversed(rows):  # of rows written twice, before and after a resume, the later counts
        if not kept or row[0] < kept[-1][0]:
            kept.append(row)
    if not kept:
        return None
    steps, returns, weights, seconds = np.array(kept[::-1]).T
    real = bool(np.isfinite(seconds).all())
    return Curve(steps=steps, returns=returns, weights=weights, seconds=seconds if real else None)


def _number(value: Any) -> float | None:
    """The value if it is a finite number, else None.  Raises DamagedError for one that sums and squares would make
    infinite."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    if LARGEST < abs(number) < math.inf:
        raise DamagedError(f"it holds the number {number:g}, and none above {LARGEST:g} can be averaged")
    return number if math.isfinite(number) else None


def _first_line(error: Exception) -> str:
    return printable(" ".join(str(getattr(error, "problem", None) or error).split())[:120])


def reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, DamagedError) else f"{type(error).__name__}: {_first_line(error)}"


def printable(text: str) -> str:
    """A name with a question mark in place of what cannot be drawn, cut off at ``WIDEST`` characters."""
    text = "".join(x if x.isprintable() else "?" for x in text)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 4]} ..."


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def group(runs: list[Run]) -> tuple[list[Group], list[str]]:
    """Group runs by environment and configuration; returns the groups, and remarks on duplicates, differences and
    shortcomings."""
    found: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.env, run.algo, json.dumps(run.identity, sort_keys=True, default=str)), []).append(run)
    differing: dict[str, set[str]] = {}  # by algorithm, so that a method has the same name in all environments
    for env, algo in {key[:2] for key in found}:
        same = [members[0].identity for key, members in found.items() if key[:2] == (env, algo)]
        differing.setdefault(algo, set()).update(differences(same))
    groups, remarks = [], []
    for (env, algo, _), members in found.items():
        alike = {_spelled(m[0], differing[algo]): None for key, m in found.items() if key[1] == algo}
        method = printable(f"{algo} {_spelled(members[0], differing[algo])}".strip())
        if len(differing[algo]) > WORDS:
            method = f"{algo} #{sorted(alike).index(_spelled(members[0], differing[algo])) + 1}"
        kept, lines = _once(members, f"{method} on {env}")
        done = [run for run in kept if run.finished]
        groups.append(
            Group(env=env, method=method, runs=done or kept, others=[r for r in kept if not r.finished] if done else [])
        )
        remarks += lines
    for algo in sorted(algo for algo, keys in differing.items() if len(keys) > WORDS):
        remarks.append(
            f"Groups of {algo} differ in {len(differing[algo])} settings and are numbered; see Configurations."
        )
    groups.sort(key=lambda g: (g.env.lower(), g.method.lower()))
    return groups, [*_apart(groups), *[line for g in groups for line in _shortcomings(g)], *remarks]


def differences(identities: Sequence[dict[str, Any]]) -> list[str]:
    """The settings in which configurations differ, or that some of them lack."""
    keys = dict.fromkeys(key for identity in identities for key in identity)
    missing = object()
    return [key for key in keys if any(i.get(key, missing) != identities[0].get(key, missing) for i in identities)]


def _spelled(run: Run, keys: set[str]) -> str:
    return " ".join(f"{short(key)}={show(run.identity[key])}" for key in sorted(keys) if key in run.identity)


def short(setting: str) -> str:
    return setting.removeprefix("algo.")


def show(value: Any) -> str:
    """The value of a setting as written on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:_}"
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _once(members: list[Run], name: str) -> tuple[list[Run], list[str]]:
    """Keep one run per seed: a second one has the same numbers, and is no independent evidence."""
    best: dict[int, Run] = {}
    lines = []
    for run in sorted(members, key=lambda r: (r.finished, r.steps, str(r.folder))):
        if run.seed in best:
            lines.append(
                f"Seed {run.seed} of {name} is there more than once; {run.folder} counts, "
                f"{best[run.seed].folder} does not."
            )
        best[run.seed] = run
    return [best[seed] for seed in sorted(best)], lines


def _apart(groups: list[Group]) -> list[str]:
    """Remarks on environments whose groups differ in versions, back ends or devices, and so perhaps in the task."""
    lines = []
    for env in dict.fromkeys(g.env for g in groups):
        here = [g for g in groups if g.env == env]
        identities = [g.runs[0].identity for g in here]
        for key in (k for k in differences(identities) if k in FACTS):
            values = {show(i.get(key, "not recorded")) for i in identities}
            lines.append(
                f"Runs on {env} differ in {key} ({listed(sorted(values))}). They are not pooled, and what separates "
                "their groups may be that rather than the method."
            )
        task = [k for k in differences(identities) if k.split(".")[0] == "env"]
        if task:
            lines.append(
                f"The task {env} itself differs between groups ({listed(task)}): their returns may not compare."
            )
        if len(lengths := {g.runs[0].total_steps for g in here}) > 1:
            spans = [f"{n:,}" if n else "unknown" for n in sorted(lengths, key=lambda n: n or 0)]
            lines.append(
                f"Runs on {env} are of different lengths ({listed(spans)} steps); scores are those at their ends."
            )
    return lines


def _shortcomings(g: Group) -> list[str]:
    lines = []
    for run in [*g.others, *(r for r in g.runs if not r.finished)]:
        of = f" of {run.total_steps:,}" if run.total_steps else ""
        lines.append(f"Seed {run.seed} of {g.name} {run.status}, at {run.steps:,}{of} steps. It has no final score.")
    if silent := [str(r.seed) for r in g.runs if r.finished and r.score is None]:
        lines.append(
            f"No episode of {g.name} ended in the last tenth of the steps with seed {listed(silent)}: no score."
        )
    for window in sorted({r.window for r in g.runs if r.finished and r.score is not None} - {LAST_TENTH}):
        seeds = [str(r.seed) for r in g.runs if r.finished and r.window == window]
        lines.append(
            f"No episode of {g.name} ended in the last tenth of the steps with seed {listed(seeds)}: the score is the "
            f"mean return of the {window}."
        )
    if bare := [str(r.seed) for r in g.runs if r.training is None]:
        lines.append(f"{g.name} has no learning curve with seed {listed(bare)}.")
    if any(r.status == "failed" for r in [*g.others, *g.runs]) and len(g.scores):
        lines.append(f"The scores of {g.name} leave its failed runs out, and so may flatter it.")
    for key in differences([r.origin for r in g.runs]):
        values = sorted({r.origin.get(key, "not recorded") for r in g.runs})
        lines.append(f"The seeds of {g.name} differ in {key} ({listed(values)}); they are pooled all the same.")
    return lines


def listed(words: Sequence[str]) -> str:
    """a, b and c"""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)
