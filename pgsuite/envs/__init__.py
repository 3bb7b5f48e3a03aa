"""Worlds behind one protocol: tensors in, tensors out, true successors, restarts within the step."""

from pgsuite.envs.base import VectorEnv
from pgsuite.envs.make import make
from pgsuite.envs.task_env import TaskEnv

__all__ = ["TaskEnv", "VectorEnv", "make"]
