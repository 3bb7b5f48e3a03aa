"""Environments of gymnasium's registry as a VectorEnv."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from pgsuite import seeding, settings
from pgsuite.envs.base import BrokenEnvError, NotFiniteError, VectorEnvConfig
from pgsuite.envs.spaces import native_action, tensor_space, tensors, to_device
from pgsuite.envs.workers import Workers
from pgsuite.errors import install
from pgsuite.settings import Count, Natural, closest, imported
from pgsuite.types import ACTION_MASK, Obs, Step, map_obs, write_obs


@dataclass(kw_only=True, eq=False)
class Gym(VectorEnvConfig):
    """An environment of gymnasium's registry, and its vectorization."""

    backends = ("gymnasium",)

    id: str = ""  # such as LunarLander-v3, or my_package:MyEnv-v0
    import_: str | None = None  # a package that registers it
    workers: Natural = 0  # processes that step the environments, for slow ones; 0 steps them in this process
    native: bool = False  # the environment's own vectorization, where it registers one
    action_mask: bool = False  # the environment's info has a mask of allowed discrete actions
    max_episode_steps: Count | None = None  # time limit; null takes the registered one
    options: dict[str, Any] = field(default_factory=dict)  # the environment's own keyword arguments

    def __post_init__(self) -> None:
        settings.check(self, label="env.")
        if not self.id:
            raise ValueError("env.id must name an environment, such as env.id=LunarLander-v3")

    def build(self, num_envs: int, *, device: torch.device, dtype: torch.dtype, seed: int) -> GymEnv:
        vec = self.vectorize(num_envs)
        limit = self.max_episode_steps or time_limit(vec)
        return GymEnv(vec, name=self.id, max_episode_steps=limit, device=device, dtype=dtype, seed=seed)

    def vectorize(self, num_envs: int) -> VectorEnv:
        """Make the vector environment.  Raises ValueError for an unknown id, or if gymnasium fails to make it."""
        if self.import_ is not None:
            try:
                imported(self.import_)
            except ImportError as error:
                remedy = f": {install('atari')}" if self.import_ == "ale_py" else ""
                raise ValueError(f"env.import={self.import_} cannot be imported: {error}{remedy}") from error
        known = gymnasium.registry.keys()
        if ":" not in self.id and self.id not in known:
            raise ValueError(f"gymnasium has no environment {self.id!r}; {closest(self.id, known)}")
        try:
            if self.native:
                limit = {} if self.max_episode_steps is None else {"max_episode_steps": self.max_episode_steps}
                return gymnasium.make_vec(self.id, num_envs, "vector_entry_point", **limit, **self.options)
            makers = [Maker(self, index) for index in range(num_envs)]
            if self.workers:
                return Workers(makers, min(self.workers, num_envs))
            return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise ValueError(f"gymnasium cannot make {self.id}: {error}") from error


def time_limit(vec: VectorEnv) -> int | None:
    """The time limit of a vector environment's episodes, as registered or set by a wrapper; None if there is none."""
    if isinstance(vec, Workers):
        return vec.max_episode_steps
    spec = vec.envs[0].spec if isinstance(vec, SyncVectorEnv) else vec.spec  # a SyncVectorEnv has no spec of its own
    return spec.max_episode_steps if spec is not None else None


@dataclass
class Maker:
    """Makes one environment, wrapped in Watch; a class, so that it can be pickled."""

    gym: Gym
    index: int

    def __call__(self) -> gymnasium.Env[Any, Any]:
        if self.gym.import_ is not None:
            imported(self.gym.import_)
        env = gymnasium.make(self.gym.id, max_episode_steps=self.gym.max_episode_steps, **self.gym.options)
        env = MaskInObservation(env) if self.gym.action_mask else env
        return Watch(env, f"{self.gym.id} (environment {self.index})")


