"""Recurrent PPO beside sb3-contrib's RecurrentPPO: CPU seconds of the same work.

    pip install -c constraints.txt -e ".[peers]"
    python benchmarks/memory.py [--only cartpole tmaze tmaze-long] [--rounds 5]
    python benchmarks/memory.py --learn 100_000 --only cartpole --rounds 3 --jobs 2
    python benchmarks/memory.py --docs

Each round trains every contender for four iterations from scratch, in a process of its own with one torch thread, in
one order and then in the other.  Counted are the CPU seconds of whole iterations, without construction.  Writes all
rounds to benchmarks/results/memory/<task>.json; ``--docs`` measures nothing and puts the kept results into
docs/explanation/algorithms.md.  ``--learn`` trains our kinds of memory for so many steps instead, with scaled rewards
and a learning rate that falls to zero, and writes what they learned to benchmarks/results/memory/<task>-learning.json.

All contenders have the same environments, batch, epochs, minibatches of whole sequences, recurrent layers of the same
size for policy and critic, one hidden layer after each, tanh, Adam and one learning rate.  They differ in this:

- sb3-contrib's minibatches are stretches of consecutive cells, cut anywhere; ours are whole environments.
- sb3-contrib evaluates the critic at every step, and steps gymnasium's environments one after the other; ours once per
  rollout, and in one tensor.
- sb3-contrib has LSTM alone.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import process_time
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from record import RESULTS, keep, source, write_table
from torch import Tensor, nn

from pgsuite import algorithms, seeding
from pgsuite.algorithms.estimators import GAE
from pgsuite.envs import make
from pgsuite.envs.tasks import CartPole, Task, TMaze
from pgsuite.nn.normalize import RewardScale, Standardize
from pgsuite.nn.policy import Critic, Policy

KEPT = RESULTS / "memory"
CONTENDERS = ("pgsuite, GRU", "pgsuite, LSTM", "pgsuite, transformer", "sb3-contrib, LSTM")
LEARNERS = ("pgsuite, GRU", "pgsuite, transformer")
ENVS, HORIZON, EPOCHS, MINIBATCHES, SIZE = 8, 128, 10, 4, 64


class Positions(CartPole):
    """CartPole without velocities."""

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        high = self.observation_space.high[::2]
        self.observation_space = spaces.Box(-high, high)

    def observe(self) -> Tensor:
        return self.state[:, ::2].clone()


class OnePositions(gymnasium.ObservationWrapper):
    """gymnasium's CartPole without velocities."""

    def __init__(self) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        high = self.env.observation_space.high[::2]
        self.observation_space = spaces.Box(-high, high)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[::2]


