"""Methods with their plain defaults on tasks that have no recipe, beside SB3's and sb3-contrib's defaults.

    python benchmarks/untuned.py run ppo a2c trpo --seeds 0 1 2 3 4 --jobs 2
    python benchmarks/untuned.py run ppo --tasks Pendulum LunarLander --only pgsuite
    python benchmarks/untuned.py table --docs

Needs pip install -e ".[peers,third-party]".  Each run is a process of its own on one thread, with the seconds that the
processor spent on it from its start to its end.  A score is the mean return of the episodes that finished in the last
tenth; at equal seconds, that of the last tenth before the end of the faster library's run.  What is kept of the same
commit (SB3's runs: of the same version) is not run again.  Results are in benchmarks/results/untuned/.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, commit, keep, machine, write_table

KEPT = RESULTS / "untuned"
METHODS = {"ppo": "PPO", "a2c": "A2C", "trpo": "TRPO"}
PACKAGES = {"ppo": "stable-baselines3", "a2c": "stable-baselines3", "trpo": "sb3-contrib"}
PEER, OURS = "SB3", "pgsuite"


@dataclass
class Task:
    id: str  # gymnasium's
    steps: int
    wrapper: str | None = None


TASKS = {
    "LunarLander": Task("LunarLander-v3", 150_000),
    "BipedalWalker": Task("BipedalWalker-v3", 150_000),
    "Pendulum": Task("Pendulum-v1", 100_000),
    "Acrobot": Task("Acrobot-v1", 100_000),
    "MountainCarContinuous": Task("MountainCarContinuous-v0", 100_000),
    "DoorKey": Task("minigrid:MiniGrid-DoorKey-5x5-v0", 150_000, "minigrid.wrappers.ImgObsWrapper"),
    "Boiler": Task("untuned_tasks:Boiler-v0", 100_000),
    "Hopper": Task("Hopper-v5", 100_000),
}
Curve = list[tuple[float, float, float]]  # steps, seconds, return


def score(curve: Curve, axis: int, until: float) -> float | None:
    """The mean return in the last tenth before ``until`` steps (axis 0) or seconds (axis 1), or the last before it."""
    before = [point for point in curve if point[axis] <= 1.02 * until]
    last = [point[2] for point in before if point[axis] > 0.9 * until] or [point[2] for point in before[-1:]]
    return statistics.fmean(last) if last else None


def finished(command: list[str]) -> tuple[str, float]:
    """What a process printed, and the seconds of processor that it took."""
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "benchmarks"))
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, env=environ)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{err.read()}")
        return out.read(), used.ru_utime + used.ru_stime


def ours(method: str, task: Task, seed: int) -> dict[str, Any]:
    begun_at = commit()
    arguments = [f"algo={method}", "env=gym", f"env.id={task.id}", "~tuned", f"seed={seed}"]
    arguments.append(f"total_steps={task.steps}")
    arguments += [f"env.wrappers=[{task.wrapper}]"] if task.wrapper else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "scripts/train.py", *arguments, "env_threads=1", f"hydra.run.dir={folder}/run"]
        _, seconds = finished(command)
        with (Path(folder) / "run" / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("episode/return")]
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    curve = [(float(row["steps"]), float(row["time/seconds"]), float(row["episode/return"])) for row in rows]
    about = {"command": f"python scripts/train.py {' '.join(arguments)}", "commit": begun_at}
    return about | {"version": summary["versions"]["pgsuite"], "return": summary["return_mean"]} | spent(curve, seconds)


def peers(method: str, task: str, seed: int) -> dict[str, Any]:
    arguments = ["benchmarks/untuned.py", "peer", method, task, str(seed)]
    printed, seconds = finished([sys.executable, *arguments])
    curve = json.loads(printed.splitlines()[-1])
    about = {"command": f"python {' '.join(arguments)}", "commit": commit(), "version": version(PACKAGES[method])}
    return about | {"return": score(curve, 0, TASKS[task].steps)} | spent(curve, seconds)


def spent(curve: Curve, seconds: float) -> dict[str, Any]:
    """The curve in at most 200 points, its seconds those of the processor: the process's last is ``seconds``."""
    width = max(1, len(curve) // 200)
    pieces = [curve[i : i + width] for i in range(0, len(curve), width)]
    scale = seconds / curve[-1][1] if curve else 1
    thinned = [
        (piece[-1][0], round(piece[-1][1] * scale, 2), round(statistics.fmean(p[2] for p in piece), 2))
        for piece in pieces
    ]
    return {"seconds": round(seconds, 1), "curve": thinned}


def peer(method: str, name: str, seed: int) -> None:
    """Train SB3's class with its defaults in this process and print its curve, a point an episode."""
    import gymnasium
    import torch
    from stable_baselines3.common.callbacks import BaseCallback  # pyright: ignore[reportMissingImports]
    from stable_baselines3.common.monitor import Monitor  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    task, start, curve = TASKS[name], time.perf_counter(), []
    env = gymnasium.make(task.id)
    if task.wrapper:
        module, _, wrapper = task.wrapper.rpartition(".")
        env = getattr(importlib.import_module(module), wrapper)(env)

    class Episodes(BaseCallback):
        def _on_step(self) -> bool:
            ended = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
            curve.extend((self.num_timesteps, time.perf_counter() - start, float(value)) for value in ended)
            return True

    library = importlib.import_module("sb3_contrib" if method == "trpo" else "stable_baselines3")
    model = getattr(library, METHODS[method])("MlpPolicy", Monitor(env), seed=seed, device="cpu")
    model.learn(task.steps, callback=Episodes())
    print(json.dumps(curve))


def run(methods: list[str], tasks: list[str], seeds: list[int], jobs: int, only: str | None) -> None:
    def is_there(path: Path, library: str, method: str) -> bool:
        if not path.is_file():
            return False
        found = json.loads(path.read_text())
        return found["version"] == version(PACKAGES[method]) if library == PEER else found["commit"] == commit()

    def work(item: tuple[str, str, int, str]) -> None:
        method, name, seed, library = item
        path = KEPT / f"{method}-{name}-{library}-s{seed}.json"
        if is_there(path, library, method):
            return
        result = ours(method, TASKS[name], seed) if library == OURS else peers(method, name, seed)
        about = {"method": method, "task": name, "library": library, "seed": seed, "steps": TASKS[name].steps}
        keep(about | result | {"machine": machine()}, path)
        print(f"{path.stem}: {result['return']:,.1f} in {result['seconds']:,.0f} s", flush=True)

    libraries = (only,) if only else (PEER, OURS)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, [(m, t, s, lib) for m in methods for t in tasks for s in seeds for lib in libraries]))


