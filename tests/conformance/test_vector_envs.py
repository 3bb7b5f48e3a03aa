"""Every environment of the suite, behind every back end and adapter, keeps one contract; and breaking it is noticed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from toys import PointMass, mostly_long

from pgsuite.envs import EnvPool, Gym, GymEnv, TorchNative, VectorEnv, make, tasks
from pgsuite.envs.gym_env import Maker
from pgsuite.testing import check_task, check_vector_env

TASKS = sorted(set(tasks.__all__) - {"Task"})


@pytest.mark.parametrize("name", mostly_long(TASKS, *TASKS[::2]))
def test_tasks(name: str) -> None:
    check_task(partial(getattr(tasks, name), max_episode_steps=40), num_envs=3, steps=120)


def gym(mode: AutoresetMode, seed: int) -> GymEnv:
    world = Gym(id="Acrobot-v1", max_episode_steps=40)
    vec = SyncVectorEnv([Maker(world, i) for i in range(3)], autoreset_mode=mode)
    return GymEnv(vec, name="Acrobot", max_episode_steps=40, device=torch.device("cpu"), seed=seed)


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.value)
def test_gymnasium_in_every_autoreset_mode(mode: AutoresetMode) -> None:
    check_vector_env(lambda seed: gym(mode, seed))


@pytest.mark.parametrize(
    "world",
    [
        pytest.param(Gym(id="Pendulum-v1", max_episode_steps=30, workers=1), marks=pytest.mark.long),
        Gym(id="CartPole-v1", max_episode_steps=30, native=True),
        Gym(id="FrozenLake-v1"),
        Gym(id="Blackjack-v1", max_episode_steps=5),
        Gym(id="MountainCarContinuous-v0", max_episode_steps=30),
    ],
    ids=lambda world: world.id,
)
def test_gymnasium(world: Gym) -> None:
    check_vector_env(lambda seed: make(world, 3, seed=seed))


@pytest.mark.parametrize(
    "world",
    [
        EnvPool(id="CartPole-v1", max_episode_steps=30),
        EnvPool(id="Pendulum-v1", max_episode_steps=30, threads=1),
        EnvPool(id="HalfCheetah-v5", max_episode_steps=30),
        EnvPool(id="FrozenLake-v1"),
        EnvPool(id="Blackjack-v1"),
        EnvPool(id="Taxi-v3"),
        EnvPool(id="parking-v0", max_episode_steps=30),
    ],
    ids=lambda world: world.id,
)
def test_envpool(world: EnvPool) -> None:
    pytest.importorskip("envpool")
    check_vector_env(lambda seed: make(world, 3, seed=seed))


@pytest.mark.filterwarnings("ignore:.*gives no final_obs")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Points", {}),
        ("Points", {"final": False}),
        ("IsaacPoints", {}),
        ("IsaacPoints", {"critic": False}),
        ("ManiSkillPoints", {}),
        ("SavedPoints", {}),
    ],
)
def test_torch_native(kind: str, options: dict[str, Any]) -> None:
    world = TorchNative(entry=f"torch_worlds:{kind}", options=options)
    check_vector_env(lambda seed: make(world, 4, seed=seed))


@pytest.mark.parametrize("mode", ["SameStep", pytest.param("NextStep", marks=pytest.mark.long)])
def test_atari(mode: str) -> None:
    pytest.importorskip("ale_py")
    options = {"autoreset_mode": mode, "img_height": 42, "img_width": 42, "noop_max": 5}
    world = Gym(id="ALE/Breakout-v5", import_="ale_py", native=True, options=options)
    check_vector_env(lambda seed: make(world, 2, seed=seed), steps=150)


class Aliased(PointMass):
    def step(self, action: Any) -> Any:
        step = super().step(action)
        self.memory = getattr(self, "memory", torch.empty_like(step.reward))
        return step._replace(reward=self.memory.copy_(step.reward))


class BothEnds(PointMass):
    def step(self, action: Any) -> Any:
        step = super().step(action)
        return step._replace(terminated=step.terminated | step.truncated)


class NoSuccessor(PointMass):
    def step(self, action: Any) -> Any:
        step = super().step(action)
        return step._replace(next_obs=torch.zeros_like(step.next_obs))


class Endless(PointMass):
    def step(self, action: Any) -> Any:
        step = super().step(action)
        return step._replace(truncated=torch.zeros_like(step.truncated), next_obs=step.obs)


class Column(PointMass):
    def step(self, action: Any) -> Any:
        step = super().step(action)
        return step._replace(reward=step.reward.unsqueeze(-1))


class Unreset(PointMass):
    def reset(self) -> Any:
        clock = self.clock
        obs = super().reset()
        self.clock = clock
        return obs


class Unseeded(PointMass):
    def __init__(self, seed: int) -> None:
        super().__init__(4, seed=0)


BROKEN: list[tuple[Callable[[int], VectorEnv], str]] = [
    (lambda seed: Aliased(4, seed=seed), "reward of step .* was overwritten later"),
    (lambda seed: BothEnds(4, seed=seed), "both terminated and truncated"),
    (lambda seed: NoSuccessor(4, seed=seed), "obs is not next_obs, and no episode ended"),
    (lambda seed: Endless(4, seed=seed), "an episode goes on at its limit of 50"),
    (lambda seed: Column(4, seed=seed), r"reward has shape \(4, 1\)"),
    (lambda seed: Unreset(4, seed=seed), "reset does not begin episodes anew"),
    (Unseeded, "the seed changes nothing"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=lambda x: x if isinstance(x, str) else "")
def test_a_broken_contract_is_noticed(broken: Callable[[int], VectorEnv], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_vector_env(broken)


def test_a_kept_one_is_not_complained_about() -> None:
    check_vector_env(lambda seed: PointMass(4, seed=seed))
