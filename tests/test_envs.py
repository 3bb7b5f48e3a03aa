"""Every environment is the one it claims to be: step by step against gymnasium, through resets."""

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

from pgsuite.envs import make, tasks
from pgsuite.envs.tasks.mujoco import load_model
from pgsuite.types import leaves

MUJOCO = [
    "HalfCheetah",
    "Hopper",
    "Walker2d",
    "Swimmer",
    "Ant",
    "Humanoid",
    "HumanoidStandup",
    "Reacher",
    "Pusher",
    "InvertedPendulum",
    "InvertedDoublePendulum",
]
CLASSIC = ["CartPole", "Pendulum", "Acrobot", "MountainCar", "MountainCarContinuous"]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in MUJOCO),
    ("HalfCheetah", {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": 0.5, "frame_skip": 3}),
    ("Swimmer", {"exclude_current_positions_from_observation": False, "forward_reward_weight": 2.0}),
    ("Hopper", {"healthy_z_range": (0.9, 2.0), "healthy_reward": 3.0, "healthy_state_range": (-5.0, 5.0)}),
    ("Walker2d", {"terminate_when_unhealthy": False, "healthy_angle_range": (-0.2, 0.2)}),
    ("InvertedPendulum", {"reset_noise_scale": 0.1}),
    ("InvertedDoublePendulum", {"healthy_reward": 3.0, "reset_noise_scale": 0.3}),
    ("Ant", {"main_body": "aux_1", "contact_force_range": (-5.0, 5.0), "contact_cost_weight": 0.1}),
    ("Ant", {"include_cfrc_ext_in_observation": False, "healthy_z_range": (0.4, 0.6), "healthy_reward": 2.0}),
    ("Humanoid", {"contact_cost_weight": 1e-3, "contact_cost_range": (0.0, 2.0), "include_cvel_in_observation": False}),
    ("HumanoidStandup", {"impact_cost_range": (0.5, 1.0), "include_cinert_in_observation": False}),
    ("Reacher", {"reward_dist_weight": 2.0, "reward_control_weight": 0.5}),
    ("Pusher", {"reward_near_weight": 2.0, "reward_dist_weight": 0.5, "frame_skip": 2}),
]
STEPS, ENVS = 300, 3


def reference(name: str, options: dict[str, Any]) -> Any:
    """gymnasium's own, without its clock, and with actions clipped as every wrapper stack does."""
    env = gymnasium.make(f"{name}-v5", **options)
    return gymnasium.wrappers.ClipAction(env.unwrapped)


def put(env: Any, qpos: torch.Tensor, qvel: torch.Tensor) -> np.ndarray:
    mujoco.mj_resetData(env.unwrapped.model, env.unwrapped.data)
    env.unwrapped.set_state(qpos.numpy(), qvel.numpy())
    return env.unwrapped._get_obs()


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda x: x if isinstance(x, str) else str(list(x)))
def test_mujoco_tasks_equal_gymnasium_step_by_step(name: str, options: dict[str, Any]) -> None:
    env = make(name, ENVS, dtype=torch.float64, seed=1, max_episode_steps=60, **options)
    others = [reference(name, options) for _ in range(ENVS)]
    physics, rng = env.task.physics, np.random.default_rng(0)  # pyright: ignore[reportAttributeAccessIssue]
    obs, restarts, ended = env.reset(), 0, 0
    for i, other in enumerate(others):
        assert np.abs(put(other, physics.qpos[i], physics.qvel[i]) - obs[i].numpy()).max() <= 1e-12
    bound = env.action_space.high[0]  # pyright: ignore[reportAttributeAccessIssue]
    steps = 180 if options else STEPS
    for _ in range(steps):
        action = rng.uniform(-1.3 * bound, 1.3 * bound, (ENVS, physics.model.nu)).astype(np.float32)
        step = env.step(torch.from_numpy(action))
        for i, other in enumerate(others):
            next_obs, reward, terminated, _, _ = other.step(action[i])
            assert np.abs(next_obs - step.next_obs[i].numpy()).max() <= 1e-12
            assert abs(reward - float(step.reward[i])) <= 1e-6
            assert terminated == bool(step.terminated[i])
            if step.done[i]:
                restarts, ended = restarts + 1, ended + terminated
                assert np.abs(put(other, physics.qpos[i], physics.qvel[i]) - step.obs[i].numpy()).max() <= 1e-12
            else:
                assert torch.equal(step.obs[i], step.next_obs[i])
    assert restarts >= ENVS * (steps // 60)
    if name in ("Hopper", "InvertedPendulum", "InvertedDoublePendulum", "Humanoid"):
        assert ended > 0


def test_the_models_are_those_that_gymnasium_loads() -> None:
    """MuJoCo 4 deprecates the compiler option that gives HalfCheetah its mass of 14 kg."""
    assert load_model("half_cheetah.xml").body_mass.sum() == pytest.approx(14)
    for name in MUJOCO:
        task = getattr(tasks, name)
        ours, theirs = load_model(task.xml_file), gymnasium.make(task.gymnasium_id).unwrapped.model  # pyright: ignore
        assert np.array_equal(ours.body_mass, theirs.body_mass)
        assert np.array_equal(ours.geom_friction, theirs.geom_friction)


def test_loading_a_model_leaves_no_log_behind(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make("HalfCheetah", 2)
    assert not list(tmp_path.iterdir()) and not capfd.readouterr().err


@pytest.mark.parametrize("name", MUJOCO)
def test_spaces_limits_and_options_are_gymnasiums(name: str) -> None:
    ours, theirs = make(name, 1), gymnasium.make(f"{name}-v5")
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert theirs.spec is not None and ours.max_episode_steps == theirs.spec.max_episode_steps
    assert ours.task.dt == pytest.approx(theirs.unwrapped.dt)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", CLASSIC)
def test_classic_spaces_and_limits_are_gymnasiums(name: str) -> None:
    ours, theirs = make(name, 1), gymnasium.make(getattr(tasks, name).gymnasium_id)
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert theirs.spec is not None and ours.max_episode_steps == theirs.spec.max_episode_steps


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("CartPole", {}, 1e-14),
        ("CartPole", {"sutton_barto_reward": True}, 1e-14),
        ("Pendulum", {}, 1e-12),
        ("Pendulum", {"g": 9.81}, 1e-12),
        ("Acrobot", {}, 1e-12),
        ("MountainCar", {}, 1e-12),
        ("MountainCar", {"goal_velocity": 0.02}, 1e-12),
        ("MountainCarContinuous", {}, 1e-7),  # gymnasium's own state is float32
        ("MountainCarContinuous", {"goal_velocity": 0.02}, 1e-7),
    ],
)
def test_classic_tasks_equal_gymnasium_in_float64(name: str, options: dict[str, Any], tolerance: float) -> None:
    """One step at a time from equal states, through restarts; actions that often repeat, so that cars arrive."""
    env: Any = make(name, 4, dtype=torch.float64, seed=3, **options)
    others: list[Any] = [gymnasium.make(env.task.gymnasium_id, **options).unwrapped for _ in range(4)]
    for other in others:
        other.reset()
    env.reset()
    env.action_space.seed(0)
    ended, action = 0, torch.as_tensor(np.stack([env.action_space.sample() for _ in range(4)]))
    for t in range(1_500 if name == "Acrobot" else 800):  # whose episodes are long
        for i, other in enumerate(others):
            other.state = env.task.state[i].numpy().copy()
        if name.startswith("MountainCar") and t % 3:  # push the way it rolls
            way = (env.task.state[:, 1:] >= 0).to(torch.float32) * 2 - 1
            action = way if name == "MountainCarContinuous" else way.squeeze(1).long() + 1
        elif t % 4 == 0:
            action = torch.as_tensor(np.stack([env.action_space.sample() for _ in range(4)]))
        step = env.step(action)
        for i, other in enumerate(others):
            _, reward, terminated, _, _ = other.step(action[i].double().numpy() if action.ndim > 1 else int(action[i]))
            expected = other.state
            if name == "Acrobot":
                a, b, v, w = other.state
                expected = np.array([math.cos(a), math.sin(a), math.cos(b), math.sin(b), v, w])
            elif name == "Pendulum":
                expected = np.array([math.cos(other.state[0]), math.sin(other.state[0]), other.state[1]])
            assert np.abs(np.asarray(expected, np.float64) - step.next_obs[i].numpy()).max() <= tolerance
            assert reward == pytest.approx(float(step.reward[i]), abs=max(tolerance, 1e-12))
            assert terminated == bool(step.terminated[i])
            if terminated:
                other.reset()
        ended += int(step.terminated.sum())
    assert ended > 2 or name == "Pendulum"


