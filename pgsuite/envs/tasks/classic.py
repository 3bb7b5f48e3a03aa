"""gymnasium's classic control tasks in torch, on any device, with fixed shapes and without reads back to the host."""

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

from pgsuite.envs.tasks.base import MirrorTables, Task
from pgsuite.settings import Count


@dataclass(kw_only=True, eq=False)
class ClassicTask(Task):
    """A task with a state vector [N, S]: float64 on a CPU, where it equals gymnasium's, and float32 elsewhere."""

    backends = ("torch",)
    state_size: ClassVar[int]

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        self.dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.state = torch.zeros(num_envs, self.state_size, device=device, dtype=self.dtype)

    def reset(self, mask: Tensor, generator: Generator) -> None:
        self.state = torch.where(mask.unsqueeze(-1), self.initial_state(generator), self.state)

    @abstractmethod
    def initial_state(self, generator: Generator) -> Tensor:
        """Random initial states [N, S]."""

    def describe(self) -> tuple[str, str]:
        verb = "equals" if self.dtype == torch.float64 else "rounds"
        closeness = f"{verb} gymnasium {gymnasium.__version__}" if self.gymnasium_id else ""
        return super().describe()[0], closeness


@dataclass(kw_only=True, eq=False)
class CartPole(ClassicTask):
    """Balance a pole on a cart that is pushed left or right (Barto, Sutton and Anderson, 1983).

    State: position in m, velocity, pole angle in rad, angular velocity.
    """

    gymnasium_id = "CartPole-v1"
    state_size = 4
    max_episode_steps: Count = 500
    sutton_barto_reward: bool = False  # reward -1 for falling and 0 otherwise, instead of 1 each step

    GRAVITY: ClassVar = 9.8
    POLE_MASS: ClassVar = 0.1
    TOTAL_MASS: ClassVar = 1.1
    HALF_LENGTH: ClassVar = 0.5
    FORCE: ClassVar = 10.0
    DT: ClassVar = 0.02
    X_LIMIT: ClassVar = 2.4
    ANGLE_LIMIT: ClassVar = 12 * 2 * math.pi / 360

    @property
    def mirror(self) -> MirrorTables | None:
        return MirrorTables((-1, -2, -3, -4), (2, 1))

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
    max_episode_steps: Count = 200
    g: float = 10.0  # gravity, in m/s^2

    MAX_SPEED: ClassVar = 8.0
    MAX_TORQUE: ClassVar = 2.0
    DT: ClassVar = 0.05

    @property
    def mirror(self) -> MirrorTables | None:
        return MirrorTables((1, -2, -3), (-1,))

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        high = np.array([1.0, 1.0, self.MAX_SPEED], np.float32)
        self.observation_space = spaces.Box(-high, high)
        self.action_space = spaces.Box(-self.MAX_TORQUE, self.MAX_TORQUE, (1,))

    def initial_state(self, generator: Generator) -> Tensor:
        state = torch.empty_like(self.state).uniform_(-1, 1, generator=generator)
        state[:, 0].mul_(math.pi)
        return state

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


@dataclass(kw_only=True, eq=False)
class Acrobot(ClassicTask):
    """Swing the tip of two links above a line by a torque between them (Sutton, 1996).

    State: angle of the first link from hanging and of the second from the first, in rad; their velocities.
    """

    gymnasium_id = "Acrobot-v1"
    state_size = 4
    max_episode_steps: Count = 500

    GRAVITY: ClassVar = 9.8
    DT: ClassVar = 0.2
    MAX_SPEEDS: ClassVar = (4 * math.pi, 9 * math.pi)
    CENTRE: ClassVar = 0.5  # of mass along a link of 1 m, 1 kg and moment of inertia 1

    @property
    def mirror(self) -> MirrorTables | None:
        return MirrorTables((1, -2, 3, -4, -5, -6), (3, 2, 1))

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        high = np.array([1.0, 1.0, 1.0, 1.0, *self.MAX_SPEEDS], np.float32)
        self.observation_space, self.action_space = spaces.Box(-high, high), spaces.Discrete(3)

    def initial_state(self, generator: Generator) -> Tensor:
        return torch.empty_like(self.state).uniform_(-0.1, 0.1, generator=generator)

    def slope(self, state: Tensor, torque: Tensor) -> Tensor:
        """The time derivative of states [N, 4], by the equations of the book (Sutton and Barto), not of the paper."""
        angle, bend, spin, bend_spin = state.unbind(-1)
        c, g, cos, sin = self.CENTRE, self.GRAVITY, bend.cos(), bend.sin()
        d1 = c**2 + (1 + c**2 + 2 * c * cos) + 2
        d2 = c**2 + c * cos + 1
        phi2 = c * g * (angle + bend - math.pi / 2).cos()
        phi1 = -c * bend_spin**2 * sin - 2 * c * bend_spin * spin * sin
        phi1 = phi1 + (c + 1) * g * (angle - math.pi / 2).cos() + phi2
        bend_pull = (torque + d2 / d1 * phi1 - c * spin**2 * sin - phi2) / (c**2 + 1 - d2**2 / d1)
        return torch.stack([spin, bend_spin, -(d2 * bend_pull + phi1) / d1, bend_pull], -1)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        torque, s, half = action.to(self.dtype) - 1, self.state, self.DT / 2
        k1 = self.slope(s, torque)
        k2 = self.slope(s + half * k1, torque)
        k3 = self.slope(s + half * k2, torque)
        k4 = self.slope(s + self.DT * k3, torque)
        angle, bend, spin, bend_spin = (s + self.DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)).unbind(-1)
        angle, bend = wrap(angle), wrap(bend)
        spin, bend_spin = (v.clamp(-m, m) for v, m in zip((spin, bend_spin), self.MAX_SPEEDS, strict=True))
        self.state = torch.stack([angle, bend, spin, bend_spin], -1)
        above = -angle.cos() - (bend + angle).cos() > 1
        return -(~above).to(self.dtype), above

    def observe(self) -> Tensor:
        angle, bend, spin, bend_spin = self.state.unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), bend.cos(), bend.sin(), spin, bend_spin], -1)


