"""Constrained methods: returns and costs under a limit, beside the best policy that is known or OmniSafe's table.

    python benchmarks/constrained.py [--tasks Cruise SafetyHalfCheetahVelocity] [--methods ppo_lagrangian cpo]
                                     [--seeds 0 1 2 3 4] [--steps 1000000] [--jobs 2]
    python benchmarks/constrained.py --docs

The seeds of a method and a task are trained at once in one process. Each run is kept in
benchmarks/results/constrained/<task>-<method>-s<seed>.json: how return and cost of the training episodes went, and an
evaluation of the last policy with sampled actions, since the limit is for these. A run that is kept with equal settings
is not repeated.  In without-margin beside them lie runs of CPO before it had a margin (commit 3eb2ab4).
``--docs`` measures nothing and puts the kept results into docs/explanation/constrained.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, keep, source, spread, write_table
from returns import stretches

from pgsuite.envs.tasks import Cruise

KEPT = RESULTS / "constrained"
METHODS = ("ppo_lagrangian", "trpo_lagrangian", "cpo")
ROBOTS = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Swimmer", "Humanoid")
TASKS = ("Cruise", *(f"Safety{name}Velocity" for name in ROBOTS))
STEPS = {"Cruise": 115_200}  # others: --steps
CRUISE = ["num_envs=48", "horizon=16", "algo.cost_limit=4"]
CRUISE_PPO = ["algo.lr=3e-4", "algo.minibatches=4"]
# A slower multiplier returns more there, at costs near the limit (multiplier-lr.json of the results, seeds 100 to 102).
SLOWER = {("SafetyWalker2dVelocity", f"{method}_lagrangian"): ["algo.multiplier_lr=0.01"] for method in ("ppo", "trpo")}
RECIPES = {"ppo_lagrangian": "ppo", "trpo_lagrangian": "trpo", "cpo": "trpo"}  # of gymnasium's tasks
# Return and cost of OmniSafe after 1e7 steps at a limit of 25, its benchmarks/on-policy/README.md, table 2.
PUBLISHED = {
    "SafetyHalfCheetahVelocity": {
        "ppo_lagrangian": ("2,946 ± 306", "3.4 ± 4.8"),
        "trpo_lagrangian": ("2,885 ± 77", "9.0 ± 11.8"),
        "cpo": ("2,786 ± 173", "4.7 ± 6.7"),
    },
    "SafetyHopperVelocity": {
        "ppo_lagrangian": ("962 ± 753", "14.0 ± 19.3"),
        "trpo_lagrangian": ("1,392 ± 269", "11.2 ± 10.0"),
        "cpo": ("1,714 ± 18", "13.4 ± 5.8"),
    },
    "SafetyWalker2dVelocity": {
        "ppo_lagrangian": ("2,982 ± 682", "13.5 ± 14.6"),
        "trpo_lagrangian": ("3,207 ± 8", "15.0 ± 9.3"),
        "cpo": ("2,075 ± 962", "21.9 ± 9.4"),
    },
    "SafetyAntVelocity": {
        "ppo_lagrangian": ("3,262 ± 80", "12.1 ± 6.6"),
        "trpo_lagrangian": ("3,042 ± 181", "19.5 ± 20.2"),
        "cpo": ("3,099 ± 79", "14.1 ± 3.4"),
    },
    "SafetySwimmerVelocity": {
        "ppo_lagrangian": ("64.7 ± 17.7", "28.0 ± 4.1"),
        "trpo_lagrangian": ("81.2 ± 16.3", "22.2 ± 3.9"),
        "cpo": ("65.3 ± 43.3", "18.2 ± 8.0"),
    },
    "SafetyHumanoidVelocity": {
        "ppo_lagrangian": ("6,624 ± 26", "5.9 ± 9.5"),
        "trpo_lagrangian": ("6,551 ± 58", "59.6 ± 117.4"),
        "cpo": ("6,465 ± 80", "0.2 ± 0.4"),
    },
}


def settings(task: str, method: str, seed: int, steps: int) -> list[str]:
    """The command line of a run, other than its directory."""
    robot = task.removeprefix("Safety").removesuffix("Velocity")
    recipe = f"{RECIPES[method]}-{robot}"
    if not (ROOT / "configs" / "tuned" / f"{recipe}.yaml").exists():
        recipe = f"{RECIPES[method]}-mujoco"
    cruise = [*CRUISE, *(CRUISE_PPO if method == "ppo_lagrangian" else [])]
    own = cruise if task == "Cruise" else [f"tuned={recipe}", "algo.cost_limit=25", "execution=compile"]
    own += SLOWER.get((task, method), [])
    steps = STEPS.get(task, steps)
    episodes = 200 if task == "Cruise" else 10
    told = [f"evaluation.every={steps}", f"evaluation.episodes={episodes}", "env_threads=1"]
    return [f"algo={method}", f"env={task}", f"seed={seed}", f"total_steps={steps}", *own, *told]


def measure(task: str, method: str, seeds: list[int], steps: int) -> None:
    """Train with those of the seeds that are not kept, consecutive ones at once, and keep what came of each."""

    def path_of(seed: int) -> Path:
        return KEPT / f"{task}-{method}-s{seed}.json"

    def is_there(seed: int) -> bool:
        path = path_of(seed)
        return path.exists() and json.loads(path.read_text())["settings"] == settings(task, method, seed, steps)

    for part in stretches([seed for seed in seeds if not is_there(seed)]):
        at_once = [f"seeds={len(part)}"] if len(part) > 1 else []
        with tempfile.TemporaryDirectory() as folder:
            given = [*settings(task, method, part[0], steps), *at_once, f"hydra.run.dir={folder}/run"]
            command = [sys.executable, "-m", "pgsuite", "train", *given]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{task} {method} failed: {(done.stderr.strip().splitlines() or [''])[-1]}", file=sys.stderr)
                return
            for seed in part:
                run = Path(folder) / "run" / (f"s{seed}" if at_once else "")
                result = {"settings": settings(task, method, seed, steps)} | outcome(run)
                keep(source() | result, path_of(seed))
                print(f"{task} {method} seed {seed}: {result['evaluation']}", flush=True)


def outcome(run: Path) -> dict[str, Any]:
    """What is kept of a run directory."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    summary = json.loads((run / "summary.json").read_text())
    names = {"return": "episode/return", "cost": "episode/cost", "multiplier": "algorithm/multiplier"}
    every = max(1, len(rows) // 60)
    curve = [
        {"steps": int(row["steps"])} | {short: round(float(row[name]), 4) for short, name in names.items() if row[name]}
        for row in rows[::every]
    ]
    last = [float(row[names["cost"]]) for row in rows[-len(rows) // 5 :] if row[names["cost"]]]
    evaluation = {
        name: summary["evaluation"][name] for name in ("stochastic_return", "stochastic_cost", "return", "cost")
    }
    result = {"evaluation": evaluation, "training_cost_last_fifth": statistics.fmean(last)}
    return result | {"seconds": summary["seconds"], "curve": curve}


def rounded(values: list[float]) -> str:
    """Mean and standard deviation, in as many digits as the mean asks for."""
    mean = abs(statistics.fmean(values))
    return spread(values, 0 if mean >= 100 else 1 if mean >= 20 else 2)


def table() -> str:
    """Every kept result, by task and method."""
    lines = [
        "| task | method | steps | seeds | limit | return | cost | training cost, last fifth | known |",
        "|---" * 9 + "|",
    ]
    machine, commits = "", set[str]()
    kept = [(KEPT, method, method) for method in METHODS] + [(KEPT / "without-margin", "cpo", "cpo, no margin")]
    for task in TASKS:
        for folder, method, called in kept:
            paths = sorted(folder.glob(f"{task}-{method}-s*.json"))
            runs: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
            if not runs:
                continue
            given = dict(x.split("=", 1) for x in runs[0]["settings"])
            limit = float(given["algo.cost_limit"])
            published = PUBLISHED.get(task, {}).get(method)
            best = f"best {Cruise().best(limit):.2f}" if task == "Cruise" else ""
            known = best if published is None else f"OmniSafe, 1e7 steps: {published[0]}, cost {published[1]}"
            cells = [task, called, f"{int(given['total_steps']):,}", str(len(runs)), f"{limit:g}"]
            cells += [rounded([x["evaluation"][f"stochastic_{y}"] for x in runs]) for y in ("return", "cost")]
            cells += [rounded([x["training_cost_last_fifth"] for x in runs]), known]
            lines.append(f"| {' | '.join(cells)} |")
            commits |= {x["commit"] for x in runs}
            machine = f"{runs[0]['machine']}; torch {runs[0]['versions']['torch']}"
    about = f"{machine}; commits {', '.join(sorted(commits))}"
    return f"Means and standard deviations over seeds, of sampled actions; {about}.\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    if not options.docs:
        runs = [(task, method) for task in options.tasks for method in options.methods]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda run: measure(run[0], run[1], options.seeds, options.steps), runs))
    write_table("docs/explanation/constrained.md", "constrained.py", table())


if __name__ == "__main__":
    main()
