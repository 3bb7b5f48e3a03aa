"""Compiled or as written, an algorithm is the same algorithm."""

import copy
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from toys import PointMass, build, collector

from pgsuite import parallel
from pgsuite.algorithms import A2C, PPO, TRPO, Algorithm, Reinforce
from pgsuite.envs import make
from pgsuite.functional import trust_region as tr
from pgsuite.runtime.execution import execute
from pgsuite.testing import random_actions

CASES: list[tuple[type[Algorithm], dict[str, Any], str]] = [
    (
        PPO,
        {"epochs": 2, "entropy_coef": 0.01, "clip": {"linear": [0.3, 0.1]}, "lr": {"linear": [1e-2, 0]}},
        "aot_eager",
    ),
    (Reinforce, {"baseline": "critic", "critic_minibatches": 2}, "inductor"),
    (TRPO, {"critic_epochs": 2, "critic_lr": {"linear": [1e-2, 0]}}, "aot_eager"),
    (A2C, {"lr": {"cosine": [1e-2, 1e-3]}, "entropy_coef": {"linear": [0.1, 0]}}, "aot_eager"),
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("method", "settings", "backend"), CASES)
def test_compiled_learning_is_eager_learning(
    method: type[Algorithm], settings: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedules included, whose numbers a graph must not take for constant, nor parameters that were put back; and each
    graph is made once.  One method goes all the way through the compiler, which takes its time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    runs = []
    for how in ("eager", "compile"):
        env = make("Pendulum", 8, max_episode_steps=16)
        algorithm = build(method, env, **settings)
        begun = copy.deepcopy(algorithm.state_dict())
        rollouts, found, graphs = collector(algorithm, env), [], []
        execute(algorithm, rollouts, how)
        for fraction in (0.0, 0.3, 0.6, 0.9, None):
            if fraction is None:
                algorithm.load_state_dict(begun)
            algorithm.progress(fraction or 0.0)
            metrics = algorithm.iterate(rollouts)
            params = tr.flatten([x for part in algorithm.parts.values() for x in part.parameters()])
            found.append((params, metrics))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[0] == graphs[-1]
        runs.append(found[-2:])
    for (eager, eager_metrics), (compiled, compiled_metrics) in zip(*runs, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-4)
        for name, value in eager_metrics.items():
            assert torch.allclose(value, compiled_metrics[name], atol=1e-4), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "look"),
    [("CartPole", {}), ("Pendulum", {"distribution": "beta"}), ("Pendulum", {"recurrent": "gru"})],
    ids=["categorical", "beta", "gru"],
)
def test_compiled_acting_does_what_eager_acting_does(
    name: str, look: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same generator, through restarts; Beta's actions are no function of noise, and are drawn eagerly."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    rollouts = []
    for how in ("eager", "compile"):
        env = make(name, 8, max_episode_steps=7)
        algorithm = build(A2C, env, look=look)
        collecting = collector(algorithm, env)
        execute(algorithm, collecting, how)
        rollouts += [collecting.collect(algorithm.policy)]
    eager, compiled = rollouts
    assert eager.done.any()
    for part in ("obs", "action", "logp", "reward", "next_obs", "done"):
        assert torch.allclose(getattr(eager, part), getattr(compiled, part), atol=1e-5), part


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    env = PointMass(8)
    algorithm = build(A2C, env)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(ValueError, match="for one process"):
        execute(algorithm, collector(algorithm, env), "compile")
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no no-such-compiler: install it"):
        execute(algorithm, collector(algorithm, env), "compile")
    assert execute(algorithm, collector(algorithm, env), "auto") == "eager"
    with pytest.raises(ValueError, match=r"cuda_graph is for a GPU: give device=cuda, or leave it out"):
        execute(algorithm, collector(algorithm, env), "cuda_graph")


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
