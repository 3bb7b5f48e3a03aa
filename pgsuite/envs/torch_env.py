"""Vector environments of torch tensors, such as those of Isaac Lab and ManiSkill."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from pgsuite import seeding, settings
from pgsuite.components import make_object
from pgsuite.envs.base import VectorEnvConfig, broken_env
from pgsuite.envs.spaces import ToSpace, tensor_space, tensors, to_device
from pgsuite.errors import counted
from pgsuite.settings import Count
from pgsuite.types import PRIVILEGED, Obs, Step, choose, map_obs

GROUPS = {"policy": "policy", PRIVILEGED: "critic"}  # our names, and Isaac Lab's


@dataclass(kw_only=True, eq=False)
class TorchNative(VectorEnvConfig):
    """The function that makes the environments, and its arguments."""

    backends = ("torch-native",)

    entry: str = ""  # such as my_package:make_env; called with num_envs, device, seed and the options, by keyword
    max_episode_steps: Count | None = None  # time limit, passed to the environments; null takes theirs
    channels: list[str] = field(default_factory=list)  # costs, or rewards beside the reward, in the infos: [cost]
    options: dict[str, Any] = field(default_factory=dict)  # further keyword arguments of env.entry

    def __post_init__(self) -> None:
        settings.check(self, label="env.")
        if not all(self.entry.partition(":")):
            raise ValueError(f"env.entry must be a callable in a package, my_package:make_env, got {self.entry!r}")

    def build(self, num_envs: int, *, device: torch.device, dtype: torch.dtype, seed: int) -> TorchNativeEnv:
        limit = {} if self.max_episode_steps is None else {"max_episode_steps": self.max_episode_steps}
        number = seeding.number(seed, "environment")
        arguments = {"num_envs": num_envs, "device": device, "seed": number, **limit, **self.options}
        made = make_object(self.entry, "env.entry", **arguments)
        about = {"name": self.entry, "channels": self.channels, **limit}
        env = TorchNativeEnv(made, device=device, dtype=dtype, seed=number, **about)
        if env.num_envs != num_envs:
            raise ValueError(f"env.entry={self.entry} made {env.num_envs} environments, not {num_envs}")
        return env


class TorchNativeEnv:
    """Environments that take and return tensors, and restart within the step that ends an episode.

    They have ``num_envs``, ``single_observation_space`` and ``single_action_space``.  ``reset`` returns observations
    and a dictionary, and ``step`` gymnasium's five values, with the true successor states in the last under
    ``final_obs`` or ``final_observation``.  Results are copied, so the environments may reuse their buffers.

    Of Isaac Lab's observation groups, ``policy`` is the input of both networks, unless ``critic`` provides that of the
    critic; see ``spaces`` for the conversion.
    """

    backend = "torch-native"

    def __init__(
        self,
        env: Any,
        *,
        name: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
        max_episode_steps: int | None = None,
        channels: Sequence[str] = (),
    ) -> None:
        self.channels = tuple(channels)
        self.env, self.name, self.device, self.dtype, self.seed = env, name, device, dtype, seed
        self.origin = seed or 0
        for required in ("num_envs", "single_observation_space", "single_action_space"):
            if find(env, required) is None:
                raise ValueError(f"{name} is no vector environment: it has no {required}")
        mode = (find(env, "metadata") or {}).get("autoreset_mode")
        if mode is not None and AutoresetMode(mode) is not AutoresetMode.SAME_STEP:
            raise ValueError(f"{name} must restart within the step that ends an episode, not with {mode}")
        self.num_envs: int = find(env, "num_envs")
        self.space, self.action_space = find(env, "single_observation_space"), find(env, "single_action_space")
        self.groups: dict[str, str] = {}
        if isinstance(self.space, spaces.Dict) and "policy" in self.space.spaces:
            self.groups = {ours: theirs for ours, theirs in GROUPS.items() if theirs in self.space.spaces}
            self.space = spaces.Dict({ours: self.space[theirs] for ours, theirs in self.groups.items()})
        self.observation_space: spaces.Space[Any] = tensor_space(self.space)
        self.lives_on = torch.device(find(env, "device") or device)
        self.to_space = ToSpace(self.action_space).to(self.lives_on)
        limit = max_episode_steps or find(env, "max_episode_length", "max_episode_steps", "_max_episode_steps")
        limit = limit or getattr(find(env, "spec"), "max_episode_steps", None)
        self.max_episode_steps = None if limit is None else int(limit)
        kind = type(getattr(env, "unwrapped", env)).__name__
        self.description = f"{name} | torch-native, {kind} | {counted(self.num_envs, 'environment')}"
        self.steps = 0
        self.last: Obs = None
        self.knows = False  # whether it is known if true successors are given

    def reset(self) -> Obs:
        seed, self.seed = self.seed, None  # for the first reset only; later ones continue the environments' generators
        with broken_env(f"{self.name} failed to reset:"):
            obs, _ = self.env.reset(seed=seed)
            self.last = self._obs(obs)
        return self.last

    def step(self, action: Tensor) -> Step:
        self.steps += 1
        with broken_env(f"{self.name} at its step {self.steps} raised"):
            obs, reward, terminated, truncated, info = self.env.step(self._action(action))
            new, reward = self._obs(obs), self._cells(reward, self.dtype)
            terminated, truncated = self._cells(terminated, torch.bool), self._cells(truncated, torch.bool)
            final = info.get("final_obs", info.get("final_observation"))
            channels = {name: self._cells(info[name], self.dtype) for name in self.channels} or None
            successors = self.last if final is None else self._obs(final)
        truncated &= ~terminated
        done = terminated | truncated
        if not self.knows:
            self._learn(final is not None, done)
        self.last = new
        successors = choose(done, successors, new)
        return Step(new, successors, reward, terminated, truncated, channels=channels)

    def _learn(self, given: bool, done: Tensor) -> None:
        """Find out whether true successors are given.  Some environments give none in steps without an episode end, so
        one bit is read back in each step until an episode has ended."""
        self.knows = given or bool(done.any())
        if self.knows and not given:
            warnings.warn(
                f"{self.name} restarts within a step and gives no final_obs: values after a time limit are taken from "
                "the observation before it (Isaac Lab gives them with compute_final_obs=True)",
                stacklevel=3,
            )

    def _action(self, action: Tensor) -> Any:
        """The actions for the environments, in new memory."""
        return self.to_space.elements(action.to(self.lives_on))

    def _obs(self, obs: Any) -> Obs:
        if self.groups:
            obs = {ours: obs[theirs] for ours, theirs in self.groups.items()}
        return to_device(tensors(self.space, obs), self.device, self.dtype)

    def _cells(self, x: Any, dtype: torch.dtype) -> Tensor:
        """[N] in new memory."""
        return torch.as_tensor(x).reshape(self.num_envs).to(self.device, dtype, copy=True)

    @property
    def is_resumable(self) -> bool:
        """True for environments with ``state_dict`` and ``load_state_dict``."""
        return find(self.env, "state_dict") is not None and find(self.env, "load_state_dict") is not None

    def state_dict(self) -> dict[str, Any]:
        if not self.is_resumable:
            return {"seed": seeding.number(self.origin, "resumed")}
        return {"env": copy.deepcopy(find(self.env, "state_dict")()), "last": self.last, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]
        if not self.is_resumable:
            self.origin = state["seed"]
            return
        find(self.env, "load_state_dict")(copy.deepcopy(state["env"]))
        self.last = state["last"]
        if self.last is not None:
            self.last = map_obs(lambda x: x.to(self.device), self.last)


def find(env: Any, *names: str) -> Any:
    """The value of the first of these attributes that the environment, or one that it wraps, has; None without."""
    while env is not None:
        for name in names:
            if (value := getattr(env, name, None)) is not None:
                return value
        inner = (getattr(env, name, None) for name in ("env", "_env", "unwrapped"))
        env = next((x for x in inner if x is not None and x is not env), None)
    return None
