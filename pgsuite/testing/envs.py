"""Check of the ``VectorEnv`` contract, for users' tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from pgsuite.envs.base import VectorEnv
from pgsuite.envs.spaces import joined_action
from pgsuite.types import Obs, Step, map_obs


def check_vector_env(make: Callable[[int], VectorEnv], steps: int = 200, *, seeded: bool = True) -> None:
    """Raise AssertionError, naming the fault, unless environments from ``make(seed)`` satisfy the contract of
    ``VectorEnv``.

    Over ``steps`` random steps, the check requires:

    - shapes, dtypes and device as declared;
    - returned tensors are not written to later;
    - no step is both terminated and truncated;
    - within an episode, obs equals next_obs, the true successor;
    - no episode is longer or shorter than the time limit, except by termination;
    - reset starts new episodes;
    - equal seeds give equal steps, and other seeds others, unless ``seeded`` is false for deterministic environments;
    - if the state can be saved, loading it reproduces the steps that follow, and actions outside a Box are clipped.
    """
    env = make(0)
    actions = random_actions(env, steps)
    history = play(env, actions)
    for t, (before, step) in enumerate(itertools.pairwise(history)):
        _check_step(env, before, step, f"step {t}")
    _check_lengths(env, history[1:])
    _check_reset(env, actions)
    _check_seeds(make, actions[: min(steps, 50)], seeded)
    if env.is_resumable:
        _check_state(make(3), actions)
    else:
        env.load_state_dict(env.state_dict())  # must not raise; the episodes start anew
        env.reset()


def random_actions(env: VectorEnv, steps: int) -> list[Tensor]:
    """Samples [N, *A] of the action space, equal in every call; those of discrete spaces count from zero."""
    env.action_space.seed(0)
    space = env.action_space
    rows = [[joined_action(space, space.sample()) for _ in range(env.num_envs)] for _ in range(steps)]
    return [torch.stack(row).to(env.device) for row in rows]


def play(env: VectorEnv, actions: list[Tensor]) -> list[Step]:
    """The steps of a reset, with zero reward, and of each action.  Raises AssertionError if a returned tensor is
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
            assert _same(getattr(step, name), x), f"{name} of step {t} was overwritten later"
    return kept


def _copy(step: Step) -> Step:
    return Step(*(None if x is None else map_obs(torch.clone, x) for x in step))  # pyright: ignore[reportArgumentType]


def _same(x: Obs | None, y: Obs | None) -> bool:
    if isinstance(x, dict):
        return isinstance(y, dict) and x.keys() == y.keys() and all(_same(x[key], y[key]) for key in x)
    return x is y if x is None or y is None else torch.equal(x, y)


def _check_obs(env: VectorEnv, space: spaces.Space[Any], obs: Obs, where: str) -> None:
    if isinstance(space, spaces.Dict):
        assert isinstance(obs, dict) and obs.keys() == set(space), f"{where} has not the keys {', '.join(space)}"
        for key, part in space.items():
            _check_obs(env, part, obs[key], f"{where}[{key!r}]")
        return
    shape = (env.num_envs, *(space.shape or ()))
    assert obs.shape == shape, f"{where} has shape {tuple(obs.shape)}, and its space says {shape}"
    assert obs.isfinite().all(), f"{where} is not finite"
    assert obs.device == env.device, f"{where} is on {obs.device}, and not on {env.device}"


def _check_step(env: VectorEnv, before: Step, step: Step, where: str) -> None:
    for name in ("obs", "next_obs"):
        _check_obs(env, env.observation_space, getattr(step, name), f"{where}: {name}")
    for name, dtype in (("reward", None), ("terminated", torch.bool), ("truncated", torch.bool), ("mask", torch.bool)):
        x = getattr(step, name)
        if x is None:
            assert name == "mask", f"{where}: {name} is None"
            continue
        assert x.shape == (env.num_envs,), f"{where}: {name} has shape {tuple(x.shape)}, not {(env.num_envs,)}"
        assert x.is_floating_point() if dtype is None else x.dtype is dtype, f"{where}: {name} is {x.dtype}"
        assert x.device == env.device, f"{where}: {name} is on {x.device}, and not on {env.device}"
    assert step.reward.isfinite().all(), f"{where}: reward is not finite"
    assert not (step.terminated & step.truncated).any(), f"{where}: both terminated and truncated"
    going = ~step.done
    acted_on, followed = (map_obs(lambda x: x[going], obs) for obs in (step.obs, step.next_obs))
    assert _same(acted_on, followed), f"{where}: obs is not next_obs, and no episode ended"
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


def _check_reset(env: VectorEnv, actions: list[Tensor]) -> None:
    """Reset after half an episode, and require that the next ones have their full length."""
    limit = env.max_episode_steps
    if limit is None or limit > len(actions):
        return
    play(env, actions[: limit // 2])
    truncated = [step.truncated for step in play(env, actions[: limit - 1])]
    assert not torch.stack(truncated).any(), "reset does not begin episodes anew: one is cut off before its limit"


def _check_seeds(make: Callable[[int], VectorEnv], actions: list[Tensor], seeded: bool) -> None:
    first, second, other = (play(make(seed), actions) for seed in (1, 1, 2))
    for t, (x, y) in enumerate(zip(first, second, strict=True)):
        for name, value in x._asdict().items():
            assert _same(value, getattr(y, name)), f"{name} of step {t} differs between equal seeds"
    alike = all(_same(x.obs, y.obs) for x, y in zip(first, other, strict=True))
    assert not (seeded and alike), "the seed changes nothing"


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
            assert _same(value, getattr(y, name)), f"{name} differs {t} steps after its state was restored"
    if isinstance(env.action_space, spaces.Box) and env.action_space.is_bounded():
        high = torch.as_tensor(env.action_space.high, device=env.device).expand(env.num_envs, -1)
        within = env.step(high.clone())
        env.load_state_dict(state)
        beyond = env.step(10 * high.abs() + 1)
        assert _same(beyond.next_obs, within.next_obs), "actions outside the Box are not clipped"
