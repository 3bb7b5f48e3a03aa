"""Compiled or as written, an algorithm is the same algorithm."""

import shutil
from typing import Any

import pytest
import torch
from toys import PointMass, build, collector

from pgsuite.algorithms import A2C, PPO, TRPO
from pgsuite.envs import make
from pgsuite.functional import trust_region as tr
from pgsuite.runtime.execution import execute
from pgsuite.testing import random_actions


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_learning_is_eager_learning() -> None:
    runs = []
    for how in ("eager", "compile"):
        env = make("Pendulum", 8)
        algorithm = build(PPO, env, epochs=2, entropy_coef=0.01)
        execute(algorithm, env, how)
        rollouts = collector(algorithm, env)
        metrics = [algorithm.iterate(rollouts) for _ in range(3)]
        runs.append((tr.flatten(algorithm.optimizer.params), metrics[-1]))
    (eager, eager_metrics), (compiled, compiled_metrics) = runs
    assert torch.allclose(eager, compiled, atol=1e-5)
    for name, value in eager_metrics.items():
        assert torch.allclose(value, compiled_metrics[name], atol=1e-4), name


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    env = PointMass(8)
    with pytest.raises(ValueError, match="TRPO has none"):
        execute(build(TRPO, env), env, "compile")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no no-such-compiler: install it"):
        execute(build(A2C, env), env, "compile")


@pytest.mark.parametrize("name", ["CartPole", "Pendulum", "Acrobot", "MountainCar", "MountainCarContinuous"])
def test_classic_tasks_are_one_graph_whatever_their_data(name: str) -> None:
    envs: list[Any] = [make(name, 16, dtype=torch.float64, max_episode_steps=30) for _ in range(2)]
    captured = torch.compile(envs[1].task.advance, backend="eager", fullgraph=True)
    compilations = torch._dynamo.utils.counters["stats"]
    before = compilations["unique_graphs"]
    envs[1].task.advance = captured
    first = [env.reset() for env in envs]
    assert torch.equal(*first)
    for action in random_actions(envs[0], 100):
        steps = [env.step(action) for env in envs]
        assert all(torch.equal(x, y) for x, y in zip(*steps, strict=True) if x is not None)
    assert compilations["unique_graphs"] - before == 1
