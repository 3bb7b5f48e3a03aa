"""How fast environments step, with everything that a step is: observation, reward, clock and restarts.

    python benchmarks/envs.py                        # every task on the back ends that are here, with several sizes
    python benchmarks/envs.py --device cuda          # the same on a GPU
    python benchmarks/envs.py --docs                 # measures nothing: puts the kept results into the page

Random actions, drawn beforehand.  In one process the rows take turns, round after round and in turned order every other
time, so that what else the machine does falls on all of them.  Beside complete steps of HalfCheetah stand those of the
batch stepper alone, in the same worlds, and envpool's, and the compiled step beside tasks in torch.  Prints medians and
spreads; writes benchmarks/results/envs-<device>.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from record import RESULTS, keep, source, write_table

from pgsuite.envs import Atari, VectorEnv, make, tasks
from pgsuite.envs.tasks.classic import ClassicTask
from pgsuite.testing import random_actions

Step = Callable[[int], Any]  # the t-th step of all environments
TASKS = sorted(set(tasks.__all__) - {"Task"})
ATARI = ("Pong", "Breakout")
CHEETAH = ("HalfCheetah", 256)  # what is compared
AHEAD = 16  # batches of random actions


def complete(env: VectorEnv) -> Step:
    env.reset()
    actions = random_actions(env, AHEAD)
    return lambda t: env.step(actions[t % AHEAD])


def compiled(env: Any) -> Step:
    torch.compiler.reset()
    env.task.advance = torch.compile(env.task.advance, dynamic=False, fullgraph=True)
    return complete(env)


def stepper(env: Any) -> Step:
    """The physics of a task alone, from wherever its worlds stand: on their backs they take another time."""
    actions, task = random_actions(env, AHEAD), env.task

    def step(t: int) -> None:
        task.physics.ctrl.copy_(actions[t % AHEAD])
        task.physics.step(task.frame_skip)

    return step


def pool(name: str, worlds: int) -> Step:
    """envpool's own loop, in numpy."""
    import envpool  # pyright: ignore[reportMissingImports]

    env = envpool.make_gymnasium(name, num_envs=worlds)
    env.reset()
    actions = [np.stack([env.action_space.sample() for _ in range(worlds)]) for _ in range(AHEAD)]
    return lambda t: env.step(actions[t % AHEAD])


def rows(names: list[str], sizes: list[int], device: str) -> dict[tuple[str, str, int], Step]:
    """What is measured, as (environment, how, number of environments)."""
    found: dict[tuple[str, str, int], Step] = {}
    for name in names:
        for size in sizes:
            for backend in getattr(tasks, name).backends:
                if backend == "warp" and (device == "cpu" or importlib.util.find_spec("mujoco_warp") is None):
                    continue
                env = make(name, size, device=device, backend=backend)
                found[name, env.backend, size] = complete(env)
                if (name, size, device) == (*CHEETAH, "cpu"):
                    found[name, "batch stepper alone", size] = stepper(env)
                    if importlib.util.find_spec("envpool"):
                        found[name, "envpool", size] = pool("HalfCheetah-v5", size)
        if issubclass(getattr(tasks, name), ClassicTask):
            for size in {*sizes, 16_384}:
                env = make(name, size, device=device)
                found[name, f"{env.backend}, compiled", size] = compiled(env)
    if device == "cpu" and importlib.util.find_spec("ale_py"):
        for name in ATARI:
            for size in (8, 64):
                found[name, "ale-py", size] = complete(make(Atari(game=name), size))
    return found


def measure(found: dict[tuple[str, str, int], Step], rounds: int, seconds: float, device: str) -> list[dict[str, Any]]:
    """Steps/s of every row in every round."""

    def rate(step: Step, worlds: int, seconds: float) -> float:
        t, began = 0, perf_counter()
        while perf_counter() - began < seconds:
            step(t)
            t += 1
        if device == "cuda":
            torch.cuda.synchronize()
        return t * worlds / (perf_counter() - began)

    for (_, _, worlds), step in found.items():
        rate(step, worlds, 0.1)
    rates: dict[tuple[str, str, int], list[float]] = {key: [] for key in found}
    for i in range(rounds):
        for key in found if i % 2 else reversed(found):
            rate(found[key], key[2], seconds / 5)  # bring it back into the caches
            rates[key].append(rate(found[key], key[2], seconds))
        print(f"round {i + 1} of {rounds}", flush=True)
    keys = ("environment", "how", "worlds")
    return [dict(zip(keys, key, strict=True)) | {"rates": rates[key]} for key in found]


def table(result: dict[str, Any]) -> str:
    lines = ["| environment | how | environments | steps/s | from | to |", "|---|---|---|---|---|---|"]
    for row in sorted(result["rows"], key=lambda row: (row["environment"], row["worlds"], row["how"])):
        middle, low, high = statistics.median(row["rates"]), min(row["rates"]), max(row["rates"])
        numbers = f"{middle:,.0f} | {low:,.0f} | {high:,.0f}"
        lines.append(f"| {row['environment']} | {row['how']} | {row['worlds']:,} | {numbers} |")
    rounds = len(result["rows"][0]["rates"])
    caption = f"Medians and extremes of {rounds} interleaved rounds; {result['machine']}; commit {result['commit']}."
    return "\n".join([*lines, "", *ratios(result), caption])


def ratios(result: dict[str, Any]) -> list[str]:
    """How complete steps of HalfCheetah compare, round by round."""
    rates = {row["how"]: row["rates"] for row in result["rows"] if (row["environment"], row["worlds"]) == CHEETAH}
    lines = []
    for other in ("batch stepper alone", "envpool"):
        if other in rates and "mujoco" in rates:
            each = [ours / theirs for ours, theirs in zip(rates["mujoco"], rates[other], strict=True)]
            spread = f"{statistics.median(each):.2f} (from {min(each):.2f} to {max(each):.2f})"
            lines += [f"Complete steps of HalfCheetah over {other}, 256 environments: {spread}.", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--worlds", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--torch-threads", type=int, default=1)
    parser.add_argument("--docs", action="store_true", help="put the kept results into docs/reference/environments.md")
    args = parser.parse_args()
    if args.docs:
        for path in sorted(RESULTS.glob("envs-*.json")):
            device = path.stem.removeprefix("envs-")
            write_table(
                "docs/reference/environments.md", f"envs.py --docs, {device}", table(json.loads(path.read_text()))
            )
        return
    torch.set_num_threads(args.torch_threads)
    found = rows(args.tasks, args.worlds, args.device)
    result = source() | {"torch threads": args.torch_threads}
    result |= {"rows": measure(found, args.rounds, args.seconds, args.device)}
    print(table(result))
    keep(result, RESULTS / f"envs-{args.device}.json")


if __name__ == "__main__":
    main()
