"""envpool's environments through the adapter keep the contract, and move as gymnasium's do."""

import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from toys import build

from pgsuite.algorithms import PPO
from pgsuite.envs import EnvPool, make
from pgsuite.rollout import EpisodeTracker, StepCollector
from pgsuite.testing import random_actions

ENVS, LIMIT = 3, 10


@pytest.fixture
def envpool() -> Any:
    return pytest.importorskip("envpool")


installed = pytest.mark.usefixtures("envpool")


def test_without_envpool_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ValueError, match=r"env=envpool needs envpool: pip install -e '.\[envpool\]'"):
        make(EnvPool(id="CartPole-v1"), 2)


def test_more_threads_than_a_process_may_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"env\.threads must be a whole number from 0 to 256, got 20000"):
        EnvPool(id="CartPole-v1", threads=20000)


@installed
@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Hopper-v5"])
def test_transitions_are_those_of_gymnasium_to_the_last(name: str) -> None:
    """From each state that an episode begins in; the place along the track, which is not observed, moves nothing."""
    env = make(EnvPool(id=name, max_episode_steps=LIMIT), ENVS, dtype=torch.float64)
    twins: list[Any] = [gymnasium.make(name).unwrapped for _ in range(ENVS)]
    for twin, x in zip(twins, env.reset(), strict=True):
        put(twin, x)
    ends = 0
    for action in random_actions(env, 3 * LIMIT):
        step = env.step(action)
        for i, twin in enumerate(twins):
            theirs, reward, terminated, *_ = twin.step(action[i].double().numpy())
            assert np.allclose(step.next_obs[i], theirs, rtol=0, atol=1e-9)
            assert abs(step.reward[i] - reward) < 1e-6  # envpool's rewards are single precision
            assert step.terminated[i] == terminated
            if step.done[i]:
                put(twin, step.obs[i])
                ends += 1
    assert ends == 3 * ENVS


def put(twin: Any, obs: torch.Tensor) -> None:
    """An environment of gymnasium's to where it would observe this."""
    twin.reset()
    state = np.concatenate([[0.0], obs.numpy()])
    twin.set_state(state[: twin.model.nq], state[twin.model.nq :])


@installed
@pytest.mark.parametrize("name", ["CartPole-v1", "CliffWalking-v0", "LaneKeeping-v0"])
def test_the_limit_holds_whether_or_not_envpool_knows_of_it(name: str) -> None:
    env = make(EnvPool(id=name, max_episode_steps=5), ENVS)
    env.reset()
    steps = [env.step(action) for action in random_actions(env, 15)]
    assert [step.truncated.all().item() for step in steps] == 3 * ([False] * 4 + [True])
    assert not any(step.terminated.any() for step in steps)


@installed
def test_what_envpool_cannot_make_is_said() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"id": "HalfCheeta-v5"}, "envpool has no environment 'HalfCheeta-v5'; did you mean HalfCheetah-v5"),
        ({"id": "CartPole-v1", "options": {"wings": 2}}, "envpool cannot make CartPole-v1: .*wings"),
        ({"id": "CartPole-v1", "options": {"batch_size": 1}}, "multiple values for keyword argument 'batch_size'"),
        ({"id": "Go9x9-v1"}, "Go9x9-v1 is for 2 players, and one policy plays here"),
        ({}, "env.id must name an environment"),
        ({"id": "CartPole-v1", "threads": -1}, "env.threads must be a whole number at least 0, got -1"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            make(EnvPool(**arguments), 2)


@installed
def test_limits_are_envpools_own_where_none_is_given() -> None:
    limits = [make(EnvPool(id=name), 2).max_episode_steps for name in ("CartPole-v1", "Blackjack-v1")]
    assert limits == [500, None]


@installed
def test_ppo_learns_through_the_adapter() -> None:
    """To balance: a random policy lasts 22 steps on average, this one 100 after 8,000."""
    env = make(EnvPool(id="CartPole-v1"), 8, seed=1)
    algorithm = build(PPO, env, lr=2e-3, standardize=False)
    rollouts = StepCollector(env, 64)
    tracker, returns = EpisodeTracker(8, env.device), []
    for _ in range(16):
        algorithm.iterate(rollouts)
        returns += tracker.finished(rollouts.buffer.read())[0].tolist()
    assert np.mean(returns[-10:]) > 100 > 60 > np.mean(returns[:20])
