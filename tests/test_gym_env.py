"""gymnasium's environments through the adapter are what a plain loop over each of them is."""

import itertools
import math
import os
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from torch import Tensor
from toys import build, mostly_long

from pgsuite.algorithms import PPO
from pgsuite.algorithms.estimators import GAE
from pgsuite.envs import BrokenEnvError, Gym, GymEnv, make
from pgsuite.envs.gym_env import Maker
from pgsuite.rollout import EpisodeCollector, EpisodeTracker, StepCollector
from pgsuite.types import HiddenState

LIMIT, ENVS, STEPS = 13, 3, 60
CARTPOLE = Gym(id="CartPole-v1", max_episode_steps=LIMIT)


def act(obs: list[float]) -> int:
    """As good as random, leaning right: some episodes fall and some outlive the clock."""
    return int(math.sin(1e4 * sum(obs)) > -0.4)


def adapter(kind: str) -> GymEnv:
    makers = [Maker(CARTPOLE, i) for i in range(ENVS)]
    if kind == "workers":
        env = make(Gym(id="CartPole-v1", max_episode_steps=LIMIT, workers=2), ENVS, dtype=torch.float64)
        assert isinstance(env, GymEnv)
        return env
    vec = SyncVectorEnv(makers, autoreset_mode=AutoresetMode(kind))
    return GymEnv(vec, name="CartPole", max_episode_steps=LIMIT, device=torch.device("cpu"), dtype=torch.float64)


def lives(env: GymEnv) -> list[list[tuple[Any, ...]]]:
    """The real transitions of each environment, in order."""
    found: list[list[tuple[Any, ...]]] = [[] for _ in range(ENVS)]
    obs = env.reset()
    for _ in range(STEPS):
        action = torch.tensor([act(x.tolist()) for x in obs])
        step = env.step(action)
        for i in range(ENVS):
            if step.mask is None or step.mask[i]:
                cells = (x[i].tolist() for x in (obs, action, step.reward, step.next_obs, step.terminated))
                found[i].append((*cells, bool(step.truncated[i])))
        obs = step.obs
    return found


