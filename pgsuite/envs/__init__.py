"""Vector environments of tensors, which report true successor states and restart within the step."""

from pgsuite.envs.atari import Atari
from pgsuite.envs.base import BrokenEnvError, VectorEnv
from pgsuite.envs.envpool_env import EnvPool
from pgsuite.envs.gym_env import Gym, GymEnv
from pgsuite.envs.make import make
from pgsuite.envs.task_env import TaskEnv
from pgsuite.envs.torch_env import TorchNative, TorchNativeEnv

__all__ = [
    "Atari",
    "BrokenEnvError",
    "EnvPool",
    "Gym",
    "GymEnv",
    "TaskEnv",
    "TorchNative",
    "TorchNativeEnv",
    "VectorEnv",
    "make",
]
