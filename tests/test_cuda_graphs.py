"""Iterations that are captured and replayed are the iterations that they were captured from."""

import copy
import warnings
from typing import Any

import pytest
import torch
from tape import Tape
from toys import ALL, build, collector

from pgsuite.algorithms import A2C, PPO, TRPO, Algorithm, Reinforce
from pgsuite.envs import make
from pgsuite.rollout import EpisodeCollector
from pgsuite.runtime.cuda_graphs import Graphs, capture
from pgsuite.runtime.trainer import Trainer

QUIET: dict[type[Algorithm], dict[str, Any]] = {TRPO: {"line_search": "batched"}}


def trainer(cls: type[Algorithm], env: Any, record: type[Graphs] | None, **settings: Any) -> Trainer:
    algorithm = build(cls, env, **QUIET.get(cls, {}) | settings)
    rollouts = collector(algorithm, env, horizon=8)
    if isinstance(rollouts, EpisodeCollector):
        rollouts.poll = rollouts.horizon
    made = Trainer(algorithm, rollouts, 10_000)
    if record is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            capture(made, record)
    return made


@pytest.mark.parametrize("cls", ALL)
def test_what_is_replayed_is_what_was_written(cls: type[Algorithm]) -> None:
    """To the last bit, for every number that the next iteration depends on."""
    runs = [trainer(cls, make("CartPole", 8, max_episode_steps=16), record) for record in (None, Tape)]
    for i in range(7):
        eager, replayed = (run.iterate() for run in runs)
        assert eager.metrics == replayed.metrics and eager.returns == replayed.returns, i
        assert eager.steps == replayed.steps
    check(*(run.position() for run in runs))


def check(x: Any, y: Any) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_masked_early_stop_learns_what_an_early_stop_does(recompute: bool) -> None:
    """And Adam remembers the same, to the last bit."""
    stops = set()
    for target in (1e-4, 3e-3, 1.0):
        states = []
        for how in ("read", "masked"):
            env = make("CartPole", 8, max_episode_steps=16)
            algorithm = build(PPO, env, lr=1e-2, target_kl=target, early_stop=how, recompute_advantage=recompute)
            metrics = algorithm.iterate(collector(algorithm, env, 8))
            states.append(algorithm.state_dict() | {"generator": None, "metrics": metrics["epochs"]})
            assert metrics["kl"].isfinite()
        check(*states)
        stops.add(int(metrics["epochs"]))
    assert min(stops) == 1 and max(stops) == 10 and len(stops) == 3
