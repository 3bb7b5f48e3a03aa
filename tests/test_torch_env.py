"""Environments that live in torch, in the two interfaces that are common, are what their own dynamics say."""

import itertools
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_worlds
from gymnasium import spaces
from torch import Tensor
from torch_worlds import LIMIT, Points, dynamics
from toys import build

from pgsuite.algorithms import PPO
from pgsuite.algorithms.estimators import GAE
from pgsuite.envs import BrokenEnvError, TorchNative, TorchNativeEnv, make
from pgsuite.rollout import EpisodeTracker, StepCollector
from pgsuite.testing import play, random_actions
from pgsuite.testing.reads import NothingRead
from pgsuite.types import Step, map_obs

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ENVS = 4


def world(kind: str, **options: Any) -> TorchNative:
    return TorchNative(entry=f"torch_worlds:{kind}", options=options)


def adapt(env: Any, **settings: Any) -> TorchNativeEnv:
    return TorchNativeEnv(env, name="points", device=CPU, **settings)


WORLDS = {
    "tensors": world("Points"),
    "policy group": world("IsaacPoints", critic=False),
    "groups": world("IsaacPoints"),
    "nested": world("ManiSkillPoints"),
    "saved": world("SavedPoints", critic=False),
}


def placed(kind: str, obs: Any) -> tuple[Tensor, Tensor]:
    """Position and velocity in an observation."""
    if isinstance(obs, dict):
        obs = obs["vector"]
    return (obs[:, 1:3], obs[:, 3:]) if kind == "nested" else (obs[:, :2], obs[:, 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", WORLDS)
def test_successors_are_true_ones_even_where_episodes_end(kind: str, dtype: torch.dtype) -> None:
    env = make(WORLDS[kind], ENVS, dtype=dtype)
    obs, ends, seen = env.reset(), [0, 0], []
    for action in random_actions(env, 100):
        step = env.step(3 * action)  # clipped on its way
        expected = dynamics(*placed(kind, obs), (3 * action).clamp(-1, 1))
        for x, y in zip(placed(kind, step.next_obs), expected, strict=True):
            assert x.dtype is dtype and torch.allclose(x, y.to(dtype), atol=1e-6)
        assert torch.equal(step.terminated, expected[0].abs().amax(-1) > 1.2)
        assert (placed(kind, step.obs)[1][step.done] == 0).all()
        ends = [ends[0] + int(step.terminated.sum()), ends[1] + int(step.truncated.sum())]
        obs = step.obs
        seen.append(step.reward)
    assert min(ends) > 5 and seen[0].dtype is dtype and not torch.equal(seen[0], seen[1])


def test_what_isaac_lab_shows_its_critic_is_kept_apart() -> None:
    env = make(world("IsaacPoints"), ENVS)
    assert isinstance(env.observation_space, spaces.Dict)
    assert {key: part.shape for key, part in env.observation_space.items()} == {"vector": (4,), "critic_obs": (5,)}
    given: list[Step] = [Step(env.reset(), none := torch.zeros(0), none, none, none)]
    given += [env.step(action) for action in random_actions(env, 3 * LIMIT)]
    kept = [map_obs(torch.clone, step.obs) for step in given]
    env.step(random_actions(env, 1)[0])
    for step, copy in zip(given, kept, strict=True):
        assert torch.equal(step.obs["vector"], step.obs["critic_obs"][:, :4])
        assert all(torch.equal(step.obs[key], copy[key]) for key in copy), "written to later"
    clocks = torch.stack([step.next_obs["critic_obs"][:, 4] for step in given[1:]])
    assert clocks.min() == 1 and clocks.max() == LIMIT
    timed_out = torch.stack([step.truncated for step in given[1:]])
    assert timed_out.any() and (clocks[timed_out] == LIMIT).all()


def test_values_after_a_time_limit_are_those_of_the_true_successor() -> None:
    env = make(world("Points"), ENVS, dtype=torch.float64)
    policy = build(PPO, env).policy.double()
    rollout = StepCollector(env, 40).collect(policy)
    value, next_value = (x.sum(-1).sin() for x in (rollout.obs, rollout.next_obs))
    advantage, _ = GAE(lam=0.0)(rollout, value, next_value, torch.ones_like(value), gamma=0.9)
    position, velocity = dynamics(rollout.obs[..., :2], rollout.obs[..., 2:], rollout.action.clamp(-1, 1))
    successor = torch.cat([position, velocity], -1).sum(-1).sin()
    expected = rollout.reward + 0.9 * successor.where(~rollout.terminated, 0.0) - value
    assert rollout.truncated.any() and torch.allclose(advantage, expected, atol=1e-6)


def test_missing_final_observations_are_said_once_and_the_ones_before_stand_in() -> None:
    env = make(world("Points", final=False), ENVS)
    with pytest.warns(
        UserWarning, match="Points restarts within .* gives no final_obs: .* the observation before"
    ) as said:
        steps = play(env, random_actions(env, 40))
    assert len(said) == 1
    for before, step in itertools.pairwise(steps):
        assert torch.equal(step.next_obs, torch.where(step.done.unsqueeze(-1), before.obs, step.obs))


@pytest.mark.parametrize("kind", ["tensors", "nested"])
def test_final_observations_that_are_given_are_not_missed(kind: str) -> None:
    env = make(WORLDS[kind], ENVS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        play(env, random_actions(env, 40))


@pytest.mark.filterwarnings("ignore:.*gives no final_obs")
@pytest.mark.parametrize("final", [True, False])
def test_nothing_is_read_back_once_an_episode_has_ended(final: bool) -> None:
    env = adapt(Points(ENVS, CPU, 0, final=final))
    actions = random_actions(env, 2 * LIMIT)
    play(env, actions[:LIMIT])
    with torch.no_grad(), NothingRead():
        for action in actions[LIMIT:]:
            env.step(action)


class Broken(Points):
    """Breaks in the way and at the step that it is told to."""

    fault = "raise"

    def step(self, action: Tensor) -> Any:
        obs, *rest = super().step(action)
        if self.clock.max() < 3:
            return obs, *rest
        if self.fault == "raise":
            raise KeyError("no such joint")
        return (obs[:, :3], *rest) if self.fault == "shape" else (obs, *rest[:2])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", r"points at its step 3 raised KeyError: 'no such joint'"),
        ("shape", r"points at its step 3 raised RuntimeError: shape '\[4, 4\]' is invalid for input of size 12"),
        ("four", r"points at its step 3 raised ValueError: not enough values to unpack \(expected 5, got 3\)"),
    ],
)
def test_a_broken_environment_is_named(fault: str, message: str) -> None:
    broken = Broken(ENVS, CPU, 0)
    broken.fault = fault
    env = adapt(broken)
    env.reset()
    with pytest.raises(BrokenEnvError, match=message) as caught:
        for action in random_actions(env, 5):
            env.step(action)
    assert isinstance(caught.value.__cause__, KeyError | RuntimeError | ValueError)


def test_what_is_no_vector_environment_is_said() -> None:
    class NextStep(Points):
        metadata = {"autoreset_mode": "NextStep"}  # noqa: RUF012

    class Words(Points):
        def __init__(self) -> None:
            super().__init__(ENVS, CPU, 0)
            self.single_observation_space = spaces.Dict({"order": spaces.Text(8)})

    cases: list[tuple[Any, str]] = [
        (object(), "points is no vector environment: it has no num_envs"),
        (NextStep(ENVS, CPU, 0), "points must restart within the step that ends an episode, not with NextStep"),
        (Words(), r"the entry 'order' of the observations, Text.* has no fixed size"),
    ]
    for env, message in cases:
        with pytest.raises(ValueError, match=message):
            adapt(env)


def test_what_cannot_be_made_is_said() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "env.entry must be a callable in a package, my_package:make_env, got ''"),
        ({"entry": "torch_worlds"}, "my_package:make_env, got 'torch_worlds'"),
        ({"entry": "no_such_package:make"}, "env.entry=no_such_package:make cannot be imported: No module named"),
        ({"entry": ".torch_worlds:Points"}, "cannot be imported: '.torch_worlds' is no full name of a module"),
        ({"entry": "torch_worlds:Point"}, "torch_worlds has nothing named 'Point'; did you mean Points"),
        ({"entry": "math:tau"}, "env.entry=math:tau cannot be called with num_envs, device, seed: "),
        (
            {"entry": "torch_worlds:IsaacPoints", "options": {"wings": 2}},
            "cannot be called with num_envs, device, seed, wings: got an unexpected keyword argument 'wings'",
        ),
        ({"entry": "torch_worlds:Points", "options": {"num_envs": 3}}, "made 3 environments, not 4"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            make(TorchNative(**arguments), ENVS)


def test_the_limit_is_what_is_asked_for_or_what_the_environments_say() -> None:
    assert make(world("ManiSkillPoints"), 2).max_episode_steps == LIMIT
    env = make(TorchNative(entry="torch_worlds:IsaacPoints", max_episode_steps=5), 2)
    assert env.max_episode_steps == 5
    env.reset()
    ends = [env.step(torch.zeros(2, 2)).truncated.tolist() for _ in range(5)]
    assert ends == [[False, False]] * 4 + [[True, True]]


def test_discrete_actions_start_where_the_space_says() -> None:
    class Discrete(Points):
        single_action_space: Any = spaces.Discrete(3, start=5)

        def move(self, action: Tensor) -> None:
            assert action.tolist() == [5, 6, 7, 5]
            super().move(torch.zeros(ENVS, 2))

    env = adapt(Discrete(ENVS, CPU, 0))
    env.reset()
    env.step(torch.tensor([0, 1, 2, 0]))


def test_environments_without_a_state_go_on_with_episodes_that_were_never_seen() -> None:
    env = make(world("Points", critic=False), 2)
    assert not env.is_resumable
    first, state = env.reset(), env.state_dict()
    for _ in range(2):
        env.load_state_dict(state)
        later = env.reset()
        assert not torch.equal(later, first)
        again = make(world("Points", critic=False), 2)
        again.load_state_dict(state)
        assert torch.equal(again.reset(), later)
        first, state = later, env.state_dict()


def test_a_restored_environment_draws_what_the_saved_one_would_have() -> None:
    """Even when it is told to restart, which the first time seeds it."""
    first, second = (make(world("SavedPoints", critic=False), ENVS, seed=seed) for seed in (1, 2))
    play(first, random_actions(first, 5))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.reset(), second.reset())


