"""Many runs at once: aggregate speed beside single runs, beside processes, and beside JAX.

    python benchmarks/many.py cartpole [--seeds 1 4 16 64 256] [--rounds 3] [--jax PYTHON]
    python benchmarks/many.py halfcheetah [--seeds 10] [--rounds 3]
    python benchmarks/many.py cartpole --docs

``cartpole`` is PureJaxRL's workload: PPO with 4 environments x 128 steps, 4 epochs of 4 minibatches, networks of two
layers of 64 tanh each.  ``halfcheetah`` is the recipe ppo-HalfCheetah.  Every measurement is a process of its own with
one thread; the contenders take turns, and a figure is the median over rounds.  Since other work may share the machine,
the speed is environment steps of all runs per second of CPU time; wall time is recorded beside it.

Contenders: ``single``, a run as the command trains it alone, as written and compiled; ``many``, as many runs at once,
as written and compiled; ``processes``, two single runs side by side, each of which has a core; and ``jax``, jax_peer.py
vmapped over as many seeds, by the Python of an environment that has jax and optax.

Results are appended to benchmarks/results/many/<workload>.jsonl, a line for each measurement, and the table of all
lines is printed; ``--docs`` puts it into docs/howto/many-runs.md.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

RESULTS = Path(__file__).parent / "results" / "many"
SETTINGS = {
    "cartpole": (
        "algo=ppo env=CartPole ~tuned num_envs=4 horizon=128 algo.epochs=4 algo.minibatches=4 algo.lr=2.5e-4 "
        "algo.entropy_coef=0.01 algo.value_clip=0.2 standardize_obs=false scale_reward=false"
    ),
    "halfcheetah": "algo=ppo env=HalfCheetah env_threads=1",
}
SECONDS = {"cartpole": 3.0, "halfcheetah": 10.0}  # CPU time of a measurement, after compilation


def measure(workload: str, count: int, execution: str) -> dict[str, Any]:
    """The speed of ``count`` runs at once; with count 0, of a single run as it is trained alone."""
    import torch
    from hydra import compose, initialize_config_dir

    from pgsuite.app import cli, schema
    from pgsuite.app.build import build, parse_run_config, to_dict
    from pgsuite.app.many import build_many, expanded

    torch.set_num_threads(1)
    schema.register()
    initialize_config_dir(str(cli.CONFIGS), version_base="1.3")
    cfg = compose("train", [*SETTINGS[workload].split(), f"execution={execution}", f"seeds={max(1, count)}"])
    began = perf_counter()
    configs = expanded(to_dict(cfg))
    runs = [parse_run_config(config) for config, _ in configs]
    trainer: Any = build_many(runs, [label for _, label in configs]) if count else build(runs[0])
    for _ in range(2):  # which compile
        trainer.iterate()
    ready = perf_counter()
    steps, iterations, cpu, wall = steps_of(trainer), 0, process_time(), perf_counter()
    while process_time() - cpu < SECONDS[workload] or iterations < 2:
        trainer.iterate()
        iterations += 1
    cpu, wall, steps = process_time() - cpu, perf_counter() - wall, steps_of(trainer) - steps
    return {"steps": steps, "iterations": iterations, "cpu": cpu, "wall": wall, "setup": ready - began}


def steps_of(trainer: Any) -> int:
    return trainer.steps


def jax_measure(count: int) -> dict[str, Any]:
    """As ``measure``, in an environment with jax; the whole training is one program."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax
    import jax_peer

    updates = max(4, 400 // count)
    began, key = perf_counter(), jax.random.split(jax.random.key(0), count)
    from functools import partial

    program = jax.jit(jax.vmap(partial(jax_peer.train, envs=4, updates=updates))).lower(key).compile()
    ready, cpu, wall = perf_counter(), process_time(), perf_counter()
    jax.block_until_ready(program(key))
    cpu, wall = process_time() - cpu, perf_counter() - wall
    found = {"steps": count * updates * 4 * jax_peer.HORIZON, "iterations": updates, "jax": jax.__version__}
    return found | {"cpu": cpu, "wall": wall, "setup": ready - began}


def contenders(workload: str, seeds: list[int], jax: str | None) -> list[tuple[str, int, str]]:
    """Kind, number of runs, and mode of execution or Python."""
    found = [("single", 1, mode) for mode in ("eager", "compile")]
    found += [("processes", 2, "eager")]
    found += [("many", count, mode) for count in seeds for mode in ("eager", "compile")]
    return found + ([("jax", count, jax) for count in seeds] if jax and workload == "cartpole" else [])


def worker(workload: str, kind: str, count: int, how: str) -> list[str]:
    python = how if kind == "jax" else sys.executable
    return [python, __file__, workload, "--worker", kind, str(count), how]


def run(workload: str, kind: str, count: int, how: str) -> dict[str, Any]:
    """One measurement.  That of processes adds up what each of them does while the others run."""
    one = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    together = [
        subprocess.Popen(worker(workload, kind, count, how), env=one, stdout=subprocess.PIPE, text=True)
        for _ in range(count if kind == "processes" else 1)
    ]
    found = [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in together]
    total = {key: sum(x[key] for x in found) for key in ("steps", "cpu")}
    return {"kind": kind, "runs": count, "how": "jax" if kind == "jax" else how} | found[0] | total


def table(lines: list[dict[str, Any]]) -> str:
    speeds: dict[tuple[str, int, str], list[float]] = {}
    setups: dict[tuple[str, int, str], list[float]] = {}
    for x in lines:
        key = x["kind"], x["runs"], x["how"]
        speeds.setdefault(key, []).append(x["steps"] / x["cpu"])
        setups.setdefault(key, []).append(x["setup"])
    alone = statistics.median(speeds["single", 1, "eager"])
    names = ("contender", "runs", "steps/s of CPU time", "relative to one eager run", "seconds to start")
    rows = [f"| {' | '.join(names)} |", "|---|---|---|---|---|"]
    for (kind, runs, how), found in speeds.items():
        speed = statistics.median(found)
        start = statistics.median(setups[kind, runs, how])
        kind = kind if kind == how else f"{kind}, {how}"
        rows.append(f"| {kind} | {runs} | {speed:,.0f} | {speed / alone:.1f} | {start:.1f} |")
    loads, commits = [x["load"] for x in lines], ", ".join(sorted({x["commit"] for x in lines}))
    rounds = max(map(len, speeds.values()))
    said = f"Rounds: {rounds}. Load of the machine: {min(loads):.0f} to {max(loads):.0f}. Commit: {commits}."
    rows += ["", said]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jax", help="the Python of an environment with jax and optax")
    parser.add_argument("--docs", action="store_true", help="measure nothing, and write the page")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, count, how = args.worker
        runs = 0 if kind in ("single", "processes") else int(count)
        result = jax_measure(int(count)) if kind == "jax" else measure(args.workload, runs, how)
        print(json.dumps(result), flush=True)
        return
    seeds = args.seeds or {"cartpole": [1, 4, 16, 64, 256], "halfcheetah": [10]}[args.workload]
    from record import source, write_table  # which jax's environment need not have

    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{args.workload}.jsonl"
    if args.docs:
        found = table([json.loads(line) for line in path.read_text().splitlines()])
        write_table("docs/howto/many-runs.md", f"many.py {args.workload} --docs", found)
        return
    about = source()
    about["command"] = about["command"].replace(f"--jax {args.jax}", "--jax PYTHON")
    with path.open("a") as file:
        for turn in range(args.rounds):
            for kind, count, how in contenders(args.workload, seeds, args.jax):
                load = os.getloadavg()[0]
                line = {"round": turn, "load": load} | run(args.workload, kind, count, how)
                file.write(json.dumps(line | about) + "\n")
                file.flush()
                print(json.dumps(line), flush=True)
    print(table([json.loads(line) for line in path.read_text().splitlines()]))


if __name__ == "__main__":
    main()
