"""A task with a cost whose optimum under a constraint is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from gymnasium import spaces
from torch import Generator, Tensor

from pgsuite.envs.tasks.base import Task
from pgsuite.settings import Count


@dataclass(kw_only=True, eq=False)
class Cruise(Task):
    """Drive as far as possible on a limited amount of fuel.

    Each episode has a drag p of 1/2, 1 or 2, each as likely, of which the observation is log2 p.  The action is a speed
    v from 0 to 1, the reward is v, and the channel ``cost`` is the fuel p v^2.

    With a mean of at most d fuel for each episode of T steps, the best speed is k / p, where k = sqrt(d / (T E[1/p])),
    since the marginal cost of speed, 2 p v, is then the same in all episodes; the mean return is sqrt(d T E[1/p]), if
    k <= 1/2.  Without the constraint it is T, at a cost of T E[p].  E[p] = E[1/p] = 7/6.
    """

    DRAGS: ClassVar = (0.5, 1.0, 2.0)

    max_episode_steps: Count = 16

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        self.observation_space, self.action_space = spaces.Box(-1.0, 1.0, (1,)), spaces.Box(0.0, 1.0, (1,))
        self.drag = torch.ones(num_envs, device=device)
        self.fuel = torch.zeros(num_envs, device=device)  # of the last step
        self.drags = torch.tensor(self.DRAGS, device=device)

    def reset(self, mask: Tensor, generator: Generator) -> None:
        drawn = torch.empty_like(self.drag).uniform_(0, len(self.DRAGS), generator=generator).long()
        self.drag = torch.where(mask, self.drags[drawn.clamp(max=len(self.DRAGS) - 1)], self.drag)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        speed = action.squeeze(-1)
        self.fuel = self.drag * speed.square()
        return speed, torch.zeros_like(speed, dtype=torch.bool)

    def channels(self) -> dict[str, Tensor]:
        return {"cost": self.fuel}

    def observe(self) -> Tensor:
        return self.drag.log2().unsqueeze(-1)

    def best(self, limit: float) -> float:
        """The best mean return of an episode whose mean cost is at most ``limit``, for limits up to T E[1/p] / 4."""
        return math.sqrt(limit * self.max_episode_steps * sum(1 / p for p in self.DRAGS) / len(self.DRAGS))
