"""How much of the physics' own speed is left when PPO trains on it.

    python benchmarks/throughput.py

In one process, in turn: the batch stepper alone with random actions, and whole iterations of PPO (64 environments x 32
steps, 5 epochs x 4 minibatches, two networks of 64-64 tanh) on HalfCheetah.  Prints steps/s of each, the ratio round by
round, and medians; writes benchmarks/results/throughput.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from returns import commit, machine

from pgsuite import seeding
from pgsuite.algorithms import PPO
from pgsuite.envs import TaskEnv, make
from pgsuite.nn.normalize import RewardScale, Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.rollout import StepCollector
from pgsuite.runtime.build import versions

ENVS, HORIZON, EPOCHS, MINIBATCHES = 64, 32, 5, 4


def stepper(env: TaskEnv, seconds: float) -> float:
    """Environment steps/s of the physics alone, five substeps each, with fresh random actions at every step."""
    physics: Any = env.task.physics  # pyright: ignore[reportAttributeAccessIssue]
    steps, began = 0, perf_counter()
    while (now := perf_counter()) - began < seconds:
        physics.ctrl.uniform_(-1, 1)
        physics.step(5)
        steps += env.num_envs
    return steps / (now - began)


def ppo(env: TaskEnv) -> tuple[PPO, StepCollector]:
    generator = seeding.generator(0, "networks")
    norm = Standardize(env.observation_space.shape or ())
    algorithm = PPO(
        policy=Policy(norm, env.action_space, generator=generator),
        critic=Critic(norm, generator=generator),
        reward_scale=RewardScale(ENVS, 0.99),
        generator=generator,
        epochs=EPOCHS,
        minibatches=MINIBATCHES,
    )
    return algorithm, StepCollector(env, HORIZON)


def training(algorithm: PPO, collector: StepCollector, seconds: float) -> float:
    """Steps/s of whole iterations: acting, physics, credit and learning."""
    steps, began = 0, perf_counter()
    while (now := perf_counter()) - began < seconds:
        algorithm.iterate(collector)
        steps += ENVS * HORIZON
    return steps / (now - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--torch-threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "throughput.json")
    args = parser.parse_args()
    torch.set_num_threads(args.torch_threads)
    alone, env = (make("HalfCheetah", ENVS, seed=seed) for seed in (1, 2))
    alone.reset()
    algorithm, collector = ppo(env)
    stepper(alone, 0.5)
    training(algorithm, collector, 1.0)
    rounds: list[dict[str, float]] = []
    for i in range(args.rounds):
        physics, trained = stepper(alone, args.seconds), training(algorithm, collector, args.seconds)
        rounds.append({"physics": physics, "training": trained, "ratio": trained / physics})
        print(f"round {i}: physics {physics:,.0f} steps/s, PPO {trained:,.0f} steps/s, ratio {trained / physics:.3f}")
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    ratios = [r["ratio"] for r in rounds]
    print(
        f"median: physics {medians['physics']:,.0f} steps/s, PPO {medians['training']:,.0f} steps/s, "
        f"ratio {medians['ratio']:.3f} (from {min(ratios):.3f} to {max(ratios):.3f})"
    )
    result = {
        "command": f"python benchmarks/throughput.py {' '.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "threads": {"torch": args.torch_threads, "physics": env.description.split("|")[1].strip()},
        "median": medians,
        "rounds": rounds,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