def test_the_clock_truncates_reports_the_true_successor_and_starts_again() -> None:
    env = make("HalfCheetah", 3, dtype=torch.float64, max_episode_steps=5)
    env.reset()
    for t in range(1, 12):
        step = env.step(torch.zeros(3, 6))
        assert step.truncated.all() == (t % 5 == 0) and not step.terminated.any()
        assert torch.equal(step.obs, step.next_obs) == (t % 5 != 0)


def test_what_terminates_is_not_truncated_as_well() -> None:
    """With a time limit at which one falls."""
    push, fall = torch.full((8, 1), 3.0), 1
    free = make("InvertedPendulum", 8, seed=0)
    free.reset()
    while not free.step(push).terminated.any():
        fall += 1
    env = make("InvertedPendulum", 8, seed=0, max_episode_steps=fall)
    env.reset()
    for _ in range(fall - 1):
        env.step(push)
    step = env.step(push)
    assert step.terminated.any() and torch.equal(step.truncated, ~step.terminated)


@pytest.mark.parametrize("name", MUJOCO)
def test_great_speeds_are_observed_as_gymnasium_does(name: str) -> None:
    """Some robots clip what is observed, and random actions do not take all of them that far."""
    env, other = make(name, 2, dtype=torch.float64), reference(name, {})
    env.reset()
    physics = env.task.physics  # pyright: ignore[reportAttributeAccessIssue]
    qvel = torch.linspace(-40, 40, physics.model.nv, dtype=torch.float64).expand(2, -1)
    physics.set_state(torch.ones(2, dtype=torch.bool), physics.qpos.clone(), qvel)
    theirs = put(other, physics.qpos[0], physics.qvel[0])
    assert np.abs(theirs - env.task.observe()[0].numpy()).max() <= 1e-9 * np.abs(theirs).max()  # pyright: ignore


