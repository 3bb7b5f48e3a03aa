"""Tasks in torch: observation, reward, termination, reset."""

from pgsuite.envs.tasks.base import Task
from pgsuite.envs.tasks.classic import Acrobot, CartPole, MountainCar, MountainCarContinuous, Pendulum
from pgsuite.envs.tasks.cruise import Cruise
from pgsuite.envs.tasks.memory import TMaze
from pgsuite.envs.tasks.mujoco import (
    Ant,
    HalfCheetah,
    Hopper,
    Humanoid,
    HumanoidStandup,
    InvertedDoublePendulum,
    InvertedPendulum,
    Pusher,
    Reacher,
    Swimmer,
    Walker2d,
)

__all__ = [
    "Acrobot",
    "Ant",
    "CartPole",
    "Cruise",
    "HalfCheetah",
    "Hopper",
    "Humanoid",
    "HumanoidStandup",
    "InvertedDoublePendulum",
    "InvertedPendulum",
    "MountainCar",
    "MountainCarContinuous",
    "Pendulum",
    "Pusher",
    "Reacher",
    "Swimmer",
    "TMaze",
    "Task",
    "Walker2d",
]
