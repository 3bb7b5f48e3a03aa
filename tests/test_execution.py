"""Compiled or as written, an algorithm is the same algorithm."""

import shutil

import pytest
import torch
from toys import PointMass, build, collector

from pgsuite.algorithms import A2C, PPO, TRPO
from pgsuite.functional import trust_region as tr
from pgsuite.runtime.execution import execute

CPU = torch.device("cpu")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_learning_is_eager_learning() -> None:
    runs = []
    for how in ("eager", "compile"):
        env = PointMass(8)
        algorithm = build(PPO, env, epochs=2, entropy_coef=0.01)
        execute(algorithm, how, CPU)
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
        execute(build(TRPO, env), "compile", CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no no-such-compiler: install it"):
        execute(build(A2C, env), "compile", CPU)
