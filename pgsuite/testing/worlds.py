"""Small tasks that are quick to learn, for checks of algorithms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from gymnasium import spaces
from torch import Generator, Tensor

from pgsuite.envs.tasks.base import Task
from pgsuite.settings import Count


@dataclass(kw_only=True, eq=False)
class Point(Task):
    """Push a point to the origin of the plane; the episode terminates if it leaves the square of half-width 2.

    Actions are forces, continuous, or discrete: none, or full force along an axis.  Observations are position and
    velocity.  The channel ``cost`` is one in each step that ends in the right half of the square.
    """

    observation_space = spaces.Box(-float("inf"), float("inf"), (4,))

    max_episode_steps: Count = 12
    actions: Literal["continuous", "discrete"] = "continuous"

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        discrete = self.actions == "discrete"
        self.action_space: spaces.Space[Any] = spaces.Discrete(5) if discrete else spaces.Box(-1.0, 1.0, (2,))
        self.state = torch.zeros(num_envs, 4, device=device)
        self.forces = torch.zeros(5, 2, device=device)
        self.forces[1, 0] = self.forces[2, 1] = 1.0
        self.forces[3, 0] = self.forces[4, 1] = -1.0

    def reset(self, mask: Tensor, generator: Generator) -> None:
        position = torch.empty_like(self.state[:, :2]).uniform_(-1, 1, generator=generator)
        fresh = torch.cat([position, torch.zeros_like(position)], -1)
        self.state = torch.where(mask.unsqueeze(-1), fresh, self.state)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        force = self.forces.index_select(0, action) if self.actions == "discrete" else action
        position, velocity = self.state.chunk(2, -1)
        velocity = 0.8 * velocity + 0.3 * force
        position = position + 0.4 * velocity
        self.state = torch.cat([position, velocity], -1)
        return 1 - position.square().sum(-1), position.abs().amax(-1) > 2

    def channels(self) -> dict[str, Tensor]:
        return {"cost": (self.state[:, 0] > 0).to(self.dtype)}

    def observe(self) -> Tensor:
        return self.state.clone()
