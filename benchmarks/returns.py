"""Train with the committed recipes over several seeds and keep what came of it.

    python benchmarks/returns.py run ppo-HalfCheetah trpo-HalfCheetah --seeds 0 1 2 3 4 --jobs 2
    python benchmarks/returns.py run all --jobs 2
    python benchmarks/returns.py table --docs
    python benchmarks/returns.py run ppo-HalfCheetah --apart compile --set execution=compile
    python benchmarks/returns.py compare compile --docs

``run`` writes one file a run to benchmarks/results/returns/: the run's summary, its learning curve, the returns of its
last policy in 20 whole episodes with and without sampling, the command, the commit and the machine.  The seeds of a
name are trained at once in one process, or with ``--one-by-one`` each in its own, as observations that are images need.
What is there of the same commit is not run again, so it goes on where it was cut off.  ``table`` sets what is there
beside the figures of published.csv: interquartile means over seeds with 95% bootstrap intervals.  Marks compare plain
means with the highest published mean of three seeds or more at as many steps, like with like: with the return of
training, of sampled evaluation, or of deterministic evaluation.  What is run ``--apart`` is kept beside them under a
name, and ``compare`` sets it beside the same cells of the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, ROOT, commit, keep, machine, write_table

from pgsuite.reports.statistics import interquartile_mean, interval, probability_of_improvement

RUNS = RESULTS / "returns"
PUBLISHED = ROOT / "benchmarks" / "published.csv"
METHODS = ("reinforce", "a2c", "npg", "trpo", "ppo")
ENVIRONMENTS = (
    *("CartPole", "Acrobot", "Pendulum", "MountainCarContinuous"),
    *("HalfCheetah", "Hopper", "Walker2d", "Swimmer", "InvertedPendulum", "Reacher"),
    *("Ant", "Humanoid", "HumanoidStandup", "Pusher", "InvertedDoublePendulum"),
)
EPISODES = 20  # of the evaluations of a last policy
BRIEF = ("CartPole", "HalfCheetah", "Hopper", "Walker2d")  # what the README shows
MARKS = {"above": "▲", "within": "≈", "short": "▼", "": ""}


def evaluate(run: Path, how: str) -> dict[str, float]:
    """The return of a run's last policy over whole episodes, with actions that are sampled or not."""
    options = [f"run={run}", f"episodes={EPISODES}", f"deterministic={str(how == 'deterministic').lower()}"]
    command = [sys.executable, "scripts/evaluate.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(options)} failed:\n{done.stderr}")
    found = json.loads((run / "evaluation.json").read_text())
    return {name: found[f"return_{name}"] for name in ("mean", "std")}


def train(name: str, seeds: list[int], overrides: list[str], *, evaluations_too: bool = True) -> list[dict[str, Any]]:
    """The runs of consecutive seeds in one process, and evaluations of their last policies; in order of seed."""
    algo, env = name.split("-", 1)
    begun_at = commit()  # before the run: the tree may move on meanwhile
    at_once = [f"seeds={len(seeds)}"] if len(seeds) > 1 else []
    arguments = [f"algo={algo}", f"env={env}", f"seed={seeds[0]}", *at_once, *overrides]
    about = {"command": f"python scripts/train.py {' '.join(arguments)}", "commit": begun_at, "machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "scripts/train.py", *arguments, "env_threads=1", f"hydra.run.dir={folder}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
        runs = [Path(folder) / "run" / (f"s{seed}" if at_once else "") for seed in seeds]
        return [about | outcome(run, evaluations_too) for run in runs]


def outcome(run: Path, evaluations_too: bool) -> dict[str, Any]:
    """What is kept of a run directory."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [(int(row["steps"]), row["episode/return"]) for row in csv.DictReader(file) if row.get("episode/return")]
    return {
        "summary": json.loads((run / "summary.json").read_text()),
        "evaluation": {how: evaluate(run, how) for how in ("sampled", "deterministic") if evaluations_too},
        "curve": {"steps": [s for s, _ in rows], "return": [round(float(r), 2) for _, r in rows]},
    }


def stretches(seeds: list[int], one_by_one: bool = False) -> list[list[int]]:
    """The seeds in stretches of consecutive ones."""
    found: list[list[int]] = []
    for seed in sorted(seeds):
        if found and not one_by_one and found[-1][-1] == seed - 1:
            found[-1].append(seed)
        else:
            found.append([seed])
    return found


def apart(name: str) -> Path:
    """Where results are kept that are none of the table's."""
    return RESULTS / f"returns-{name}"


def run(
    names: list[str], seeds: list[int], jobs: int, overrides: list[str], folder: Path, one_by_one: bool = False
) -> None:
    """Every name with every seed, ``jobs`` processes at a time."""

    def path_of(name: str, seed: int) -> Path:
        return folder / f"{name}-s{seed}.json"

    def is_there(path: Path) -> bool:
        return path.is_file() and json.loads(path.read_text())["commit"] == commit()

    def work(item: tuple[str, list[int]]) -> None:
        name, chosen = item
        for seed, result in zip(chosen, train(name, chosen, overrides), strict=True):
            keep(result, path_of(name, seed))
            summary = result["summary"]
            print(f"{name} seed {seed}: {summary['return_mean']:,.1f} in {summary['seconds']:,.0f} s", flush=True)

    missing = {name: [seed for seed in seeds if not is_there(path_of(name, seed))] for name in names}
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, [(name, part) for name in names for part in stretches(missing[name], one_by_one)]))


