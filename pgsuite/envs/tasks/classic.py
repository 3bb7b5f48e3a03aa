"""gymnasium's classic control in pure torch, on any device, with fixed shapes and nothing read back to the host."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Generator, Tensor

from pgsuite.envs.tasks.base import Task


@dataclass(kw_only=True, eq=False)
class ClassicTask(Task):
    """A state [N, S] of few numbers: float64 on a CPU, where it equals gymnasium's, and float32 elsewhere."""

    backends = ("torch",)
    state_size: ClassVar[int]

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        self.num_envs, self.device = num_envs, device
        self.dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.state = torch.zeros(num_envs, self.state_size, device=device, dtype=self.dtype)

    def reset(self, mask: Tensor, generator: Generator) -> None:
        self.state = torch.where(mask.unsqueeze(-1), self.initial_state(generator), self.state)

    @abstractmethod
    def initial_state(self, generator: Generator) -> Tensor:
        """Fresh states [N, S]."""

    def describe(self) -> tuple[str, str]:
        verb = "equals" if self.dtype == torch.float64 else "rounds"
        return f"torch {str(self.dtype).removeprefix('torch.')}", f"{verb} gymnasium {gymnasium.__version__}"

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state.copy_(state["state"])


@dataclass(kw_only=True, eq=False)
class CartPole(ClassicTask):
    """Balance a pole on a cart that is pushed left or right (Barto, Sutton and Anderson, 1983).

    State: position in m, velocity, pole angle in rad, angular velocity.
    """

    gymnasium_id = "CartPole-v1"
    state_size = 4
    max_episode_steps: int = 500
    sutton_barto_reward: bool = False

    GRAVITY: ClassVar = 9.8
    POLE_MASS: ClassVar = 0.1
    TOTAL_MASS: ClassVar = 1.1
    HALF_LENGTH: ClassVar = 0.5
    FORCE: ClassVar = 10.0
    DT: ClassVar = 0.02
    X_LIMIT: ClassVar = 2.4
    ANGLE_LIMIT: ClassVar = 12 * 2 * math.pi / 360

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        high = np.array([2 * self.X_LIMIT, np.inf, 2 * self.ANGLE_LIMIT, np.inf], np.float32)
        self.observation_space, self.action_space = spaces.Box(-high, high), spaces.Discrete(2)

    def initial_state(self, generator: Generator) -> Tensor:
        return torch.empty_like(self.state).uniform_(-0.05, 0.05, generator=generator)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        x, velocity, angle, spin = self.state.unbind(-1)
        cos, sin, mass_length = angle.cos(), angle.sin(), self.POLE_MASS * self.HALF_LENGTH
        force = torch.where(action == 1, self.FORCE, -self.FORCE)
        push = (force + mass_length * spin.square() * sin) / self.TOTAL_MASS
        swing = (self.GRAVITY * sin - cos * push) / (
            self.HALF_LENGTH * (4.0 / 3.0 - self.POLE_MASS * cos.square() / self.TOTAL_MASS)
        )
        acceleration = push - mass_length * swing * cos / self.TOTAL_MASS
        x, velocity = x + self.DT * velocity, velocity + self.DT * acceleration
        angle, spin = angle + self.DT * spin, spin + self.DT * swing
        self.state = torch.stack([x, velocity, angle, spin], -1)
        fallen = (x.abs() > self.X_LIMIT) | (angle.abs() > self.ANGLE_LIMIT)
        alive = torch.ones_like(x)
        return (-fallen.to(x.dtype) if self.sutton_barto_reward else alive), fallen

    def observe(self) -> Tensor:
        return self.state.clone()


@dataclass(kw_only=True, eq=False)
class Pendulum(ClassicTask):
    """Swing up and hold a pendulum.  State: angle from upright in rad, angular velocity in rad/s."""

    gymnasium_id = "Pendulum-v1"
    state_size = 2
    max_episode_steps: int = 200
    g: float = 10.0

    MAX_SPEED: ClassVar = 8.0
    MAX_TORQUE: ClassVar = 2.0
    DT: ClassVar = 0.05

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        high = np.array([1.0, 1.0, self.MAX_SPEED], np.float32)
        self.observation_space = spaces.Box(-high, high)
        self.action_space = spaces.Box(-self.MAX_TORQUE, self.MAX_TORQUE, (1,))

    def initial_state(self, generator: Generator) -> Tensor:
        unit = torch.empty_like(self.state).uniform_(-1, 1, generator=generator)
        return unit * unit.new_tensor([math.pi, 1.0])

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        angle, spin = self.state.unbind(-1)
        torque = action.squeeze(-1)
        from_top = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = from_top**2 + 0.1 * spin**2 + 0.001 * torque**2
        spin = spin + (3 * self.g / 2 * angle.sin() + 3.0 * torque) * self.DT
        spin = spin.clamp(-self.MAX_SPEED, self.MAX_SPEED)
        self.state = torch.stack([angle + spin * self.DT, spin], -1)
        return -cost, torch.zeros_like(cost, dtype=torch.bool)

    def observe(self) -> Tensor:
        angle, spin = self.state.unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), spin], -1)
