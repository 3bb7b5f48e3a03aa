"""envpool's environments, stepped by C++ threads, as a VectorEnv."""

from __future__ import annotations

import importlib.metadata
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from pgsuite import seeding, settings
from pgsuite.envs.base import VectorEnvConfig
from pgsuite.envs.gym_env import GymEnv
from pgsuite.errors import counted, install
from pgsuite.settings import Count, WorldThreads, closest
from pgsuite.types import write_obs

UNLIMITED = 2**31 - 1  # envpool's max_episode_steps for episodes without a time limit


@dataclass(kw_only=True, eq=False)
class EnvPool(VectorEnvConfig):
    """An environment of envpool, and its vectorization."""

    backends = ("envpool",)

    id: str = ""  # such as HalfCheetah-v5 or Pong-v5
    max_episode_steps: Count | None = None  # time limit; null takes envpool's own
    threads: WorldThreads = 0  # CPU threads that step the environments; 0 takes every core
    options: dict[str, Any] = field(default_factory=dict)  # the environment's own keyword arguments

    def __post_init__(self) -> None:
        settings.check(self, label="env.")
        if not self.id:
            raise ValueError("env.id must name an environment, such as env.id=HalfCheetah-v5")

    def build(self, num_envs: int, *, device: torch.device, dtype: torch.dtype, seed: int) -> EnvPoolEnv:
        try:
            import envpool  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"env=envpool needs envpool: {install('envpool')} ({error})") from error
        if self.id not in (known := envpool.list_all_envs()):
            raise ValueError(f"envpool has no environment {self.id!r}; {closest(self.id, known)}")
        limit = {} if self.max_episode_steps is None else {"max_episode_steps": self.max_episode_steps}
        try:
            pool: Any = envpool.make_gymnasium(
                self.id,
                num_envs=num_envs,
                batch_size=num_envs,  # all of them step together
                num_threads=self.threads,
                seed=seeding.number(seed, "environment"),
                **limit,
                **self.options,
            )
        except Exception as error:  # envpool defines no exception class
            raise ValueError(f"envpool cannot make {self.id}: {str(error).partition(chr(10))[0]}") from error
        if (players := pool.config["max_num_players"]) > 1:
            raise ValueError(f"{self.id} is for {players} players, and one policy plays here")
        return EnvPoolEnv(pool, name=self.id, device=device, dtype=dtype)

    def peek(self) -> spaces.Space[Any]:
        return self.build(1, device=torch.device("cpu"), dtype=torch.float32, seed=0).observation_space


class Pool(VectorEnv[Any, Any, Any]):
    """envpool's environments as a gymnasium vector environment with autoreset disabled; seeded at construction.

    By default envpool would spend an extra step on each restart.  Some of its environments ignore
    ``max_episode_steps``; this class enforces the limit for all.  If an episode terminates in the very step of its time
    limit, envpool does not report that, and the episode counts as truncated.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, pool: Any) -> None:
        self.pool, self.num_envs, self.limit = pool, pool.config["num_envs"], pool.config["max_episode_steps"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the precision of bounds
            self.single_observation_space, self.single_action_space = pool.observation_space, pool.action_space

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.pool.reset(options=options)
        if options is None:
            self.obs = obs
        else:
            write_obs(self.obs, info["env_id"], obs)
        return self.obs, info

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        self.obs, reward, terminated, truncated, info = self.pool.step(actions)
        return self.obs, reward, terminated, truncated | (info["elapsed_step"] >= self.limit), info


class EnvPoolEnv(GymEnv):
    backend = "envpool"

    def __init__(self, pool: Any, *, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        vec = Pool(pool)
        limit = None if vec.limit >= UNLIMITED else vec.limit
        super().__init__(vec, name=name, max_episode_steps=limit, device=device, dtype=dtype)
        version = importlib.metadata.version("envpool")
        self.description = f"{name} | envpool | {counted(self.num_envs, 'environment')} | is envpool {version}'s"