def load(folder: Path = RUNS) -> dict[str, list[dict[str, Any]]]:
    """The kept results by environment and method, as ``HalfCheetah/ppo``, each in order of seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(f"{result['summary']['env']}/{result['summary']['algo']}", []).append(result)
    return found


def published() -> dict[str, list[dict[str, str]]]:
    """What others report, by environment and method, as ``HalfCheetah/ppo``, the highest mean first: those of three
    seeds or more if there are any, and of single runs otherwise."""
    found: dict[str, list[dict[str, str]]] = {}
    with PUBLISHED.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(f"{row['environment']}/{row['method']}", []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: (row["seeds"] != "1", float(row["mean"])), reverse=True)
    return found


def highest(key: str, steps: int, figures: dict[str, list[dict[str, str]]]) -> dict[str, str] | None:
    """The highest published mean where that took as many steps (a last rollout apart) or more."""
    return next((row for row in figures.get(key, []) if steps <= 1.05 * int(row["steps"])), None)


def verdict(mean: float, figure: dict[str, str]) -> str:
    """How a mean compares with a published one."""
    level, deviation = float(figure["mean"]), float(figure["deviation"] or 0)
    return "above" if mean >= level else "within" if mean >= level - deviation else "short"


def means_of(results: list[dict[str, Any]], metric: str) -> np.ndarray:
    """The mean return of each run by a metric of published.csv: in training, or of its last policy.  Where it is not
    said how actions were chosen in a test they were sampled; of results without evaluations, those of training."""
    how = {"test": "sampled"}.get(metric, metric)
    training = metric == "training" or not all(result.get("evaluation") for result in results)
    return np.array([
        result["summary"]["return_mean"] if training else result["evaluation"][how]["mean"]
        for result in results
    ])  # fmt: skip


def cells() -> dict[str, dict[str, str]]:
    """Everything that is said of an environment and a method, formatted, in the order of the table."""
    results, figures, found = load(), published(), {}
    for env in (*ENVIRONMENTS, *sorted({key.split("/")[0] for key in results} - set(ENVIRONMENTS))):
        for method in METHODS:
            key = f"{env}/{method}"
            if key not in results:
                continue
            summaries = [result["summary"] for result in results[key]]
            means = means_of(results[key], "training")
            ends = interval(interquartile_mean, means)
            figure = highest(key, summaries[0]["steps"], figures)
            evaluated = all(result.get("evaluation") for result in results[key])
            digits = 0 if max(abs(means)) >= 1000 else 1
            found[key] = {
                "steps": f"{round(summaries[0]['steps'], -4):,}",
                "seeds": str(len(means)),
                "iqm": f"{interquartile_mean(means):,.{digits}f}",
                "interval": f"[{ends[0]:,.{digits}f}, {ends[1]:,.{digits}f}]" if ends else "-",
                "mean": f"{means.mean():,.{digits}f} ± {means.std():,.{digits}f}",
                **{
                    how: f"{means_of(results[key], how).mean():,.{digits}f}" if evaluated else "-"
                    for how in ("sampled", "deterministic")
                },
                "code": ", ".join(sorted({result["commit"][:7] for result in results[key]})),
                "published": _figure(figure) if figure else "-",
                "source": _source(figure) if figure else "-",
                "verdict": verdict(float(means_of(results[key], figure["metric"]).mean()), figure) if figure else "",
            }
    return found


def table() -> str:
    """In Markdown: a line an environment, and folded beneath it a line a method with all that is known."""
    found = cells()
    lines = [f"| | {' | '.join(method.upper() for method in METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    for env in ENVIRONMENTS:
        row = [_short(found[key]) if key in found else "-" for key in (f"{env}/{method}" for method in METHODS)]
        if any(cell != "-" for cell in row):
            lines.append(f"| {env} | {' | '.join(row)} |")
    lines += [
        "",
        counts(found),
        "",
        "<details><summary>Every cell: steps, seeds, mean, source, commit of the code</summary>",
        "",
        "| environment | method | steps | seeds | interquartile mean | 95% | mean | sampled | deterministic | "
        "published | by | | commit |",
        "|---" * 13 + "|",
    ]
    columns = ("steps", "seeds", "iqm", "interval", "mean", "sampled", "deterministic")
    columns += ("published", "source", "verdict", "code")
    for key, cell in found.items():
        lines.append(f"| {' | '.join((*key.split('/'), *(cell[column] for column in columns)))} |")
    return "\n".join([*lines, "", "</details>"])


def _figure(figure: dict[str, str]) -> str:
    """A published mean and its deviation over seeds."""
    deviation = f" ± {float(figure['deviation']):,.4g}" if figure["deviation"] else ""
    return f"{float(figure['mean']):,.5g}{deviation}"


def _source(figure: dict[str, str]) -> str:
    seeds = {"": "several seeds", "1": "1 run"}.get(figure["seeds"], f"{figure['seeds']} seeds")
    return f"{figure['source']}, {figure['version']}, {int(figure['steps']):,} steps, {seeds}, {figure['metric']}"


def counts(found: dict[str, dict[str, str]]) -> str:
    """How many published means are reached, in words."""
    verdicts = [cell["verdict"] for cell in found.values() if cell["verdict"]]
    count = {kind: verdicts.count(kind) for kind in ("above", "within", "short")}
    return (
        f"Of {len(verdicts)} published means {count['above']} are reached ({MARKS['above']}), {count['within']} missed "
        f"by at most a published deviation ({MARKS['within']}) and {count['short']} by more ({MARKS['short']})."
    )


def brief() -> str:
    """In Markdown, for the README: a few environments, a number a method."""
    found = cells()
    lines = [f"| | {' | '.join(method.upper() for method in METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    for env in BRIEF:
        row = [found.get(f"{env}/{method}") for method in METHODS]
        shown = [f"{cell['iqm']} {MARKS[cell['verdict']]}".strip() if cell else "-" for cell in row]
        lines.append(f"| {env} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", counts(found)])


def compare(name: str) -> str:
    """In Markdown: cells of the table beside the same cells of what was run apart, and how likely a run of the latter
    is the better one of two."""
    usual, others = load(), load(apart(name))
    lines = [f"| | | seeds | as in the table | {name} | a run of {name} is better |", "|---|---|---|---|---|---|"]
    samples: list[np.ndarray] = []
    inside = 0
    for key in (f"{env}/{method}" for env in ENVIRONMENTS for method in METHODS):
        if key not in others:
            continue
        table, ours = (np.array([x["summary"]["return_mean"] for x in found[key]]) for found in (usual, others))
        cells = [_with_interval(interquartile_mean, x, form=",.1f") for x in (table, ours)]
        better = _with_interval(probability_of_improvement, ours, table, form=".0%")
        lines.append(f"| {' | '.join((*key.split('/'), str(len(ours)), *cells, better))} |")
        ends = interval(interquartile_mean, table)
        inside += ends is not None and bool(ends[0] <= interquartile_mean(ours) <= ends[1])
        samples += [ours, table]
    overall = _with_interval(probability_of_improvement, *samples, form=".0%")
    lines += [
        "",
        f"In {inside} of {len(lines) - 2} cells {name} is within the table's interval. Over all of them a run of "
        f"{name} is better than one of the table with a probability of {overall}.",
    ]
    return "\n".join(lines)


def _with_interval(statistic: Callable[..., np.ndarray], *samples: np.ndarray, form: str) -> str:
    ends = interval(statistic, *samples)
    value = f"{float(statistic(*samples)):{form}}"
    return f"{value} [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else value


def _short(cell: dict[str, str]) -> str:
    """A cell in two lines; the number of seeds is said where it is not five."""
    seeds = "" if cell["seeds"] == "5" else "(1 seed)" if cell["seeds"] == "1" else f"({cell['seeds']} seeds)"
    spread = cell["interval"] if cell["interval"] != "-" else ""
    return f"{' '.join(filter(None, (cell['iqm'], spread, MARKS[cell['verdict']], seeds)))}<br>{cell['published']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("run", help="train and keep the results")
    train_parser.add_argument("names", nargs="+", help="<algo>-<env>, as recipes are named, or all that there are")
    train_parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    train_parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    train_parser.add_argument("--one-by-one", action="store_true", help="one seed in a process")
    train_parser.add_argument("--set", nargs="*", default=[], help="further overrides")
    table_parser = commands.add_parser("table", help="print what is kept")
    table_parser.add_argument(
        "--docs", action="store_true", help="put it into its page, and a few rows into the README"
    )
    train_parser.add_argument("--apart", metavar="NAME", help="keep the results under this name, outside the table")
    compare_parser = commands.add_parser("compare", help="set what was run apart beside the table")
    compare_parser.add_argument("name")
    compare_parser.add_argument("--docs", action="store_true", help="put it into docs/reference/speed.md as well")
    args = parser.parse_args()
    if args.command == "table":
        print(table())
        if args.docs:
            write_table("docs/reference/results.md", "returns.py table --docs", table())
            write_table("README.md", "returns.py table --docs", brief())
    elif args.command == "compare":
        print(compare(args.name))
        if args.docs:
            write_table("docs/reference/speed.md", f"returns.py compare {args.name} --docs", compare(args.name))
    else:
        recipes = sorted(path.stem for path in (ROOT / "configs" / "tuned").glob("*-[A-Z]*.yaml"))
        run(
            recipes if args.names == ["all"] else args.names,
            args.seeds,
            args.jobs,
            args.set,
            apart(args.apart) if args.apart else RUNS,
            args.one_by_one,
        )


if __name__ == "__main__":
    main()
