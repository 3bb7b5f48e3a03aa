"""MuJoCo Warp against MuJoCo itself: on Warp's CPU device everywhere, and on CUDA where there is one."""

import importlib.util
import math
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from toys import build

from pgsuite.algorithms import PPO
from pgsuite.envs import make, tasks
from pgsuite.rollout import EpisodeTracker, StepCollector
from pgsuite.testing import check_vector_env, random_actions
from pgsuite.testing.reads import NothingRead

WORLDS, STEPS = 32, {"Ant": 30}
MUJOCO = sorted(name for name in tasks.__all__ if "warp" in getattr(getattr(tasks, name), "backends", ()))
SHORT = ("HalfCheetah", "Ant", "InvertedPendulum")
# mujoco-warp 4.0 turns the contact frame of a capsule that meets a plane steeply.  The greatest share of states that
# this may change:
STEEP = {"Ant": 0.45, "Humanoid": 0.05}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def long(name: str) -> Any:
    """Warp compiles kernels for each model, which takes seconds, so most models are for the longer tests."""
    return pytest.param(name, marks=pytest.mark.long)


def compared(name: str) -> Any:
    return name if name in SHORT else long(name)


def errors(name: str, device: str) -> dict[str, np.ndarray]:
    """What one step on Warp differs by from the same step in float64, from each state of random episodes, falls and
    what follows them included."""
    exact: Any = make(name, WORLDS, dtype=torch.float64, seed=1)
    rough: Any = make(name, WORLDS, device=device, backend="warp", dtype=torch.float64)
    exact.reset()
    found: dict[str, list[np.ndarray]] = {"qpos": [], "qvel": [], "reward": [], "terminated": []}
    for action in random_actions(exact, STEPS.get(name, 80)):
        rough.task.physics.load_state_dict(exact.task.physics.state_dict())
        before = exact.task.physics.qpos.clone()
        exact.task.simulate(action.double())
        rough.task.simulate(action.to(device).float())
        assert all(bool((before != env.task.physics.qpos.cpu()).any(-1).all()) for env in (exact, rough))  # it moved
        reward, terminated = exact.task.advance(action.double())
        rough_reward, rough_terminated = rough.task.advance(action.to(device).float())
        pairs = {
            "qpos": (exact.task.physics.qpos, rough.task.physics.qpos),
            "qvel": (exact.task.physics.qvel, rough.task.physics.qvel),
            "reward": (reward.unsqueeze(-1), rough_reward.unsqueeze(-1)),
            "terminated": (terminated.unsqueeze(-1), rough_terminated.unsqueeze(-1)),
        }
        for key, (x, y) in pairs.items():
            found[key].append((x.double() - y.cpu().double()).abs().amax(-1).numpy())
    return {key: np.concatenate(values) for key, values in found.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [compared(name) for name in MUJOCO])
def test_one_step_is_mujocos_to_single_precision(name: str, device: str) -> None:
    """One state in a thousand may meet a contact or a limit that single precision misses by a hair."""
    found = errors(name, device)
    differs = found["qvel"] > 1e-3
    if name in STEEP:  # the states that it does not change are as exact as any
        assert differs.mean() <= STEEP[name]
        found = {key: x[~differs] for key, x in found.items()}
    assert np.quantile(found["qpos"], 0.99) <= 1e-5
    assert np.quantile(found["qvel"], 0.99) <= 1e-3 and np.mean(found["qvel"] > 2e-2) <= 1e-3
    assert np.quantile(found["reward"], 0.99) <= 1e-3
    assert found["terminated"].mean() <= 1e-3


def world(name: str, device: str = "cpu", **options: Any) -> Any:
    env: Any = make(name, 4, device=device, backend="warp", **options)
    env.reset()
    for action in random_actions(env, 10):
        env.step(action)
    return env


@pytest.mark.parametrize("device", DEVICES)
def test_torch_and_warp_share_one_memory(device: str) -> None:
    physics = world("HalfCheetah", device).task.physics
    for ours, theirs in ((physics.qpos, physics.data.qpos), (physics.ctrl, physics.data.ctrl)):
        assert ours.data_ptr() == theirs.ptr


@pytest.mark.parametrize("name", ["HalfCheetah", "InvertedPendulum", long("InvertedDoublePendulum")])
def test_a_captured_step_is_the_step(name: str) -> None:
    captured, plain = world(name).task.physics, world(name).task.physics
    plain.load_state_dict(captured.state_dict())
    captured.step(4)
    with plain.warp.ScopedDevice(plain.place):
        plain.advance(4)
    assert torch.equal(captured.qpos, plain.qpos) and torch.equal(captured.warmstart, plain.warmstart)
    for key, x in plain.derived.items():
        assert torch.equal(captured.outputs[key], x)


@pytest.mark.parametrize("device", DEVICES)
def test_a_reset_touches_only_its_worlds_and_clears_the_warm_start(device: str) -> None:
    physics = world("Ant", device).task.physics
    before = physics.state_dict()
    mask = torch.tensor([True, False, False, True], device=device)
    qpos, qvel = torch.randn_like(physics.qpos), torch.randn_like(physics.qvel)
    qpos[:, 2] = 3  # above the floor
    physics.set_state(mask, qpos, qvel)
    assert torch.equal(physics.qpos[mask], qpos[mask]) and torch.equal(physics.qvel[mask], qvel[mask])
    assert not physics.warmstart[mask].any() and not physics.time[mask].any()
    assert not physics.outputs["cfrc_ext"][mask].any()
    assert torch.allclose(physics.outputs["xpos"][mask, 1], qpos[mask, :3], atol=1e-6)
    for name in ("qpos", "qvel", "warmstart", "time"):
        assert torch.equal(getattr(physics, name)[~mask], before[name][~mask]) and before[name].any()
    for name, x in physics.outputs.items():
        assert torch.equal(x[~mask], before["outputs"][name][~mask])