def plain(seed: int) -> list[tuple[Any, ...]]:
    env, found = gymnasium.make("CartPole-v1", max_episode_steps=LIMIT), []
    obs, _ = env.reset(seed=seed)
    for _ in range(STEPS):
        action = act(obs.tolist())
        next_obs, reward, terminated, truncated, _ = env.step(action)
        found.append((obs.tolist(), action, reward, next_obs.tolist(), terminated, truncated and not terminated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    return found


KINDS = ["SameStep", "NextStep", "Disabled", "workers"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_restart_gives_the_transitions_of_a_plain_loop(kind: str) -> None:
    env = adapter(kind)
    seed = env.seed
    assert seed is not None
    for i, found in enumerate(lives(env)):
        expected = plain(seed + i)
        assert found == expected[: len(found)]
        assert len(found) == STEPS - (kind == "NextStep") * sum(x[4] or x[5] for x in found[:-1])
        assert any(x[4] for x in found) and any(x[5] for x in found)


class Fixed:
    """A policy that does what ``act`` says."""

    sequential = False

    def initial_state(self, num_envs: int) -> HiddenState:
        return {}

    def act(self, obs: Tensor, hidden_state: HiddenState, start: Tensor, generator: Any = None) -> Any:
        from pgsuite.nn.policy import PolicyOutput

        return PolicyOutput(torch.tensor([act(x.tolist()) for x in obs]), torch.zeros(len(obs)), hidden_state)


def test_steps_spent_on_restarting_teach_nothing() -> None:
    """Advantages of the real cells, and episode returns, are those of an environment that restarts within the step."""
    found = []
    for kind in ("SameStep", "NextStep"):
        env: Any = adapter(kind)
        policy: Any = Fixed()
        rollout = StepCollector(env, STEPS).collect(policy)
        value, next_value = (x.sum(-1).sin() for x in (rollout.obs, rollout.next_obs))
        advantage, _ = GAE(lam=0.9)(rollout, value, next_value, torch.ones_like(value), gamma=0.97)
        returns, lengths = EpisodeTracker(ENVS, env.device).finished_episodes(rollout)
        cells = [advantage[:, i][rollout.mask[:, i]] for i in range(ENVS)]
        starts = [rollout.start[:, i][rollout.mask[:, i]] for i in range(ENVS)]
        found.append((cells, starts, sorted(returns.tolist()), sorted(lengths.tolist()), rollout))
    (same, same_starts, *_), (following, starts, returns, lengths, rollout) = found
    assert not rollout.mask.all() and returns == lengths and max(lengths) == LIMIT
    for i in range(ENVS):
        ends = rollout.done[:, i].nonzero()[-1].item() + 1  # what follows is cut off elsewhere
        real = int(rollout.mask[:ends, i].sum())
        assert real > 20
        assert torch.equal(starts[i][:real], same_starts[i][:real])
        assert torch.allclose(following[i][:real], same[i][:real], atol=1e-12)


@pytest.mark.parametrize("kind", ["SameStep", "NextStep"])
def test_whole_episodes_are_whole(kind: str) -> None:
    env, policy = adapter(kind), Fixed()
    rollout = EpisodeCollector(env, LIMIT + 2).collect(policy)  # pyright: ignore[reportArgumentType]
    assert (rollout.done & rollout.mask).sum(0).tolist() == [1] * ENVS
    for i in range(ENVS):
        length = int(rollout.mask[:, i].sum())
        assert rollout.mask[:length, i].all() and rollout.done[length - 1, i]


class Faulty(gymnasium.Env[Any, Any]):
    """Fails in the way and at the step that it is told to; its actions start at 5."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(3, start=5)

    def __init__(self, fault: str = "none", at: int = 4, leader: bool = False) -> None:
        self.fault, self.at, self.t, self.seen = fault, at, 0, []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.t += 1
        broken = self.t >= self.at
        if broken and self.fault == "raise":
            raise KeyError("no such joint")
        if broken and self.fault == "die":
            os._exit(3)
        obs = np.full(1, math.nan if broken and self.fault == "observation" else 0.5, np.float32)
        return obs, math.inf if broken and self.fault == "reward" else 1.0, False, self.t % 50 == 0, {}


gymnasium.register("Faulty-v0", Faulty)  # pyright: ignore[reportArgumentType]


def run(env: Any, steps: int = 6) -> None:
    env.reset()
    for _ in range(steps):
        env.step(torch.tensor([0, 2]))


@pytest.mark.parametrize(
    ("fault", "workers", "message"),
    [
        ("raise", 0, r"Faulty-v0 \(environment 0\) at its step 4 raised KeyError: 'no such joint'"),
        ("raise", 2, r"Faulty-v0 \(environment 0\) at its step 4 raised KeyError: 'no such joint'"),
        ("observation", 0, r"\(environment 0\) at its step 4 gave an observation that is not finite: \[nan\]"),
        ("reward", 0, r"\(environment 0\) at its step 4 gave the reward inf"),
    ],
)
def test_a_broken_environment_is_named(fault: str, workers: int, message: str) -> None:
    world = Gym(id="Faulty-v0", import_="test_gym_env", workers=workers, options={"fault": fault})
    with pytest.raises(BrokenEnvError, match=message):
        run(make(world, 2))


def test_a_worker_that_dies_is_named() -> None:
    world = Gym(id="Faulty-v0", import_="test_gym_env", workers=2, options={"fault": "die"})
    with pytest.raises(BrokenEnvError, match=r"the worker of environments 0 to 0 died \(exit code 3\)"):
        run(make(world, 2))


def test_discrete_actions_start_where_the_space_says() -> None:
    run(make(Gym(id="Faulty-v0", import_="test_gym_env"), 2))  # asserts within


def test_a_missing_final_observation_is_said() -> None:
    class Forgetful(SyncVectorEnv):
        def step(self, actions: Any) -> Any:
            *step, _ = super().step(actions)
            return *step, {}

    makers = [Maker(CARTPOLE, i) for i in range(ENVS)]
    vec = Forgetful(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    env = GymEnv(vec, name="Forgetful", max_episode_steps=LIMIT, device=torch.device("cpu"))
    obs = env.reset()
    with pytest.warns(UserWarning, match="Forgetful restarts within a step and gives no final_obs"):
        for _ in range(LIMIT):
            step, before = env.step(torch.tensor([act(x.tolist()) for x in obs])), obs
            obs = step.obs
            for i in step.done.nonzero().flatten().tolist():
                assert torch.equal(step.next_obs[i], before[i]) and not torch.equal(step.next_obs[i], obs[i])


def test_what_gymnasium_does_not_have_is_said() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"id": "CartPol-v1"}, "no environment 'CartPol-v1'; did you mean CartPole-v1"),
        ({"id": "CartPole-v1", "options": {"wings": 2}}, "gymnasium cannot make CartPole-v1: .*wings"),
        ({"id": "CartPole-v1", "import_": "no_such_package"}, "env.import=no_such_package cannot be imported"),
        ({"id": "Pendulum-v1", "native": True}, "gymnasium cannot make Pendulum-v1"),
        ({}, "env.id must name an environment"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            make(Gym(**arguments), 2)


@pytest.mark.parametrize("way", [{}, {"native": True}, {"workers": 1}], ids=str)
def test_the_registered_time_limit_is_taken(way: dict[str, Any]) -> None:
    env = make(Gym(id="CartPole-v1", **way), 2)
    assert env.max_episode_steps == 500
    EpisodeCollector(env, 500)  # which refuses environments without a time limit


def test_an_environment_without_a_time_limit_is_no_place_for_whole_episodes() -> None:
    env = make(Gym(id="Faulty-v0", import_="test_gym_env"), 2)
    with pytest.raises(ValueError, match=r"Faulty-v0 has none: give env\.max_episode_steps"):
        EpisodeCollector(env, 100)


@pytest.mark.parametrize("way", mostly_long([{}, {"native": True}, {"workers": 2}], {}), ids=str)
def test_ppo_learns_through_the_adapter(way: dict[str, Any]) -> None:
    """To balance: a random policy lasts 22 steps on average, this one 100 after 8,000."""
    env = make(Gym(id="CartPole-v1", **way), 8, seed=1)
    algorithm = build(PPO, env, lr=5e-3, epochs=4, standardize=False)
    rollouts = StepCollector(env, 64)
    tracker, returns = EpisodeTracker(8, env.device), [0.0]
    for _ in range(16):
        algorithm.iterate(rollouts)
        returns += tracker.finished_episodes(rollouts.buffer.read())[0].tolist()
    assert np.mean(returns[-10:]) > 100 > 60 > np.mean(list(itertools.islice(returns, 20)))


class Mission(gymnasium.Env[Any, Any]):
    """Shows a number, and a text that no network reads."""

    observation_space = spaces.Dict({"at": spaces.Box(-1, 1, (2,)), "mission": spaces.Text(20)})
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return {"at": np.zeros(2, np.float32), "mission": "go"}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return {"at": np.ones(2, np.float32), "mission": "go"}, 1.0, False, False, {}


class Doubled(gymnasium.RewardWrapper[Any, Any]):
    def __init__(self, env: Any, factor: float = 2.0) -> None:
        super().__init__(env)
        self.factor = factor

    def reward(self, reward: Any) -> Any:
        return self.factor * reward


class Weighted(gymnasium.RewardWrapper[Any, Any]):
    """With numbers in an array, as scalarizing wrappers and those of gymnasium that take limits have them."""

    def __init__(self, env: Any, weight: np.ndarray, scale: NDArray[np.float64] | None = None) -> None:
        super().__init__(env)
        assert scale is not None
        self.weight = weight.reshape(2, 1) * scale.shape[0]

    def reward(self, reward: Any) -> Any:
        return float((self.weight * reward).sum())


gymnasium.register("Mission-v0", Mission)  # pyright: ignore[reportArgumentType]
FILTER: Any = {"gymnasium.wrappers.FilterObservation": {"filter_keys": ["at"]}}


def mission(*wrappers: Any, **settings: Any) -> Any:
    return make(Gym(id="Mission-v0", import_="test_gym_env", wrappers=list(wrappers), **settings), 2)


def test_a_refused_space_names_its_entry_and_the_wrapper_that_helps() -> None:
    with pytest.raises(ValueError, match="the entry 'mission' of the observations, Text") as refused:
        mission()
    remedy = "env.wrappers=[{gymnasium.wrappers.FilterObservation: {filter_keys: [at]}}]"
    assert remedy in str(refused.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_wrappers_are_applied_in_order_in_this_process_and_in_workers(workers: int) -> None:
    limit: Any = {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 3}}
    env = mission(FILTER, "test_gym_env.Doubled", {"test_gym_env.Doubled": {"factor": 3.0}}, limit, workers=workers)
    assert env.max_episode_steps == 3 and env.reset().shape == (2, 2)
    for t in range(3):
        step = env.step(torch.zeros(2, dtype=torch.long))
        assert step.reward.tolist() == [6.0, 6.0] and bool(step.truncated.all()) == (t == 2)


def test_an_option_that_is_an_array_is_given_as_a_list() -> None:
    env = mission(FILTER, {"test_gym_env.Weighted": {"weight": [0.5, 1], "scale": [1, 1, 1]}})
    env.reset()
    assert env.step(torch.zeros(2, dtype=torch.long)).reward.tolist() == [4.5, 4.5]


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ("nowhere.Wrapper", "env.wrappers=nowhere.Wrapper cannot be imported"),
        ("test_gym_env.Mission", "env.wrappers=test_gym_env.Mission is no subclass of gymnasium"),
        ({"test_gym_env.Doubled": {"factr": 1}}, "no setting 'factr' in env.wrappers; did you mean factor"),
        ({"test_gym_env.Doubled": {"factor": "x"}}, "env.wrappers.factor must be a number"),
        ({"test_gym_env.Doubled": 3}, r"env.wrappers must each be a dotted path or \{path"),
        ({"gymnasium.wrappers.FilterObservation": {"filter_keys": ["x"]}}, "FilterObservation: ValueError: All the"),
    ],
    ids=str,
)
def test_wrappers_that_do_not_fit_are_said(wrapper: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mission(wrapper)
    with pytest.raises(ValueError, match="leave one out"):
        Gym(id="CartPole-v1", native=True, wrappers=[wrapper])


MINE = """
import gymnasium
gymnasium.register("Mine-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=7)
"""


@pytest.mark.parametrize("named", [{"id": "Mine-v0", "import_": "found_here"}, {"id": "found_too:Mine-v0"}], ids=str)
def test_a_module_in_the_working_directory_is_found(
    named: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("found_here", "found_too"):
        (tmp_path / f"{name}.py").write_text(MINE)
    for workers in (0, 1):
        assert make(Gym(**named, workers=workers), 1).max_episode_steps == 7
    with pytest.raises(ValueError, match=r"env\.import=not_here cannot be imported"):
        make(Gym(id="X-v0", import_="not_here"), 1)
