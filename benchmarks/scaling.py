"""How PPO's speed, time and memory go with the number of environments, the width of the networks and the cores.

    python benchmarks/scaling.py run [--only envs width cores] [--seconds 3]
    python benchmarks/scaling.py table --docs               # and draws docs/reference/scaling.png

Whole iterations of 16 steps in every environment, 5 epochs x 4 minibatches, two networks of two layers, on CartPole
(torch) and on HalfCheetah (MuJoCo), eager and compiled.  Each cell is a process of its own, so that its memory is its
own; after one iteration of warming up it does iterations until the seconds are over, but one at least.  ``run`` leaves
out cells that are kept already, says how long the others may take, and writes each to benchmarks/results/scaling/.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from record import RESULTS, ROOT, keep, source, write_table

KEPT = RESULTS / "scaling"
HORIZON = 16
TASKS, WAYS = ("CartPole", "HalfCheetah"), ("eager", "compile")
ENVS = [4**k for k in range(8)]  # 1 to 16,384
WIDTHS = [32, 64, 128, 256, 512, 1024]
SPLIT = (16, 256, 4096)  # environments that time and memory are split for


@dataclass(frozen=True)
class Cell:
    task: str
    way: Any
    envs: int = 256
    width: int = 64
    cores: int = 2  # for this process; physics has a thread on each
    torch_threads: int = 1

    @property
    def path(self) -> Path:
        threads = f"c{self.cores}-t{self.torch_threads}"
        return KEPT / f"{self.task}-{self.way}-n{self.envs}-w{self.width}-{threads}.json"


PLAIN = [Cell(task, way) for task in TASKS for way in WAYS]
AXES = {
    "envs": [replace(cell, envs=count) for cell in PLAIN for count in ENVS],
    "width": [replace(cell, width=width) for cell in PLAIN for width in WIDTHS],
    "cores": [replace(cell, cores=c, torch_threads=t) for cell in PLAIN for c, t in ((1, 1), (2, 1), (2, 2))],
}


def measure(cell: Cell, seconds: float) -> dict[str, Any]:
    """Steps/s, where the time went, and the memory that this process had at most, in this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: cell.cores])
    import torch
    from throughput import ppo

    from pgsuite.envs import make

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # bytes

    torch.set_num_threads(cell.torch_threads)
    imported = peak()
    began = perf_counter()
    env = make(cell.task, cell.envs, threads=cell.cores if cell.task == "HalfCheetah" else 0)
    algorithm, collector = ppo(env, cell.way, HORIZON, (cell.width, cell.width))
    algorithm.iterate(collector)
    warm_up = perf_counter() - began
    before, iterations, began = dict(collector.seconds), 0, perf_counter()
    while (now := perf_counter()) - began < seconds or not iterations:
        algorithm.iterate(collector)
        iterations += 1
    spent = {name: x - before[name] for name, x in collector.seconds.items()}
    shares = {name: x / (now - began) for name, x in spent.items()}
    shares["learning"] = 1 - sum(shares.values())
    rate = iterations * HORIZON * cell.envs / (now - began)
    memory = {"imported": imported, "peak": peak()}
    return {"steps_per_second": rate, "shares": shares, "memory": memory, "warm_up": warm_up, "iterations": iterations}


