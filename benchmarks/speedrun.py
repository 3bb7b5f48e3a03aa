"""HalfCheetah to a return of 5,000: seconds from the start of the process, and a table of what has shortened them.

    python benchmarks/speedrun.py measure "what changed"   # this commit and that of the row before, seeds 0 to 4
    python benchmarks/speedrun.py table --docs             # writes the table of docs/reference/speedrun.md

A run is that of ``wallclock.py run HalfCheetah-5000``, whose settings belong to the commit.  ``measure`` runs a
commit and that of the row before in turn, seed by seed, since times of different machines, or of other hours of a
shared one, do not compare.  It writes one file a row to benchmarks/results/speedrun/, and goes on where it was cut off.
CPU seconds are those of all processes of a run, from the start until the files of the run are written.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, keep, source, write_table

KEPT = RESULTS / "speedrun"
TARGET = "HalfCheetah-5000"


def rows() -> list[dict[str, Any]]:
    """What is kept, the oldest first."""
    return sorted((json.loads(path.read_text()) for path in KEPT.glob("*.json")), key=lambda row: row["date"])


def checkout(commit: str, tree: Path) -> str:
    """Clone this repository at a commit, whose name is returned."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=tree, check=True)
    name = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=tree, capture_output=True, text=True, check=True
    )
    return name.stdout.strip()


def run(tree: Path, seed: int, *more: str) -> dict[str, Any]:
    """One run of the checkout ``tree``, by its own wallclock.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(tree / "benchmarks" / "wallclock.py"), "run", TARGET, "--seeds", str(seed)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(
            [*command, "--out", folder, *more], cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"seed {seed} in {tree} failed:\n{done.stderr}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads((Path(folder) / f"{TARGET}-s{seed}.json").read_text())
    return found | {"cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def measure(commit: str, what: str, seeds: list[int]) -> None:
    """The row of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / "here"
        about = source() | {"commit": checkout(commit, here)}
        path = KEPT / f"{about['commit']}.json"
        row: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "what": what, **about}
        row |= {"runs": [], "before": []}
        if path.is_file():
            row = json.loads(path.read_text()) | {"what": what}
        trees = {"runs": here}
        if earlier := [x for x in rows() if x["date"] < row["date"] and x["commit"] != row["commit"]]:
            trees = {"before": Path(folder) / "before", **trees}
            checkout(earlier[-1]["commit"], trees["before"])
        for tree in trees.values():
            run(tree, 0, "--set", "total_steps=4_096")  # fills the compiler's cache
        for seed in seeds:
            for name, tree in trees.items():
                if any(x["seed"] == seed for x in row[name]):
                    continue
                x = run(tree, seed)
                row[name].append(x)
                keep(row, path)
                reached = f"{x['seconds']:.1f} s, {x['steps']:,} steps" if x["steps"] else "not reached"
                print(f"{x['commit']}, seed {seed}: {reached}, {x['cpu_seconds']:.0f} CPU s", flush=True)


def median(runs: list[dict[str, Any]]) -> float:
    """Seconds; a run that did not get there took longer than any that did."""
    return statistics.median(x["seconds"] or float("inf") for x in runs)


def per_step(runs: list[dict[str, Any]], what: str) -> float:
    """The median over runs of ``what`` for 100,000 steps; those that did not get there have no steps."""
    return statistics.median(1e5 * x[what] / x["steps"] for x in runs if x["steps"])


def table(kept: list[dict[str, Any]]) -> str:
    """A row for each improvement, and the previous row as measured with it."""
    lines = [
        "| commit | what changed | seconds | steps | previous row, measured in turn "
        "| CPU time per step, relative to it |",
        "|---|---|---|---|---|---|",
    ]
    for row in kept:
        runs, before = row["runs"], row["before"]
        steps = statistics.median(x["steps"] or float("inf") for x in runs)
        ratio = f"{per_step(runs, 'cpu_seconds') / per_step(before, 'cpu_seconds'):.2f}" if before else "-"
        lines.append(
            f"| {row['date'][:10]}<br>{row['commit']} | {row['what']} | {seconds(runs)} | {steps:,.0f} "
            f"| {seconds(before) if before else '-'} | {ratio} |"
        )
    machines = sorted({f"{row['machine']}; torch {row['versions']['torch']}" for row in kept})
    return "\n".join([*lines, "", *(f"{machine}." for machine in machines), ""])


def seconds(runs: list[dict[str, Any]]) -> str:
    """The median and the spread, in words."""
    reached = sorted(x["seconds"] for x in runs if x["seconds"])
    spread = f"from {reached[0]:.1f} to {reached[-1]:.1f}"
    spread += "" if len(reached) == len(runs) else f"; {len(reached)} of {len(runs)} reached"
    return f"{median(runs):.1f} ({spread})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measurer = commands.add_parser("measure")
    measurer.add_argument("what", help="what changed since the row before, in one sentence")
    measurer.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    measurer.add_argument("--commit", default="HEAD", help="the commit that is measured")
    tabler = commands.add_parser("table")
    tabler.add_argument("--docs", action="store_true", help="put it into docs/reference/speedrun.md")
    args = parser.parse_args()
    if args.command == "measure":
        measure(args.commit, args.what, args.seeds)
    elif args.docs:
        write_table("docs/reference/speedrun.md", "speedrun.py table --docs", table(rows()))
    else:
        print(table(rows()))


if __name__ == "__main__":
    main()