@pytest.mark.parametrize("name", ["HalfCheetah", "CartPole", "Pendulum"])
def test_a_seed_fixes_the_world_and_a_state_restores_it(name: str) -> None:
    envs = [make(name, 4, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(envs[0].reset(), envs[1].reset())
    space = envs[0].action_space
    space.seed(0)
    actions = [torch.stack([torch.as_tensor(space.sample()) for _ in range(4)]) for _ in range(40)]
    for action in actions[:20]:
        assert torch.equal(envs[0].step(action).obs, envs[1].step(action).obs)
    envs[2].reset()
    envs[2].load_state_dict(envs[0].state_dict())
    for action in actions[20:]:
        assert torch.equal(envs[0].step(action).obs, envs[2].step(action).obs)


def test_physics_does_not_depend_on_the_number_of_threads() -> None:
    envs = [make("Hopper", 16, threads=threads) for threads in (1, 2)]
    for env in envs:
        env.reset()
    for _ in range(100):
        action = torch.empty(16, 3).uniform_(-1, 1)
        steps = [env.step(action) for env in envs]
        assert torch.equal(steps[0].obs, steps[1].obs) and torch.equal(steps[0].reward, steps[1].reward)


def test_initial_states_are_spread_as_gymnasiums() -> None:
    """Moments over 2,000 starts against gymnasium's, five standard errors, seeded."""
    count = 2_000
    for name in ("HalfCheetah", "Hopper", "Ant", "Reacher", "Pusher"):
        ours = make(name, count, dtype=torch.float64, seed=0).reset().numpy()
        env = gymnasium.make(f"{name}-v5")
        theirs = np.stack([env.reset(seed=seed)[0] for seed in range(count)])
        error = 5 * theirs.std(0) * math.sqrt(2 / count)
        assert (np.abs(ours.mean(0) - theirs.mean(0)) <= error + 1e-12).all()
        assert np.allclose(ours.std(0), theirs.std(0), rtol=0.15, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world": "HalfCheeta"}, "did you mean HalfCheetah"),
        ({"world": "halfcheetah-v5"}, "did you mean HalfCheetah"),
        ({"world": "HalfCheetah", "control_cost": 1.0}, "no option 'control_cost'; did you mean ctrl_cost_weight"),
        ({"world": "HalfCheetah", "backend": "torch"}, "runs on backend mujoco"),
        ({"world": "CartPole", "backend": "mujoco"}, "runs on backend torch"),
        ({"world": "Hopper", "frame_skip": 0}, "Hopper.frame_skip must be a whole number at least 1"),
        ({"world": "Hopper", "num_envs": 0}, "num_envs must be at least 1"),
        ({"world": "Ant", "main_body": "wing"}, r"Ant.main_body: Invalid name 'wing'. Valid names: .*'torso'"),
        (
            {"world": "Ant", "xml_file": "aunt.xml"},
            r"no MuJoCo model 'aunt.xml': a path, or one of gymnasium's: ant.xml",
        ),
    ],
)
def test_a_wrong_environment_is_named_with_what_would_be_right(arguments: dict[str, Any], message: str) -> None:
    arguments = {"num_envs": 2} | arguments
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["CartPole", "Pendulum", "HalfCheetah"])
def test_environments_speak_cuda(name: str) -> None:
    env = make(name, 8, device="cuda")
    obs = env.reset()
    action = torch.stack([torch.as_tensor(env.action_space.sample()) for _ in range(8)]).cuda()
    step = env.step(action)
    assert all(x.is_cuda for part in (obs, *step) if part is not None for x in leaves(part))


