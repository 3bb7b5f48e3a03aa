"""Stand-ins for vector environments that live in torch: points to push to the origin of the plane, with the
interfaces that Isaac Lab and ManiSkill document, and with buffers that they write to in place."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

LIMIT = 12


def box(size: int, bound: float = math.inf) -> spaces.Box:
    return spaces.Box(-bound, bound, (size,))


def dynamics(position: Tensor, velocity: Tensor, force: Tensor) -> tuple[Tensor, Tensor]:
    velocity = 0.9 * velocity + 0.2 * force
    return position + 0.2 * velocity, velocity


class IsaacPoints:
    """As Isaac Lab has it: observations in groups, in buffers of its own; final_obs in its extras if ``final``."""

    single_action_space = box(2, 1.0)

    def __init__(
        self,
        num_envs: int,
        device: Any,
        seed: int,
        final: bool = True,
        critic: bool = True,
        max_episode_steps: int = LIMIT,
    ) -> None:
        self.num_envs, self.device, self.final = num_envs, str(device), final
        self.max_episode_length = max_episode_steps
        self.generator = torch.Generator(device).manual_seed(seed)
        groups: dict[str, spaces.Space[Any]] = {"policy": box(4)}
        if critic:
            groups["critic"] = spaces.Dict({"b": box(1), "a": box(4)})
        self.single_observation_space = spaces.Dict(groups)
        self.position, self.velocity = torch.zeros(2, num_envs, 2, device=device)
        self.clock = torch.zeros(num_envs, device=device)
        self.reward = torch.zeros(num_envs, device=device)
        self.terminated, self.timed_out = torch.zeros(2, num_envs, dtype=torch.bool, device=device)
        self.extras: dict[str, Any] = {"log": {}}
        self.buffers, self.finals = self.observe(), self.observe()

    @property
    def unwrapped(self) -> IsaacPoints:
        return self

    def observe(self) -> dict[str, Any]:
        policy = torch.cat([self.position, self.velocity], -1)
        return {"policy": policy, "critic": {"a": policy.clone(), "b": self.clock.unsqueeze(-1).clone()}, "other": None}

    def write(self, buffers: dict[str, Any]) -> dict[str, Any]:
        now = self.observe()
        buffers["policy"].copy_(now["policy"])
        for key, x in now["critic"].items():
            buffers["critic"][key].copy_(x)
        return buffers

    def restart(self, which: Tensor) -> None:
        fresh = torch.empty_like(self.position).uniform_(-1, 1, generator=self.generator)
        self.position.copy_(torch.where(which.unsqueeze(-1), fresh, self.position))
        self.velocity.mul_(~which.unsqueeze(-1))
        self.clock.mul_(~which)

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.generator.manual_seed(seed)
        self.restart(torch.ones_like(self.terminated))
        return self.write(self.buffers), self.extras

    def move(self, action: Tensor) -> None:
        self.reward.copy_(1 - self.position.square().sum(-1))
        position, velocity = dynamics(self.position, self.velocity, action)
        action.zero_()  # it is the environment's to write to
        self.position.copy_(position)
        self.velocity.copy_(velocity)
        self.clock += 1
        self.terminated.copy_(self.position.abs().amax(-1) > 1.2)
        self.timed_out.copy_(self.clock >= self.max_episode_length)  # both may be true

    def step(self, action: Tensor) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        self.move(action)
        done = self.terminated | self.timed_out
        if self.final:
            self.extras["final_obs"] = self.write(self.finals)
        self.restart(done)
        return self.write(self.buffers), self.reward, self.terminated, self.timed_out, self.extras


class SavedPoints(IsaacPoints):
    """One that can be saved, and gives its own tensors away when it is."""

    def state_dict(self) -> dict[str, Any]:
        names = ("position", "velocity", "clock")
        return {name: getattr(self, name) for name in names} | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.velocity, self.clock = state["position"], state["velocity"], state["clock"]
        self.generator.set_state(state["generator"])


class Points(IsaacPoints):
    """Observations are tensors."""

    def __init__(self, num_envs: int, device: Any, seed: int, **options: Any) -> None:
        super().__init__(num_envs, device, seed, **options)
        self.single_observation_space = box(4)

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(seed, options)
        return obs["policy"], info

    def step(self, action: Tensor) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        obs, *rest, info = super().step(action)
        final = {"final_obs": info["final_obs"]["policy"]} if self.final else {}
        return obs["policy"], *rest, final  # pyright: ignore[reportReturnType]


class ManiSkillPoints:
    """As ManiSkillVectorEnv has it, around environments of its own: nested observations, and final_observation in the
    steps in which an episode ended."""

    def __init__(self, num_envs: int, device: Any, seed: int, **options: Any) -> None:
        self._env = IsaacPoints(num_envs, device, seed, final=False, **options)
        self.num_envs, self.single_action_space = num_envs, self._env.single_action_space
        agent = spaces.Dict({"qpos": box(2), "qvel": box(2)})
        self.single_observation_space = spaces.Dict(OrderedDict(extra=spaces.Dict(clock=box(1)), agent=agent))

    @property
    def unwrapped(self) -> IsaacPoints:
        return self._env

    def observe(self) -> dict[str, Any]:
        agent = {"qvel": self._env.velocity, "qpos": self._env.position}
        return {"agent": agent, "extra": {"clock": self._env.clock.unsqueeze(-1)}}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._env.reset(seed)
        return self.observe(), {}

    def step(self, actions: Tensor) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        env, info = self._env, {}
        env.move(actions)
        done = env.terminated | env.timed_out
        if done.any():
            final = self.observe()
            final = {key: {name: x.clone() for name, x in part.items()} for key, part in final.items()}
            env.restart(done)
            info = {"final_observation": final, "_final_observation": done}
        return self.observe(), env.reward, env.terminated, env.timed_out, info
