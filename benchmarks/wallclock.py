"""Wall-clock seconds to a return, from the start of the process.

    python benchmarks/wallclock.py run                      # every target, seeds 0 to 4: about 20 minutes on two cores
    python benchmarks/wallclock.py run CartPole --seeds 0 1 2
    python benchmarks/wallclock.py run HalfCheetah-2000 --seeds 100 --set num_envs=32 --out tried
    python benchmarks/wallclock.py table --docs

A run is scripts/train.py in a process of its own, one at a time, with everything that it writes: tables, TensorBoard,
checkpoints.  It ends after the iteration in which the mean return of the last hundred episodes reaches the target; the
clock is started before the process, and so counts what python imports.  ``run`` leaves out what is kept already and
writes one file a run to benchmarks/results/wallclock/.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

from record import RESULTS, keep, source, write_table

KEPT = RESULTS / "wallclock"
EPISODES = 100
# Environment, return, and what is given beside algo=ppo and the environment's recipe.
POLE = ["total_steps=300_000", "num_envs=64", "horizon=32", "policy.hidden=[32,32]", "critic.hidden=[32,32]"]
POLE += ["algo.lr={linear: [1e-2, 0]}", "algo.epochs=2", "algo.minibatches=4"]
SOON = ["total_steps=300_000", "algo.lr={linear: [1e-3, 0]}", "algo.epochs=6"]
FAR = ["total_steps=1_500_000", "execution=compile"]
TARGETS: dict[str, tuple[str, float, list[str]]] = {
    "CartPole": ("CartPole", 475, POLE),
    "HalfCheetah-2000": ("HalfCheetah", 2000, SOON),
    "HalfCheetah-5000": ("HalfCheetah", 5000, FAR),
    "Hopper-2000": ("Hopper", 2000, ["execution=compile"]),
}


def learn(target: float) -> None:
    """scripts/train.py in this process, which ends where the return is reached and says so."""
    from pgsuite.app import cli, train
    from pgsuite.training.trainer import Callback, Report, Trainer

    class Until(Callback):
        def on_start(self, trainer: Trainer) -> None:
            self.returns: deque[float] = deque(maxlen=EPISODES)

        def on_iteration(self, trainer: Trainer, report: Report) -> None:
            self.returns.extend(report.returns)
            if len(self.returns) == EPISODES and statistics.fmean(self.returns) >= target:
                now = time.time()
                found = {"at": now, "steps": trainer.steps, "seconds": trainer.seconds | trainer.collector.seconds}
                print(json.dumps(found), file=sys.stderr, flush=True)
                trainer.stop = signal.SIGINT

    recorders = train.recorders
    train.recorders = lambda *given: [Until(), *recorders(*given)]
    cli.main(train.train, "train")


def measure(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Seconds and steps until the return is reached, or None where all steps are made before it is."""
    env, target, own = TARGETS[name]
    arguments = ["algo=ppo", f"env={env}", f"seed={seed}", *own, *overrides]
    with tempfile.TemporaryDirectory() as folder:
        script = [sys.executable, str(Path(__file__).resolve()), "learn", str(target)]
        began = time.time()
        done = subprocess.run(
            [*script, *arguments, f"hydra.run.dir={folder}/run"], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    found = json.loads(done.stderr.splitlines()[-1]) if done.stderr.strip() else None
    result: dict[str, Any] = {"name": name, "target": target, "seed": seed, "arguments": arguments}
    result |= {"seconds": found and found["at"] - began, "steps": found and found["steps"]}
    return result | {"training": found and found["seconds"]} | source()


def run(names: list[str], seeds: list[int], overrides: list[str], out: Path) -> None:
    for name in names:
        for seed in seeds:
            path = out / f"{name}-s{seed}.json"
            if path.exists():
                print(f"{name}, seed {seed}: kept in {path}")
                continue
            result = measure(name, seed, overrides)
            keep(result, path)
            seconds, steps = result["seconds"], result["steps"]
            print(f"{name}, seed {seed}: {f'{seconds:.2f} s, {steps:,} steps' if steps else 'not reached'}", flush=True)


def table() -> str:
    """Medians and spreads over seeds; a run that did not get there took longer than any that did."""
    lines = ["| | return | seconds, median | | steps, median | reached |", "|---|---|---|---|---|---|"]
    results: list[dict[str, Any]] = []
    for name, (env, target, _) in TARGETS.items():
        found = [json.loads(path.read_text()) for path in sorted(KEPT.glob(f"{name}-s*.json"))]
        if not found:
            continue
        results += found
        seconds = sorted(x["seconds"] or float("inf") for x in found)
        steps = statistics.median(x["steps"] or float("inf") for x in found)
        spread = f"from {seconds[0]:.1f}" + (f" to {seconds[-1]:.1f}" if seconds[-1] < float("inf") else "")
        reached = f"{sum(x['seconds'] is not None for x in found)} of {len(found)}"
        median = f"{statistics.median(seconds):.1f}"
        lines.append(f"| {env} | {target:,.0f} | {median} | {spread} | {steps:,.0f} | {reached} |")
    if not results:
        raise SystemExit("nothing was measured yet")
    first = results[0]
    commits = ", ".join(sorted({str(x["commit"]) for x in results}))
    return "\n".join([*lines, "", f"{first['machine']}; torch {first['versions']['torch']}; commit {commits}.", ""])


def main() -> None:
    if sys.argv[1:2] == ["learn"]:
        target = float(sys.argv[2])
        del sys.argv[1:3]
        learn(target)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("names", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    runner.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    runner.add_argument("--set", nargs="*", default=[], help="further overrides")
    runner.add_argument("--out", type=Path, default=KEPT)
    tabler = commands.add_parser("table")
    tabler.add_argument("--docs", action="store_true", help="put it into docs/reference/speed.md")
    args = parser.parse_args()
    if args.command == "run":
        if unknown := set(args.names) - set(TARGETS):
            parser.error(f"no target {', '.join(unknown)}: one of {', '.join(TARGETS)}")
        run(args.names, args.seeds, args.set, args.out)
    elif args.docs:
        write_table("docs/reference/speed.md", "wallclock.py table --docs", table())
    else:
        print(table())


if __name__ == "__main__":
    main()