@pytest.mark.parametrize("kind", ["Points", "IsaacPoints"])
def test_ppo_learns_through_the_adapter(kind: str) -> None:
    """To stay near the origin: resting where an episode begins pays a third of a point a step."""
    env = make(TorchNative(entry=f"torch_worlds:{kind}", max_episode_steps=50), 16)
    algorithm = build(PPO, env, lr=1e-2, epochs=4)
    rollouts = StepCollector(env, 50)
    tracker, returns = EpisodeTracker(16, env.device), []
    for _ in range(25):
        algorithm.iterate(rollouts)
        returns.append(tracker.finished_episodes(rollouts.buffer.read())[0].mean().item())
    assert returns[-1] > 35 > 20 > returns[0]


def test_environments_from_elsewhere_train_through_the_script_with_no_edit_here(tmp_path: Path) -> None:
    shutil.copy(torch_worlds.__file__, tmp_path / "my_worlds.py")
    script = [sys.executable, str(ROOT / "scripts" / "train.py"), "env=torch", "env.entry=my_worlds:Points"]
    own = ["env.max_episode_steps=9", "+env.options.critic=false", "num_envs=4", "horizon=16", "total_steps=500"]
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    done = subprocess.run([*script, *own], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "env my_worlds:Points | torch-native, Points | 4 environments" in done.stdout
    (path,) = tmp_path.glob("runs/ppo-torch/*/config.yaml")
    assert "entry: my_worlds:Points" in path.read_text()


@pytest.mark.gpu
def test_no_step_waits_for_the_accelerator() -> None:
    env = make(world("IsaacPoints"), 64, device="cuda")
    actions = random_actions(env, 2 * LIMIT)
    env.reset()
    for action in actions[:LIMIT]:
        env.step(action)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for action in actions[LIMIT:]:
            env.step(action)
    finally:
        torch.cuda.set_sync_debug_mode("default")
