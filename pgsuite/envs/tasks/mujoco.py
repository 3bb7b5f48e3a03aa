"""gymnasium's MuJoCo tasks, version 5, over the Physics protocol.

Options carry gymnasium's names and defaults; the models are the XML files that gymnasium ships.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium import spaces
from torch import Generator, Tensor

from pgsuite.envs.physics.base import Physics
from pgsuite.envs.tasks.base import Task
from pgsuite.settings import Count, NonNegative

ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


def load_model(xml: str) -> mujoco.MjModel:
    """One of gymnasium's models.  MuJoCo's deprecation notices about them, which nobody here can act on, are dropped
    rather than printed and appended to MUJOCO_LOG.TXT in the working directory."""
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        return mujoco.MjModel.from_xml_path(str(ASSETS / xml))
    finally:
        mujoco.set_mju_user_warning(None)


@dataclass(kw_only=True, eq=False)
class MujocoTask(Task):
    """Where the worlds start and how they move; what is rewarded is the subclass's."""

    xml: ClassVar[str]
    backends = ("mujoco",)

    frame_skip: Count = 5
    reset_noise_scale: NonNegative = 0.1

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        from pgsuite.envs.physics.mujoco_batch import BatchPhysics

        self.bind(BatchPhysics(load_model(self.xml), num_envs, threads))

    def bind(self, physics: Physics) -> None:
        """Live in these worlds."""
        self.physics, model = physics, physics.model
        self.num_envs, self.device, self.dtype = physics.num_envs, physics.device, physics.dtype
        self.dt = model.opt.timestep * self.frame_skip  # seconds per step
        self.init_qpos = torch.as_tensor(model.qpos0.copy(), device=self.device, dtype=self.dtype)
        low, high = model.actuator_ctrlrange.astype(np.float32).T
        self.action_space = spaces.Box(low, high)
        self.observation_space = spaces.Box(-np.inf, np.inf, self.observe().shape[1:], np.float64)

    def reset(self, mask: Tensor, generator: Generator) -> None:
        if self.physics.on_host and not bool(mask.any()):
            return
        qpos = self.init_qpos + self.uniform(self.physics.qpos, generator)
        self.physics.set_state(mask, qpos, self.initial_qvel(generator))

    def uniform(self, like: Tensor, generator: Generator) -> Tensor:
        noise = torch.empty_like(like)
        return noise.uniform_(-self.reset_noise_scale, self.reset_noise_scale, generator=generator)

    def initial_qvel(self, generator: Generator) -> Tensor:
        return self.uniform(self.physics.qvel, generator)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        before = self.physics.qpos[:, 0].clone()
        self.physics.ctrl.copy_(action)
        self.physics.step(self.frame_skip)
        return self.judge(action, (self.physics.qpos[:, 0] - before) / self.dt)

    @abstractmethod
    def judge(self, action: Tensor, x_velocity: Tensor) -> tuple[Tensor, Tensor]:
        """Reward [N] and terminated [N] of the step just made, given the mean forward velocity [N] in m/s."""

    def describe(self) -> tuple[str, str]:
        versions = f"gymnasium {gymnasium.__version__} step by step (mujoco {mujoco.__version__})"
        return self.physics.description, f"{self.physics.closeness} {versions}"

    def state_dict(self) -> dict[str, Any]:
        return self.physics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.physics.load_state_dict(state)


@dataclass(kw_only=True, eq=False)
class Locomotion(MujocoTask):
    """Go forward; effort costs."""

    skipped: ClassVar[int] = 1  # leading positions that an observation leaves out

    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    exclude_current_positions_from_observation: bool = True

    def observe(self) -> Tensor:
        first = self.skipped if self.exclude_current_positions_from_observation else 0
        return torch.cat([self.physics.qpos[:, first:], self.observed_qvel()], -1)

    def observed_qvel(self) -> Tensor:
        return self.physics.qvel

    def judge(self, action: Tensor, x_velocity: Tensor) -> tuple[Tensor, Tensor]:
        effort = action.square().sum(-1)
        reward = self.forward_reward_weight * x_velocity - self.ctrl_cost_weight * effort
        return reward, torch.zeros_like(reward, dtype=torch.bool)


@dataclass(kw_only=True, eq=False)
class HalfCheetah(Locomotion):
    gymnasium_id = "HalfCheetah-v5"
    xml = "half_cheetah.xml"

    def initial_qvel(self, generator: Generator) -> Tensor:
        return torch.empty_like(self.physics.qvel).normal_(generator=generator) * self.reset_noise_scale


@dataclass(kw_only=True, eq=False)
class Swimmer(Locomotion):
    gymnasium_id = "Swimmer-v5"
    xml = "swimmer.xml"
    skipped = 2

    frame_skip: Count = 4
    ctrl_cost_weight: float = 1e-4


@dataclass(kw_only=True, eq=False)
class Legged(Locomotion):
    """Locomotion that ends with a fall."""

    frame_skip: Count = 4
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    reset_noise_scale: NonNegative = 5e-3

    def observed_qvel(self) -> Tensor:
        return self.physics.qvel.clamp(-10, 10)

    @abstractmethod
    def healthy(self) -> Tensor:
        """[N] bool."""

    def judge(self, action: Tensor, x_velocity: Tensor) -> tuple[Tensor, Tensor]:
        reward, _ = super().judge(action, x_velocity)
        healthy = self.healthy()
        return reward + self.healthy_reward * healthy, ~healthy & self.terminate_when_unhealthy


def between(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Strictly, so that NaN is not."""
    return (bounds[0] < x) & (x < bounds[1])


@dataclass(kw_only=True, eq=False)
class Hopper(Legged):
    gymnasium_id = "Hopper-v5"
    xml = "hopper.xml"

    healthy_state_range: tuple[float, float] = (-100.0, 100.0)
    healthy_z_range: tuple[float, float] = (0.7, math.inf)
    healthy_angle_range: tuple[float, float] = (-0.2, 0.2)

    def healthy(self) -> Tensor:
        qpos = self.physics.qpos
        state = torch.cat([qpos[:, 2:], self.physics.qvel], -1)
        return (
            between(state, self.healthy_state_range).all(-1)
            & between(qpos[:, 1], self.healthy_z_range)
            & between(qpos[:, 2], self.healthy_angle_range)
        )


@dataclass(kw_only=True, eq=False)
class Walker2d(Legged):
    gymnasium_id = "Walker2d-v5"
    xml = "walker2d_v5.xml"

    healthy_z_range: tuple[float, float] = (0.8, 2.0)
    healthy_angle_range: tuple[float, float] = (-1.0, 1.0)

    def healthy(self) -> Tensor:
        z, angle = self.physics.qpos[:, 1], self.physics.qpos[:, 2]
        return between(z, self.healthy_z_range) & between(angle, self.healthy_angle_range)


@dataclass(kw_only=True, eq=False)
class InvertedPendulum(MujocoTask):
    """Keep the pole up by moving the cart."""

    gymnasium_id = "InvertedPendulum-v5"
    xml = "inverted_pendulum.xml"

    frame_skip: Count = 2
    reset_noise_scale: NonNegative = 0.01

    def observe(self) -> Tensor:
        return torch.cat([self.physics.qpos, self.physics.qvel], -1)

    def judge(self, action: Tensor, x_velocity: Tensor) -> tuple[Tensor, Tensor]:
        obs = self.observe()
        upright = obs.isfinite().all(-1) & (obs[:, 1].abs() <= 0.2)
        return upright.to(obs.dtype), ~upright
