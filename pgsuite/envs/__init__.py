"""Worlds behind one protocol: tensors in, tensors out, true successors, restarts within the step."""

from pgsuite.envs.base import BrokenEnvError, VectorEnv
from pgsuite.envs.gym_env import Gym, GymEnv
from pgsuite.envs.make import make
from pgsuite.envs.task_env import TaskEnv

__all__ = ["BrokenEnvError", "Gym", "GymEnv", "TaskEnv", "VectorEnv", "make"]