class MaskInObservation(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Moves ``action_mask`` from an environment's info to its observation, where policies expect it."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        size = spaces.flatdim(env.action_space)
        own = env.observation_space
        parts = dict(own.spaces) if isinstance(own, spaces.Dict) else {"observation": own}
        self.observation_space = spaces.Dict({**parts, ACTION_MASK: spaces.MultiBinary(size)})

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        return self.join(obs, info), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self.join(obs, info), reward, terminated, truncated, info

    def join(self, obs: Any, info: dict[str, Any]) -> dict[str, Any]:
        parts = obs if isinstance(obs, dict) else {"observation": obs}
        allowed = info[ACTION_MASK]
        mask = np.concatenate(allowed) if isinstance(allowed, tuple) else np.asarray(allowed)
        return {**parts, ACTION_MASK: mask.astype(np.int8)}


class Watch(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Raises BrokenEnvError with environment and step for exceptions, and NotFiniteError for non-finite results."""

    def __init__(self, env: gymnasium.Env[Any, Any], name: str) -> None:
        super().__init__(env)
        self.name, self.steps = name, 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        try:
            return self.env.reset(**kwargs)
        except Exception as error:
            raise BrokenEnvError(f"{self.name} failed to reset: {type(error).__name__}: {error}") from error

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        where = f"{self.name} at its step {self.steps}"
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            raise BrokenEnvError(f"{where} raised {type(error).__name__}: {error}") from error
        if not np.isfinite(float(reward)):
            raise NotFiniteError(f"{where} gave the reward {reward}")
        if not finite(obs):
            raise NotFiniteError(f"{where} gave an observation that is not finite: {obs}")
        return obs, reward, terminated, truncated, info


def finite(obs: Any) -> bool:
    """Whether every number of an observation is finite."""
    if isinstance(obs, Mapping):
        return all(map(finite, obs.values()))
    if isinstance(obs, tuple):
        return all(map(finite, obs))
    return bool(np.isfinite(obs).all())


class GymEnv:
    """A gymnasium vector environment in any of the three autoreset modes; see ``spaces`` for the conversion of
    observations."""

    backend = "gymnasium"
    is_resumable = False

    def __init__(
        self,
        vec: VectorEnv,
        *,
        name: str,
        max_episode_steps: int | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.vec, self.name, self.num_envs, self.device, self.dtype = vec, name, vec.num_envs, device, dtype
        self.max_episode_steps = max_episode_steps
        self.space, self.action_space = vec.single_observation_space, vec.single_action_space
        self.observation_space: spaces.Space[Any] = tensor_space(self.space)
        mode = vec.metadata.get("autoreset_mode")
        if mode is None:
            raise ValueError(f"{name} does not say how it restarts: its metadata needs an autoreset_mode")
        self.mode = AutoresetMode(mode)
        how = f"{type(vec).__name__}, {'none' if self.mode is AutoresetMode.DISABLED else self.mode.value} autoreset"
        self.description = f"{name} | {how} | {self.num_envs} environments | is gymnasium {gymnasium.__version__}'s"
        # Every vector environment accepts an integer, and seeds its environments with it and the integers after it.
        self.origin = seeding.number(seed, "environment")
        self.seed: int | None = self.origin
        self.restarting = np.zeros(self.num_envs, dtype=bool)  # environments whose next step only restarts them

    def reset(self) -> Obs:
        seed, self.seed = self.seed, None  # for the first reset only; later ones continue the environments' generators
        obs, _ = self.vec.reset(seed=seed)
        self.restarting[:] = False
        self.last = self._obs(obs)
        return self.last

    def step(self, action: Tensor) -> Step:
        obs, reward, terminated, truncated, info = self.vec.step(native_action(self.action_space, action))
        terminated, truncated = (np.array(x, dtype=bool) for x in (terminated, truncated))
        truncated &= ~terminated
        done, idle = terminated | truncated, self.restarting.copy()
        if self.mode is AutoresetMode.NEXT_STEP:
            # In a step that restarts an environment, termination and truncation refer to no action.
            terminated, truncated = terminated & ~idle, truncated & ~idle
            self.restarting = terminated | truncated
            new = next_obs = self._obs(obs)
        elif self.mode is AutoresetMode.DISABLED:
            new = next_obs = self._obs(obs)
            if done.any():
                new = self._obs(self.vec.reset(options={"reset_mask": done})[0])
        else:
            new = next_obs = self._obs(obs)
            if done.any():
                next_obs = self._final(new, done, info)
        self.last = new
        return Step(
            obs=new,
            next_obs=next_obs,
            reward=self._tensor(reward, self.dtype),
            terminated=self._tensor(terminated),
            truncated=self._tensor(truncated),
            mask=self._tensor(~idle) if self.mode is AutoresetMode.NEXT_STEP else None,
        )

    def _final(self, obs: Obs, done: np.ndarray, info: dict[str, Any]) -> Obs:
        """True successor states; gymnasium returns those of finished environments separately."""
        worlds = np.flatnonzero(done)
        successors = map_obs(torch.clone, obs)
        finals = info.get("final_obs")
        if finals is None:
            warnings.warn(
                f"{self.name} restarts within a step and gives no final_obs: values after a time limit are taken from "
                "the observation before it",
                stacklevel=3,
            )
            write_obs(successors, worlds, map_obs(lambda x: x[worlds], self.last))
        else:
            batch = [finals[i] for i in worlds]
            empty = gymnasium.vector.utils.create_empty_array(self.space, n=len(worlds))
            write_obs(successors, worlds, self._obs(gymnasium.vector.utils.concatenate(self.space, batch, empty)))
        return successors

    def _obs(self, obs: Any) -> Obs:
        return to_device(tensors(self.space, obs), self.device, self.dtype)

    def _tensor(self, x: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(x, dtype=dtype, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """A seed for the next reset: gymnasium's environments cannot be saved."""
        return {"seed": seeding.number(self.origin, "resumed")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.origin = self.seed = state["seed"]
