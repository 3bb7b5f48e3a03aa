"""Tasks that need a memory, in torch, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from gymnasium import spaces
from torch import Generator, Tensor

from pgsuite.envs.tasks.base import Task
from pgsuite.settings import Count


@dataclass(kw_only=True, eq=False)
class TMaze(Task):
    """Remember on which side the reward is, from the first observation until the junction at the end of a corridor
    (Bakker, 2002).

    Observation: 011 or 110 at the start, for a reward north or south of the junction; 101 in the corridor, 010 at the
    junction.  Actions: north, east, south, west.  Reward 4 for the right turn at the junction, -0.1 for the wrong one
    and for a step into a wall, 0 otherwise.  A turn at the junction ends the episode.  Without a memory, the best mean
    return is 1.95.
    """

    length: Count = 20  # steps from the start to the junction

    NORTH: ClassVar = 0
    EAST: ClassVar = 1
    SOUTH: ClassVar = 2
    WEST: ClassVar = 3

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        self.observation_space, self.action_space = spaces.Box(0.0, 1.0, (3,)), spaces.Discrete(4)
        self.position = torch.zeros(num_envs, dtype=torch.long, device=device)
        self.north = torch.zeros(num_envs, dtype=torch.bool, device=device)  # where the reward is

    def reset(self, mask: Tensor, generator: Generator) -> None:
        side = torch.randint(2, self.position.shape, generator=generator, device=self.device) == 1
        self.position = torch.where(mask, 0, self.position)
        self.north = torch.where(mask, side, self.north)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        turns = (action == self.NORTH) | (action == self.SOUTH)
        over = turns & (self.position == self.length)
        right = over & ((action == self.NORTH) == self.north)
        moved = self.position + (action == self.EAST).long() - (action == self.WEST).long()
        inside = moved.clamp(0, self.length)
        wall = (turns & ~over) | (moved != inside)
        self.position = inside
        return 4.0 * right - 0.1 * (wall | (over & ~right)), over

    def observe(self) -> Tensor:
        start, junction = self.position == 0, self.position == self.length
        left = torch.where(start, ~self.north, ~junction)
        middle = start | junction
        right = torch.where(start, self.north, ~junction)
        return torch.stack([left, middle, right], -1).to(self.dtype)
