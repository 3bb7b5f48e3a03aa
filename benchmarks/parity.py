"""Is each environment the one that it claims to be?  Every task, on every back end that is here, against gymnasium.

    python benchmarks/parity.py                      # prints the table; writes benchmarks/results/parity-<device>.json
    python benchmarks/parity.py --device cuda        # MuJoCo Warp on a GPU; on a CPU it runs too, slowly
    python benchmarks/parity.py --docs               # measures nothing: puts the kept results into the page

On the CPU the worlds run freely beside gymnasium's for 1,000 steps of random actions, restarts included, from equal
starts.  Single precision would part from gymnasium within some dozens of steps, as gymnasium does from itself when a
state is rounded, so Warp makes one step at a time, from gymnasium's own state: 99th percentile and worst.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from record import RESULTS, keep, source, write_table

from pgsuite.envs import make, tasks
from pgsuite.envs.tasks.mujoco import MujocoTask, unwarned
from pgsuite.testing import random_actions

TASKS = sorted(set(tasks.__all__) - {"Task"})
WORLDS, STEPS, LIMIT = 3, 1_000, 60
Errors = tuple[float, float, bool]  # of the observation, of the reward, and whether terminated differs


def twin(name: str) -> Any:
    """gymnasium's own, without its clock, and with actions clipped as every stack of wrappers does."""
    with unwarned():
        env: Any = gymnasium.make(getattr(tasks, name).gymnasium_id).unwrapped
    return gymnasium.wrappers.ClipAction(env) if isinstance(env.action_space, gymnasium.spaces.Box) else env


def put(env: Any, task: Any, i: int) -> None:
    """Bring gymnasium to where a world of ours has just started."""
    env = env.unwrapped
    if isinstance(task, MujocoTask):
        mujoco.mj_resetData(env.model, env.data)
        env.set_state(task.physics.qpos[i].numpy(), task.physics.qvel[i].numpy())
    else:
        env.reset()
        env.state = task.state[i].numpy().copy()


def free(name: str) -> Iterator[Errors]:
    """Side by side on the CPU, in double precision."""
    ours: Any = make(name, WORLDS, dtype=torch.float64, seed=1, max_episode_steps=LIMIT)
    theirs = [twin(name) for _ in range(WORLDS)]
    ours.reset()
    for i, env in enumerate(theirs):
        put(env, ours.task, i)
    for action in random_actions(ours, STEPS):
        step = ours.step(action)
        for i, env in enumerate(theirs):
            native = action[i].numpy() if action.ndim > 1 else int(action[i])
            obs, reward, terminated, _, _ = env.step(native)
            error = float(np.abs(obs - step.next_obs[i].numpy()).max())
            yield error, abs(float(reward) - float(step.reward[i])), terminated != bool(step.terminated[i])
            if step.done[i]:
                put(env, ours.task, i)


def forced(name: str, device: str) -> Iterator[Errors]:
    """One step of Warp at a time, from the state of the back end that equals gymnasium."""
    worlds = WORLDS * STEPS // 100
    exact: Any = make(name, worlds, dtype=torch.float64, seed=1, max_episode_steps=100)
    rough: Any = make(name, worlds, dtype=torch.float64, device=device, backend="warp")
    exact.reset()
    for action in random_actions(exact, 100):
        rough.task.physics.load_state_dict(exact.task.physics.state_dict())
        exact.task.simulate(action.double())
        rough.task.simulate(action.to(device).float())
        reward, terminated = exact.task.advance(action.double())
        found = rough.task.advance(action.to(device).float())
        obs = (exact.task.observe() - rough.task.observe().cpu().double()).abs().amax(-1)
        gap = (reward - found[0].cpu().double()).abs()
        yield from zip(obs.tolist(), gap.tolist(), (terminated != found[1].cpu()).tolist(), strict=True)


def compare(name: str, backend: str, device: str) -> dict[str, Any]:
    obs, reward, terminated = zip(*(forced(name, device) if backend == "warp" else free(name)), strict=True)
    env = make(name, 1, device=device if backend == "warp" else "cpu", backend=backend)
    result: dict[str, Any] = {"environment": name, "backend": env.description.split(" | ")[1]}
    result |= {"claim": env.description.split(" | ")[3].split()[0], "steps": len(obs)}
    for key, errors in (("observation", obs), ("reward", reward)):
        result[key] = {"99%": float(np.quantile(errors, 0.99)), "worst": max(errors)}
    return result | {"terminations that differ": sum(terminated)}


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        "| environment | back end | claim | steps | observation 99% | worst | reward 99% | worst | terminations off |"
    )
    lines = [head, "|" + "---|" * 9]
    for row in rows:
        errors = (f"{row[key][which]:.0e}" for key in ("observation", "reward") for which in ("99%", "worst"))
        cells = (row["environment"], row["backend"], row["claim"], f"{row['steps']:,}", *errors)
        lines.append(f"| {' | '.join(cells)} | {row['terminations that differ']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--docs", action="store_true", help="put the kept results into docs/reference/environments.md")
    args = parser.parse_args()
    if args.docs:
        for path in sorted(RESULTS.glob("parity-*.json")):
            result = json.loads(path.read_text())
            versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if name != "pgsuite")
            caption = f"{result['machine']}; {versions}; commit {result['commit']}."
            script = f"parity.py --docs, {path.stem.removeprefix('parity-')}"
            write_table("docs/reference/environments.md", script, f"{table(result['rows'])}\n\n{caption}")
        return
    torch.set_num_threads(1)
    rows = []
    for name in args.tasks:
        for backend in getattr(tasks, name).backends:
            if backend != "warp" or importlib.util.find_spec("mujoco_warp"):
                rows.append(compare(name, backend, args.device))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    keep(source() | {"rows": rows}, RESULTS / f"parity-{args.device}.json")


if __name__ == "__main__":
    main()