def wrap(angle: Tensor) -> Tensor:
    """An angle in rad, at most two turns off, brought to [-pi, pi]."""
    for _ in range(2):
        angle = torch.where(angle > math.pi, angle - 2 * math.pi, angle)
        angle = torch.where(angle < -math.pi, angle + 2 * math.pi, angle)
    return angle


@dataclass(kw_only=True, eq=False)
class MountainCar(ClassicTask):
    """Rock an underpowered car out of a valley (Moore, 1990).  State: position, and velocity per step."""

    gymnasium_id = "MountainCar-v0"
    state_size = 2
    max_episode_steps: Count = 200
    goal_velocity: float = 0.0  # least velocity at the goal that counts as reaching it

    GRAVITY: ClassVar = 0.0025
    FORCE: ClassVar = 0.001
    GOAL: ClassVar = 0.5
    LOW: ClassVar = -1.2
    HIGH: ClassVar = 0.6
    MAX_SPEED: ClassVar = 0.07

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        low, high = (np.array(x, np.float32) for x in ((self.LOW, -self.MAX_SPEED), (self.HIGH, self.MAX_SPEED)))
        self.observation_space, self.action_space = spaces.Box(low, high), self.actions()

    def actions(self) -> spaces.Space[Any]:
        return spaces.Discrete(3)

    def initial_state(self, generator: Generator) -> Tensor:
        state = torch.empty_like(self.state).uniform_(-0.6, -0.4, generator=generator)
        state[:, 1].zero_()
        return state

    def push(self, action: Tensor) -> Tensor:
        """The acceleration by the engine per step [N]."""
        return (action.to(self.dtype) - 1) * self.FORCE

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        position, velocity = self.state.unbind(-1)
        velocity = velocity + self.push(action) - self.GRAVITY * (3 * position).cos()
        velocity = velocity.clamp(-self.MAX_SPEED, self.MAX_SPEED)
        position = (position + velocity).clamp(self.LOW, self.HIGH)
        velocity = torch.where((position == self.LOW) & (velocity < 0), 0.0, velocity)  # the wall on the left
        self.state = torch.stack([position, velocity], -1)
        arrived = (position >= self.GOAL) & (velocity >= self.goal_velocity)
        return self.pay(action, arrived), arrived

    def pay(self, action: Tensor, arrived: Tensor) -> Tensor:
        """Reward [N]."""
        return torch.full_like(self.state[:, 0], -1.0)

    def observe(self) -> Tensor:
        return self.state.clone()


@dataclass(kw_only=True, eq=False)
class MountainCarContinuous(MountainCar):
    """With a throttle instead of three gears.  gymnasium rounds its state to float32 after every step."""

    gymnasium_id = "MountainCarContinuous-v0"
    max_episode_steps: Count = 999

    FORCE: ClassVar = 0.0015
    GOAL: ClassVar = 0.45

    def actions(self) -> spaces.Space[Any]:
        return spaces.Box(-1.0, 1.0, (1,))

    def push(self, action: Tensor) -> Tensor:
        return action.squeeze(-1) * self.FORCE

    def pay(self, action: Tensor, arrived: Tensor) -> Tensor:
        return 100.0 * arrived - 0.1 * action.squeeze(-1) ** 2