def run(axes: Sequence[str], seconds: float) -> None:
    """Every cell that is not kept, each in a process of its own."""
    cells = [cell for cell in dict.fromkeys(x for axis in axes for x in AXES[axis]) if not cell.path.exists()]
    work = sum(HORIZON * cell.envs * max(1, cell.width / 128) for cell in cells) / 10_000  # of the warm-up
    expected = len(cells) * (seconds + 5) + 12 * sum(cell.way == "compile" for cell in cells) + 2 * work
    print(f"{len(cells)} cells, about {expected / 60:.0f} minutes on two quiet cores", flush=True)
    for cell in cells:
        command = [sys.executable, __file__, "cell", json.dumps(asdict(cell)), str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{cell} failed:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        keep(asdict(cell) | found | {"seconds": seconds} | source(), cell.path)
        print(f"{cell.path.stem}: {found['steps_per_second']:,.0f} steps/s", flush=True)


def load(cell: Cell) -> dict[str, Any] | None:
    return json.loads(cell.path.read_text()) if cell.path.exists() else None


def rates(title: str, rows: dict[str, list[Cell]]) -> list[str]:
    """Steps/s, a column for each task and way; a dash where nothing was measured."""
    heads = [f"{cell.task}, {cell.way}" for cell in PLAIN]
    lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, cells in rows.items():
        found = [f"{x['steps_per_second']:,.0f}" if (x := load(cell)) else "-" for cell in cells]
        lines.append(f"| {name} | {' | '.join(found)} |")
    return [*lines, ""]


def split() -> list[str]:
    lines = ["| | environments | environment | acting | learning | peak memory | of it imports |", "|---" * 7 + "|"]
    for cell in (replace(plain, envs=count) for plain in PLAIN for count in SPLIT):
        if (found := load(cell)) is None:
            continue
        shares = [f"{found['shares'][name]:.0%}" for name in ("environment", "acting", "learning")]
        memory = [f"{found['memory'][name] / 2**20:,.0f} MiB" for name in ("peak", "imported")]
        lines.append(f"| {cell.task}, {cell.way} | {cell.envs:,} | {' | '.join([*shares, *memory])} |")
    return [*lines, ""]


def text() -> str:
    results = [json.loads(path.read_text()) for path in sorted(KEPT.glob("*.json"))]
    if not results:
        raise SystemExit("nothing was measured yet")
    first, commits = results[0], ", ".join(sorted({str(x["commit"]) for x in results}))
    plain = Cell("", "")
    threads = {"1 core": (1, 1), "2 cores, one torch thread": (2, 1), "2 cores, two torch threads": (2, 2)}
    lines = ["![steps/s against environments and width](scaling.png)", "", "Steps/s:", ""]
    lines += rates("environments", {f"{n:,}": [replace(cell, envs=n) for cell in PLAIN] for n in ENVS})
    lines += rates("width", {f"{w:,}": [replace(cell, width=w) for cell in PLAIN] for w in WIDTHS})
    lines += rates(
        "cores", {k: [replace(cell, cores=c, torch_threads=t) for cell in PLAIN] for k, (c, t) in threads.items()}
    )
    lines += ["Where an iteration's time goes, and the memory that the process has at most:", "", *split()]
    caption = f"{plain.envs} environments, layers of {plain.width}, {plain.cores} cores and one torch thread, unless a "
    caption += f"row says otherwise; {first['machine']}; torch {first['versions']['torch']}; commit {commits}."
    return "\n".join([*lines, caption, ""])


def draw(out: Path) -> None:
    """Steps/s against environments, and against width."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for panel, (field, values) in zip(axes, (("envs", ENVS), ("width", WIDTHS)), strict=True):
        for plain, color, style in zip(PLAIN, ("C0", "C0", "C1", "C1"), ("--", "-", "--", "-"), strict=True):
            found = [(x, load(replace(plain, **{field: x}))) for x in values]
            points = [(x, cell["steps_per_second"]) for x, cell in found if cell]
            panel.plot(*zip(*points, strict=True), style, color=color, marker=".", label=f"{plain.task}, {plain.way}")
        panel.set(xscale="log", yscale="log", xlabel={"envs": "environments", "width": "width of the layers"}[field])
        panel.set_xticks(values, [f"{x:,}" for x in values], minor=False, fontsize=8)
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("steps/s")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(out)


def main() -> None:
    if sys.argv[1:2] == ["cell"]:
        print(json.dumps(measure(Cell(**json.loads(sys.argv[2])), float(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--only", nargs="+", default=list(AXES), choices=AXES)
    runner.add_argument("--seconds", type=float, default=3.0, help="of each cell")
    tabler = commands.add_parser("table")
    tabler.add_argument("--docs", action="store_true", help="put it into the page, with a plot beside it")
    args = parser.parse_args()
    if args.command == "run":
        run(args.only, args.seconds)
    elif args.docs:
        draw(ROOT / "docs" / "reference" / "scaling.png")
        write_table("docs/reference/speed.md", "scaling.py table --docs", text())
    else:
        print(text())


if __name__ == "__main__":
    main()