class OneTMaze(gymnasium.Env):
    """One maze of ``TMaze``, in numpy."""

    SIGNS = np.array([[0, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32)
    observation_space, action_space = spaces.Box(0.0, 1.0, (3,)), spaces.Discrete(4)

    def __init__(self, length: int = 20, limit: int = 1000) -> None:
        self.length, self.limit = length, limit

    def look(self) -> np.ndarray:
        if self.position == 0:
            return self.SIGNS[self.side]
        return self.SIGNS[3 if self.position == self.length else 2]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.side, self.position, self.clock = int(self.np_random.integers(2)), 0, 0
        return self.look(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        action, self.clock, reward, over = int(action), self.clock + 1, 0.0, False
        if action in (0, 2):
            over = self.position == self.length
            reward = 4.0 if over and action == 2 * self.side else -0.1
        else:
            moved = self.position + (1 if action == 1 else -1)
            self.position = min(max(moved, 0), self.length)
            reward = -0.1 if moved != self.position else 0.0
        return self.look(), reward, over, not over and self.clock >= self.limit, {}


@dataclass(frozen=True)
class Work:
    """What all contenders of a table do."""

    title: str
    task: Callable[[], Task]
    one: Callable[[], gymnasium.Env]


def maze(limit: int) -> tuple[Callable[[], Task], Callable[[], gymnasium.Env]]:
    return lambda: TMaze(max_episode_steps=limit), lambda: OneTMaze(limit=limit)


# Episodes of the mazes are almost always as long as their limits, whatever is learned: 21 steps are those of a solved
# one, 500 those of one that is explored.
WORKS = {
    "cartpole": Work("CartPole without velocities", Positions, OnePositions),
    "tmaze": Work("T-maze of 20, at most 21 steps", *maze(21)),
    "tmaze-long": Work("T-maze of 20, at most 500 steps", *maze(500)),
}
STEPS = 4 * ENVS * HORIZON
LR, GAMMA, LAM, ENTROPY = 1e-3, 0.99, 0.95, 0.01
Trained = tuple[float, float]  # CPU seconds, and mean return of the last hundred episodes


def pgsuite(work: Work, kind: str, seed: int, steps: int) -> Trained:
    env = make(work.task(), ENVS, seed=seed)
    learning: dict[str, Any] = {"lr": {"linear": [LR, 0]}, "reward_scale": RewardScale(ENVS)}
    generator = seeding.generator(seed, "networks")
    norm = Standardize(env.observation_space)
    shape: dict[str, Any] = {"hidden": (SIZE,), "recurrent": kind, "recurrent_size": SIZE, "generator": generator}
    algorithm = algorithms.PPO(
        policy=Policy(norm, env.action_space, **shape),
        critic=Critic(norm, num_envs=ENVS, **shape),
        generator=seeding.generator(seed, "minibatches"),
        estimator=GAE(lam=LAM),
        gamma=GAMMA,
        epochs=EPOCHS,
        minibatches=MINIBATCHES,
        entropy_coef=ENTROPY,
        **learning if steps > STEPS else {"lr": LR},
    )
    collector = algorithm.collector(env, HORIZON, seed)
    running, finished = torch.zeros(ENVS), deque[float](maxlen=100)
    began = process_time()
    iterations = steps // (ENVS * HORIZON)
    for i in range(iterations):
        algorithm.update_schedules(i / iterations)
        algorithm.iterate(collector)
        rollout = collector.buffer.read()
        for reward, done in zip(rollout.reward, rollout.done, strict=True):
            running += reward
            finished.extend(running[done].tolist())
            running[done] = 0.0
    return process_time() - began, statistics.fmean(finished)


def sb3(work: Work, seed: int, steps: int) -> Trained:
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    env = VecNormalize(DummyVecEnv([lambda: Monitor(work.one())] * ENVS), norm_reward=False)
    look = {"lstm_hidden_size": SIZE, "net_arch": [SIZE], "activation_fn": nn.Tanh, "enable_critic_lstm": True}
    model = RecurrentPPO(
        "MlpLstmPolicy",
        env,
        learning_rate=LR,
        n_steps=HORIZON,
        batch_size=ENVS * HORIZON // MINIBATCHES,
        n_epochs=EPOCHS,
        gamma=GAMMA,
        gae_lambda=LAM,
        ent_coef=ENTROPY,
        policy_kwargs=look,
        seed=seed,
        device="cpu",
    )
    began = process_time()
    model.learn(steps, log_interval=None)
    seconds = process_time() - began
    return seconds, statistics.fmean(episode["r"] for episode in model.ep_info_buffer)


def contend(table: str, name: str, seed: int, steps: int) -> Trained:
    """Train one contender, in this process."""
    torch.set_num_threads(1)
    library, kind = name.split(", ")
    if library == "pgsuite":
        return pgsuite(WORKS[table], kind.lower(), seed, steps)
    return sb3(WORKS[table], seed, steps)


def trained(table: str, name: str, seed: int, steps: int) -> Trained:
    """Train one contender in a process of its own."""
    command = [sys.executable, __file__, "--contend", table, name, str(seed), str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    seconds, mean = json.loads(done.stdout.splitlines()[-1])
    print(f"{table}: seed {seed}: {name}: {seconds:.1f} s, {mean:.2f}", flush=True)
    return seconds, mean


def measure(table: str, rounds: int) -> dict[str, list[Trained]]:
    found: dict[str, list[Trained]] = {name: [] for name in CONTENDERS}
    for i in range(rounds):
        for name in CONTENDERS if i % 2 == 0 else reversed(CONTENDERS):
            found[name].append(trained(table, name, i, STEPS))
    return found


def learn(table: str, rounds: int, steps: int, jobs: int) -> dict[str, list[Trained]]:
    """What our kinds of memory learn, with as many seeds."""
    with ThreadPoolExecutor(jobs) as pool:
        found = {name: [pool.submit(trained, table, name, seed, steps) for seed in range(rounds)] for name in LEARNERS}
        return {name: [each.result() for each in runs] for name, runs in found.items()}


def text(table: str, result: dict[str, Any]) -> str:
    """Medians over rounds; ratios are taken round by round."""
    work, rows = WORKS[table], result["rows"]
    theirs = [seconds for seconds, _ in rows[CONTENDERS[-1]]]
    lines = ["| | steps per CPU second | | beside sb3-contrib |", "|---|---|---|---|"]
    for name, rounds in rows.items():
        seconds = [cpu for cpu, _ in rounds]
        rates = sorted(result["steps"] / cpu for cpu in seconds)
        ratio = statistics.median(x / y for x, y in zip(theirs, seconds, strict=True))
        spread = f"{statistics.median(rates):,.0f} | from {rates[0]:,.0f} to {rates[-1]:,.0f}"
        lines.append(f"| {name} | {spread} | {ratio:.2f} |")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "stable-baselines3", "sb3-contrib"))
    caption = (
        f"{work.title}, {result['steps']:,} steps; medians of {len(theirs)} rounds, seeds 0 to {len(theirs) - 1}; "
    )
    return "\n".join([f"{caption}{result['machine']}; commit {result['commit']}; {versions}.", "", *lines, ""])


def learned(table: str, result: dict[str, Any]) -> str:
    """The mean return of the last hundred episodes of every seed."""
    lines = ["| | return of the last 100 episodes, by seed | steps per CPU second |", "|---|---|---|"]
    for name, runs in result["rows"].items():
        rate = statistics.median(result["steps"] / seconds for seconds, _ in runs)
        lines.append(f"| {name} | {', '.join(f'{mean:,.1f}' for _, mean in runs)} | {rate:,.0f} |")
    caption = f"{WORKS[table].title}, {result['steps']:,} steps; {result['machine']}, shared with other work"
    return "\n".join([f"{caption}; commit {result['commit']}; torch {result['versions']['torch']}.", "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--learn", type=int, metavar="STEPS")
    parser.add_argument("--jobs", type=int, default=1, help="runs of --learn at a time")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--contend", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        table, name, seed, steps = options.contend
        print(json.dumps(contend(table, name, int(seed), int(steps))))
        return
    if options.learn:
        for table in options.only:
            rows = learn(table, options.rounds, options.learn, options.jobs)
            keep(source() | {"steps": options.learn, "rows": rows}, KEPT / f"{table}-learning.json")
    elif not options.docs:
        from importlib.metadata import version

        for table in options.only:
            rows = measure(table, options.rounds)
            result = source() | {"steps": STEPS, "rows": rows}
            result["versions"] |= {name: version(name) for name in ("stable-baselines3", "sb3-contrib")}
            keep(result, KEPT / f"{table}.json")
    kept = {table: KEPT / f"{table}.json" for table in WORKS}
    tables = [text(table, json.loads(path.read_text())) for table, path in kept.items() if path.exists()]
    kept = {table: KEPT / f"{table}-learning.json" for table in WORKS}
    tables += [learned(table, json.loads(path.read_text())) for table, path in kept.items() if path.exists()]
    if options.docs:
        write_table("docs/explanation/algorithms.md", "memory.py", "\n".join(tables))
    print("\n".join(tables))


if __name__ == "__main__":
    main()