@pytest.mark.parametrize("name", [*CLASSIC, *MUJOCO])
@pytest.mark.parametrize("steps", [0, -3])
def test_no_task_takes_a_time_limit_below_one_step(name: str, steps: int) -> None:
    with pytest.raises(ValueError, match="max_episode_steps must be a whole number at least 1"):
        getattr(tasks, name)(max_episode_steps=steps)


def test_a_subclass_that_declares_its_time_limit_as_any_number_is_held_to_one_step() -> None:
    @dataclass(kw_only=True, eq=False)
    class Short(tasks.CartPole):
        max_episode_steps: int = 7

    assert Short().max_episode_steps == 7
    with pytest.raises(ValueError, match="max_episode_steps must be a whole number at least 1, got 0"):
        Short(max_episode_steps=0)


NORTH, EAST, SOUTH, WEST = range(4)


@pytest.mark.parametrize("turn", [NORTH, SOUTH])
def test_a_t_maze_shows_the_side_once_and_pays_there(turn: int) -> None:
    env = make("TMaze", 64, length=3, max_episode_steps=10)
    first = env.reset()
    north = first[:, 2] == 1
    assert 0 < north.sum() < 64 and torch.equal(first[:, 0] == 0, north) and (first[:, 1] == 1).all()
    for action, reward in ((WEST, -0.1), (NORTH, -0.1), (EAST, 0.0), (SOUTH, -0.1), (EAST, 0.0), (EAST, 0.0)):
        step = env.step(torch.full((64,), action))
        assert torch.allclose(step.reward, torch.tensor(reward)) and not step.done.any()
    assert torch.equal(step.obs, torch.tensor([0.0, 1.0, 0.0]).expand(64, 3))
    assert torch.allclose(env.step(torch.full((64,), EAST)).reward, torch.tensor(-0.1))
    step = env.step(torch.full((64,), turn))
    right = north if turn == NORTH else ~north
    assert torch.allclose(step.reward, torch.where(right, 4.0, -0.1)) and step.terminated.all()
    assert (step.obs[:, 1] == 1).all() and 0 < step.obs[:, 2].sum() < 64
    for _ in range(10):
        step = env.step(torch.full((64,), EAST))
    assert step.truncated.all()
