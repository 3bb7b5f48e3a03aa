"""How much of the physics' own speed is left when PPO trains on it.

    python benchmarks/throughput.py [--docs]

In one process, in turn: the batch stepper alone with random actions, and whole iterations of PPO (64 environments x 32
steps, 5 epochs x 4 minibatches, two networks of 64-64 tanh) on HalfCheetah, as written and with the loss compiled.
Prints steps/s of each and the ratios round by round, then medians; writes benchmarks/results/throughput.json.
``--docs`` measures nothing, and puts what is in that file into docs/reference/speed.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from record import RESULTS, keep, source, write_table

from pgsuite import seeding
from pgsuite.algorithms import PPO
from pgsuite.envs import VectorEnv, make
from pgsuite.execution.modes import Execution, execute
from pgsuite.nn.normalize import RewardScale, Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.rollout import StepCollector

RESULT = RESULTS / "throughput.json"
WAYS: tuple[Execution, ...] = ("eager", "compile")
ENVS, HORIZON, EPOCHS, MINIBATCHES = 64, 32, 5, 4


def stepper(env: Any, seconds: float) -> float:
    """Environment steps/s of the physics alone, five substeps each, with fresh random actions at every step."""
    physics = env.task.physics
    steps, began = 0, perf_counter()
    while (now := perf_counter()) - began < seconds:
        physics.ctrl.uniform_(-1, 1)
        physics.step(5)
        steps += env.num_envs
    return steps / (now - began)


def ppo(
    env: VectorEnv, execution: Execution, horizon: int = HORIZON, hidden: tuple[int, ...] = (64, 64)
) -> tuple[PPO, StepCollector]:
    generator = seeding.generator(0, "networks")
    norm = Standardize(env.observation_space)
    algorithm = PPO(
        policy=Policy(norm, env.action_space, hidden=hidden, generator=generator),
        critic=Critic(norm, hidden=hidden, generator=generator),
        reward_scale=RewardScale(env.num_envs),
        generator=generator,
        epochs=EPOCHS,
        minibatches=MINIBATCHES,
    )
    collector = StepCollector(env, horizon)
    execute(algorithm, collector, execution)
    return algorithm, collector


def training(algorithm: PPO, collector: StepCollector, seconds: float) -> float:
    """Steps/s of whole iterations: acting, physics, credit and learning."""
    steps, began = 0, perf_counter()
    while (now := perf_counter()) - began < seconds:
        algorithm.iterate(collector)
        steps += ENVS * HORIZON
    return steps / (now - began)


def measure(count: int, seconds: float, torch_threads: int) -> dict[str, Any]:
    """Rates in steps/s of ``count`` rounds, and their medians."""
    torch.set_num_threads(torch_threads)
    alone = make("HalfCheetah", ENVS, seed=1)
    alone.reset()
    stepper(alone, 0.5)
    learners = {way: ppo(make("HalfCheetah", ENVS, seed=2), way) for way in WAYS}
    for learner in learners.values():
        training(*learner, 1.0)
    rounds: list[dict[str, float]] = []
    for i in range(count):
        row = {"physics": stepper(alone, seconds)}
        row |= {way: training(*learner, seconds) for way, learner in learners.items()}
        rounds.append(row | {f"{way} ratio": row[way] / row["physics"] for way in WAYS})
        print(f"round {i}: {line(rounds[-1])}")
    median = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    print(f"median:  {line(median)}")
    threads = {"torch": torch_threads, "physics": alone.description.split("|")[1].strip()}
    return {"threads": threads, "median": median, "rounds": rounds}


def line(row: dict[str, float]) -> str:
    """Rates and ratios in words."""
    words = [f"PPO {way} {row[way]:,.0f} steps/s, ratio {row[f'{way} ratio']:.3f}" for way in WAYS]
    return " | ".join([f"physics alone {row['physics']:,.0f} steps/s", *words])


def table(result: dict[str, Any]) -> str:
    """The medians and spreads as a table."""
    rows = ["| HalfCheetah, 64 environments | steps/s | share of the physics alone |", "|---|---|---|"]
    rows.append(f"| batch stepper alone, random actions | {result['median']['physics']:,.0f} | |")
    for way, words in zip(WAYS, ("PPO, as written", "PPO, `execution=compile`"), strict=True):
        ratios = [row[f"{way} ratio"] for row in result["rounds"]]
        share = f"{result['median'][f'{way} ratio']:.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
        rows.append(f"| {words} | {result['median'][way]:,.0f} | {share} |")
    caption = f"Medians of {len(result['rounds'])} interleaved rounds; {result['machine']}; commit {result['commit']}."
    return "\n".join([*rows, "", caption])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of each measurement; short, so that a ratio compares neighbours"
    )
    parser.add_argument("--torch-threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--docs", action="store_true", help="put the kept result into docs/reference/speed.md")
    args = parser.parse_args()
    if args.docs:
        write_table("docs/reference/speed.md", "throughput.py --docs", table(json.loads(RESULT.read_text())))
        return
    result = source() | measure(args.rounds, args.seconds, args.torch_threads)
    keep(result, args.out)


if __name__ == "__main__":
    main()
