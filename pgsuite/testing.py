"""What every vector environment owes the suite, as checks for your own tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from pgsuite.envs.base import VectorEnv
from pgsuite.types import Step


def check_vector_env(make: Callable[[int], VectorEnv], steps: int = 200) -> None:
    """Raise AssertionError, saying what is wrong, unless environments from ``make(seed)`` keep the contract of
    ``VectorEnv``.

    Checked over ``steps`` random steps: shapes, types and device; that returned tensors are never written to again;
    that no step is both terminated and truncated; that observations go on from true successors; that no episode
    outlasts the limit; that a seed fixes everything; and, where the state can be saved, that it restores the future
    and that actions outside a Box are clipped to it.
    """
    env = make(0)
    actions = random_actions(env, steps)
    history = play(env, actions)
    for t, (before, step) in enumerate(itertools.pairwise(history)):
        _check_step(env, before, step, f"step {t}")
    _check_lengths(env, history[1:])
    _check_seeds(make, actions[: min(steps, 50)])
    if env.state_dict():
        _check_state(make(3), actions)


def random_actions(env: VectorEnv, steps: int) -> list[Tensor]:
    """Samples [N, *A] of the action space, the same every time; of Discrete spaces counted from zero."""
    env.action_space.seed(0)
    first = int(env.action_space.start) if isinstance(env.action_space, spaces.Discrete) else 0
    rows = [[torch.as_tensor(env.action_space.sample()) - first for _ in range(env.num_envs)] for _ in range(steps)]
    return [torch.stack(row).to(env.device) for row in rows]


def play(env: VectorEnv, actions: list[Tensor]) -> list[Step]:
    """What a reset, as a step that nothing came before, and then each action brings; checks that nothing returned is
    written to later."""
    obs = env.reset()
    nothing = torch.zeros(env.num_envs, device=env.device)
    steps = [Step(obs, obs, nothing, nothing.bool(), nothing.bool())]
    kept = [_copy(steps[0])]
    for action in actions:
        steps.append(env.step(action.clone()))
        kept.append(_copy(steps[-1]))
    for t, (step, copy) in enumerate(zip(steps, kept, strict=True)):
        for name, x in copy._asdict().items():
            assert x is None or torch.equal(getattr(step, name), x), f"{name} of step {t} was overwritten later"
    return kept


def _copy(step: Step) -> Step:
    return Step(*(None if x is None else x.clone() for x in step))  # pyright: ignore[reportArgumentType]


def _check_step(env: VectorEnv, before: Step, step: Step, where: str) -> None:
    shape = (env.num_envs, *(env.observation_space.shape or ()))
    for name in ("obs", "next_obs"):
        x = getattr(step, name)
        assert x.shape == shape, f"{where}: {name} has shape {tuple(x.shape)}, and its space says {shape}"
        assert x.isfinite().all(), f"{where}: {name} is not finite"
    for name, dtype in (("reward", None), ("terminated", torch.bool), ("truncated", torch.bool), ("mask", torch.bool)):
        x = getattr(step, name)
        if x is None:
            assert name == "mask", f"{where}: {name} is None"
            continue
        assert x.shape == (env.num_envs,), f"{where}: {name} has shape {tuple(x.shape)}, not {(env.num_envs,)}"
        assert x.is_floating_point() if dtype is None else x.dtype is dtype, f"{where}: {name} is {x.dtype}"
    for name, x in step._asdict().items():
        assert x is None or x.device == env.device, f"{where}: {name} is on {x.device}, and not on {env.device}"
    assert step.reward.isfinite().all(), f"{where}: reward is not finite"
    assert not (step.terminated & step.truncated).any(), f"{where}: both terminated and truncated"
    going = ~step.done
    assert torch.equal(step.obs[going], step.next_obs[going]), f"{where}: obs is not next_obs, and no episode ended"
    if step.mask is not None:
        assert not (step.done & ~step.mask).any(), f"{where}: an episode ended in a step spent on restarting"
        assert (before.done | step.mask).all(), f"{where}: a step was spent on restarting what had not ended"


def _check_lengths(env: VectorEnv, steps: list[Step]) -> None:
    limit = env.max_episode_steps
    length = torch.zeros(env.num_envs, dtype=torch.long, device=env.device)
    for t, step in enumerate(steps):
        length += 1 if step.mask is None else step.mask
        assert limit is None or (length <= limit).all(), f"step {t}: an episode outlasts its limit of {limit} steps"
        assert limit is None or step.done[length == limit].all(), (
            f"step {t}: an episode goes on at its limit of {limit}"
        )
        length[step.done] = 0


def _check_seeds(make: Callable[[int], VectorEnv], actions: list[Tensor]) -> None:
    first, second, other = (play(make(seed), actions) for seed in (1, 1, 2))
    for t, (x, y) in enumerate(zip(first, second, strict=True)):
        for name, value in x._asdict().items():
            assert value is None or torch.equal(value, getattr(y, name)), (
                f"{name} of step {t} differs between equal seeds"
            )
    assert any(not torch.equal(x.obs, y.obs) for x, y in zip(first, other, strict=True)), "the seed changes nothing"


def _check_state(env: VectorEnv, actions: list[Tensor]) -> None:
    half = len(actions) // 2
    play(env, actions[:half])
    state = env.state_dict()
    futures: list[list[Any]] = []
    for _ in range(2):
        futures.append([_copy(env.step(action)) for action in actions[half:]])
        env.load_state_dict(state)
    for t, (x, y) in enumerate(zip(*futures, strict=True)):
        for name, value in x._asdict().items():
            assert value is None or torch.equal(value, getattr(y, name)), (
                f"{name} differs {t} steps after its state was restored"
            )
    if isinstance(env.action_space, spaces.Box) and env.action_space.is_bounded():
        high = torch.as_tensor(env.action_space.high, device=env.device).expand(env.num_envs, -1)
        within = env.step(high.clone())
        env.load_state_dict(state)
        assert torch.equal(env.step(10 * high.abs() + 1).next_obs, within.next_obs), (
            "actions outside the Box are not clipped"
        )