def table() -> str:
    """In Markdown, a line a method and task: returns at equal steps and at equal seconds, and the seconds; of the seeds
    that both libraries have run."""
    kept: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for path in sorted(KEPT.glob("*.json")):
        result = json.loads(path.read_text())
        kept.setdefault((result["method"], result["task"], result["library"]), {})[result["seed"]] = result
    head = "method | task | steps | seeds | pgsuite | SB3 | at equal seconds: pgsuite | SB3 | seconds: pgsuite | SB3"
    lines = [f"| {head} |", "|---" * 10 + "|"]
    for method in METHODS:
        for name in TASKS:
            runs = {library: kept.get((method, name, library), {}) for library in (OURS, PEER)}
            seeds = runs[OURS].keys() & runs[PEER].keys()
            if not seeds:
                continue
            both = {library: [runs[library][seed] for seed in seeds] for library in runs}
            seconds = {library: statistics.median(r["seconds"] for r in both[library]) for library in both}
            until = min(seconds.values())
            cells = [METHODS[method], name, f"{TASKS[name].steps:,}", str(len(seeds))]
            cells += [spread([r["return"] for r in both[library]]) for library in (OURS, PEER)]
            cells += [spread([score(r["curve"], 1, until) for r in both[library]]) for library in (OURS, PEER)]
            cells += [f"{seconds[library]:,.0f}" for library in (OURS, PEER)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    digits = 0 if max(map(abs, known)) >= 1000 else 2 if max(map(abs, known)) < 10 else 1
    return f"{statistics.fmean(known):,.{digits}f} ± {statistics.pstdev(known):,.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("run")
    train.add_argument("methods", nargs="+", choices=METHODS)
    train.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    train.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    train.add_argument("--jobs", type=int, default=2)
    train.add_argument("--only", choices=(PEER, OURS))
    one = commands.add_parser("peer")
    one.add_argument("method", choices=METHODS)
    one.add_argument("task", choices=TASKS)
    one.add_argument("seed", type=int)
    commands.add_parser("table").add_argument("--docs", action="store_true", help="write the table into its page")
    options = parser.parse_args()
    if options.command == "run":
        run(options.methods, options.tasks, options.seeds, options.jobs, options.only)
    elif options.command == "peer":
        peer(options.method, options.task, options.seed)
    elif options.docs:
        write_table("docs/reference/results.md", "untuned.py table --docs", table())
    else:
        print(table())


if __name__ == "__main__":
    main()
