"""A task as a vector environment: clipping of actions, time limit, restarts within the step, precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from pgsuite import seeding
from pgsuite.envs.tasks.base import Task
from pgsuite.errors import counted
from pgsuite.kernel import Kernel
from pgsuite.transfer import HostLink
from pgsuite.types import Step


class TaskEnv:
    """A task as a VectorEnv, with tensors of ``dtype`` on ``device``, whatever its back end uses."""

    is_resumable = True

    def __init__(self, task: Task, *, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.task, self.device, self.dtype = task, device, dtype
        self.name, self.num_envs, self.max_episode_steps = (
            task.name,
            task.num_envs,
            task.max_episode_steps,
        )
        self.observation_space, self.action_space = task.observation_space, task.action_space
        self.channels = tuple(task.channels())
        how, closeness = task.describe()
        self.backend = how.split()[0].split(".")[0]
        said = (self.name, how, counted(self.num_envs, "environment"), closeness)
        self.description = " | ".join(filter(None, said))
        self.generator = seeding.generator(seed, "environment", task.device)
        self.draws: AbstractContextManager[Any] = nullcontext()  # around what draws from the generator
        self.link = HostLink(device) if task.device != device else None  # else nothing is copied
        self.step_task = Kernel("step task", self._step_task)
        self.clock = torch.zeros(self.num_envs, dtype=torch.long, device=task.device)
        self.bounds: tuple[Tensor, Tensor] | None = None
        if isinstance(self.action_space, spaces.Box):
            low, high = (torch.as_tensor(x) for x in (self.action_space.low, self.action_space.high))
            self.bounds = (low.to(task.device, task.dtype), high.to(task.device, task.dtype))

    def reset(self) -> Tensor:
        return self.reset_where(torch.ones_like(self.clock, dtype=torch.bool))

    def reset_where(self, mask: Tensor) -> Tensor:
        """Restart the environments where mask [N] is true; returns obs [N, *O] of all."""
        self.restart(mask)
        self.clock.masked_fill_(mask, 0)
        obs = self._observe()
        return obs if self.link is None else self.link.to_device(obs)

    def restart(self, mask: Tensor) -> None:
        """Set the worlds where mask [N] is true to random initial states."""
        with self.draws:
            self.task.reset(mask, self.generator)

    def step(self, action: Tensor) -> Step:
        if self.link is not None:
            action = self.link.to_host(action)
        if self.bounds is not None:
            action = action.to(self.task.dtype).clamp(*self.bounds)
        self.task.simulate(action)
        step = self.step_task(action)
        if not self.task.on_host or bool(step.done.any()):
            self.restart(step.done)
            step = step._replace(obs=self._observe())
        return step if self.link is None else self.link.step_to_device(step)

    def _step_task(self, action: Tensor) -> Step:
        """The transition after the simulation of a step, before any restart, on the task's device."""
        reward, terminated = self.task.advance(action)
        channels = {name: x.to(self.dtype) for name, x in self.task.channels().items()} or None
        next_obs = self._observe()
        self.clock += 1
        truncated = (self.clock >= self.max_episode_steps) & ~terminated
        self.clock.masked_fill_(terminated | truncated, 0)
        return Step(next_obs, next_obs, reward.to(self.dtype), terminated, truncated, channels=channels)

    def _observe(self) -> Tensor:
        return self.task.observe().to(self.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {
            "task": self.task.state_dict(),
            "clock": self.clock.clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.task.load_state_dict(state["task"])
        self.clock.copy_(state["clock"])
        self.generator.set_state(state["generator"])