@pytest.mark.parametrize("name", ["HalfCheetah", long("InvertedDoublePendulum"), long("Ant")])
def test_the_contract_of_vector_environments_is_kept(name: str) -> None:
    check_vector_env(lambda seed: make(name, 3, seed=seed, backend="warp", max_episode_steps=30), steps=60)


@pytest.mark.parametrize("name", ["InvertedPendulum", *map(long, ("Hopper", "Pusher", "Humanoid"))])
def test_a_step_reads_nothing_back(name: str) -> None:
    env = world(name, max_episode_steps=15)
    actions = random_actions(env, 10)
    with torch.no_grad(), NothingRead():
        for action in actions:
            env.step(action)


def test_worlds_that_ran_out_of_room_are_told_of_once() -> None:
    crowded = world("HalfCheetah", warp_constraints=4).task.physics
    with pytest.warns(UserWarning, match=r"\d of 4 worlds ran out of room .*: raise .* env.warp_constraints above 4"):
        crowded.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crowded.state_dict()


@pytest.mark.parametrize("name", ["Ant", long("HumanoidStandup")])
def test_worlds_have_room_enough(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world(name).state_dict()


@pytest.mark.parametrize("device", DEVICES)
def test_a_world_that_blows_up_begins_again_from_rest_and_harms_no_other(device: str) -> None:
    physics, whole = (world("Ant", device).task.physics for _ in range(2))
    for other in (physics, whole):
        other.load_state_dict(whole.state_dict())
    physics.qvel[1] = math.nan
    for other in (physics, whole):
        other.step(5)
    rest = torch.as_tensor(physics.model.qpos0, device=device, dtype=torch.float32)
    assert torch.allclose(physics.qpos[1], rest) and not physics.qvel[1].any()
    others = [0, 2, 3]
    assert torch.equal(physics.qpos[others], whole.qpos[others])
    assert all(x.isfinite().all() for x in physics.outputs.values())
    if device == "cuda":
        physics.state_dict()  # asks, and
        torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="1 of 4 worlds reached numbers that are not finite, and began again"):
        physics.state_dict()


@pytest.mark.gpu
def test_physics_takes_its_turn_on_the_stream_that_torch_is_on() -> None:
    """Work queued before a step is seen by it, and work queued after sees its result, on a stream of the user's too."""
    physics = make("InvertedPendulum", 2_048, device="cuda").task.physics  # pyright: ignore[reportAttributeAccessIssue]
    everywhere = torch.ones(2_048, dtype=torch.bool, device="cuda")
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for push in (1.0, -1.0):
                physics.set_state(everywhere, torch.zeros_like(physics.qpos), torch.zeros_like(physics.qvel))
                busy = torch.randn(4_096, 4_096, device="cuda")
                physics.ctrl.copy_((busy @ busy).clamp(1, 1)[:2_048, :1] * push)
                physics.step(2)
                speed = physics.qvel[:, 0].clone()
                physics.qvel.zero_()
                assert bool((speed * push > 0).all())


def test_how_close_it_comes_is_said() -> None:
    for name, verb in (("HalfCheetah", "rounds"), ("Ant", "approximates"), ("Humanoid", "approximates")):
        assert f"{verb} gymnasium" in make(name, 2, backend="warp").description


def test_a_gpu_gets_warp_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.Hopper()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert task.preferred(torch.device("cuda")) == "warp" and task.preferred(torch.device("cpu")) == "mujoco"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"simulated on the CPU; for the GPU: pip install -e '.\[gpu\]'"):
        assert task.preferred(torch.device("cuda")) == "mujoco"
    assert tasks.CartPole().preferred(torch.device("cuda")) == "torch"


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    with pytest.raises(ValueError, match=r"backend=warp needs mujoco-warp: pip install -e '.\[gpu\]'"):
        make("Hopper", 2, backend="warp")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MUJOCO)
def test_no_step_waits_for_the_gpu(name: str) -> None:
    env = make(name, 2_048, device="cuda", max_episode_steps=15)
    assert env.backend == "warp"
    actions = random_actions(env, 20)
    env.reset()
    env.step(actions[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = [env.step(action) for action in actions]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(step.next_obs.isfinite().all() and step.reward.isfinite().all() for step in steps)
    assert any(step.truncated.any() for step in steps)


@pytest.mark.gpu
def test_ppo_learns_on_the_gpu() -> None:
    """To balance a pole: a random policy lasts some 6 steps, this one 100."""
    env = make("InvertedPendulum", 256, device="cuda", seed=1)
    algorithm = build(PPO, env, lr=3e-3)
    for part in (algorithm.policy, algorithm.critic, algorithm.reward_scale):
        part.to("cuda")
    algorithm = PPO(
        policy=algorithm.policy, critic=algorithm.critic, reward_scale=algorithm.reward_scale, lr=3e-3, epochs=5
    )
    rollouts, tracker, lengths = StepCollector(env, 64), EpisodeTracker(256, env.device), [math.nan]
    for _ in range(30):
        algorithm.iterate(rollouts)
        lengths.append(tracker.finished_episodes(rollouts.buffer.read())[1].mean().item())
    assert lengths[1] < 20 and lengths[-1] > 100
