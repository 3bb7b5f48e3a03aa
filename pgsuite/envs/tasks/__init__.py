"""Tasks written once, in torch: observation, reward, termination, reset."""

from pgsuite.envs.tasks.base import Task
from pgsuite.envs.tasks.classic import CartPole, Pendulum
from pgsuite.envs.tasks.mujoco import HalfCheetah, Hopper, InvertedPendulum, Swimmer, Walker2d

__all__ = ["CartPole", "HalfCheetah", "Hopper", "InvertedPendulum", "Pendulum", "Swimmer", "Task", "Walker2d"]
