"""Train with the committed recipes over several seeds and keep what came of it.

    python benchmarks/returns.py run ppo-HalfCheetah trpo-HalfCheetah --seeds 0 1 2 3 4 --jobs 2
    python benchmarks/returns.py run all --jobs 2
    python benchmarks/returns.py table

``run`` writes one file a run to benchmarks/results/returns/: the run's summary, its learning curve, the command, the
commit and the machine.  ``table`` prints means and deviations over seeds of what is there.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, commit, machine, write_table

RUNS = RESULTS / "returns"
METHODS = ("ppo", "trpo", "npg", "a2c", "reinforce")


def train(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run in a process of its own."""
    algo, env = name.split("-", 1)
    begun_at = commit()  # before the run: the tree may move on meanwhile
    arguments = [f"algo={algo}", f"env={env}", f"seed={seed}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "scripts/train.py", *arguments, "env_threads=1", f"hydra.run.dir={folder}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
        run = Path(folder) / "run"
        summary = json.loads((run / "summary.json").read_text())
        with (run / "metrics.csv").open(newline="") as file:
            rows = [(int(row["steps"]), row["episode/return"]) for row in csv.DictReader(file) if row["episode/return"]]
    return {
        "command": f"python scripts/train.py {' '.join(arguments)}",
        "commit": begun_at,
        "machine": machine(),
        "summary": summary,
        "curve": {"steps": [s for s, _ in rows], "return": [round(float(r), 2) for _, r in rows]},
    }


def run(names: list[str], seeds: list[int], jobs: int, overrides: list[str]) -> None:
    """Every name with every seed, ``jobs`` at a time."""
    RUNS.mkdir(parents=True, exist_ok=True)

    def work(item: tuple[str, int]) -> None:
        name, seed = item
        result = train(name, seed, overrides)
        (RUNS / f"{name}-s{seed}.json").write_text(json.dumps(result, indent=1) + "\n")
        summary = result["summary"]
        print(f"{name} seed {seed}: {summary['return_mean']:,.1f} in {summary['seconds']:,.0f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, [(name, seed) for name in names for seed in seeds]))


def load() -> dict[str, list[dict[str, Any]]]:
    """The kept results by environment and method, as ``HalfCheetah/ppo``, each in order of seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RUNS.glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(f"{result['summary']['env']}/{result['summary']['algo']}", []).append(result)
    return found


def table() -> str:
    """A Markdown table of what is kept."""
    lines = ["| environment | method | steps | return | each seed | steps/s |", "|---|---|---|---|---|---|"]
    results = load()
    for key in sorted(results, key=lambda key: (key.split("/")[0], METHODS.index(key.split("/")[1]))):
        summaries = [result["summary"] for result in results[key]]
        means = [summary["return_mean"] for summary in summaries]
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        speed = statistics.median(summary["steps_per_second"] for summary in summaries)
        env, algo = key.split("/")
        seeds = ", ".join(f"{mean:,.0f}" for mean in means)
        steps = f"{round(summaries[0]['steps'], -4):,}"
        lines.append(
            f"| {env} | {algo} | {steps} | {statistics.mean(means):,.0f} ± {spread:,.0f} | {seeds} | {speed:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("run", help="train and keep the results")
    train_parser.add_argument("names", nargs="+", help="<algo>-<env>, as recipes are named, or all that there are")
    train_parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    train_parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    train_parser.add_argument("--set", nargs="*", default=[], help="further overrides")
    table_parser = commands.add_parser("table", help="print what is kept")
    table_parser.add_argument("--readme", action="store_true", help="put it into the README as well")
    args = parser.parse_args()
    if args.command == "table":
        print(table())
        if args.readme:
            write_table("README.md", "returns.py table --readme", table())
    else:
        recipes = sorted(path.stem for path in (ROOT / "configs" / "tuned").glob("*-[A-Z]*.yaml"))
        run(recipes if args.names == ["all"] else args.names, args.seeds, args.jobs, args.set)


if __name__ == "__main__":
    main()
