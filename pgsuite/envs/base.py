"""What the suite asks of a world."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import torch
from gymnasium import spaces
from torch import Tensor

from pgsuite.types import Obs, Step


class BrokenEnvError(RuntimeError):
    """An environment broke; says which, when and how."""


class NotFiniteError(BrokenEnvError):
    """One gave what is no number, and can be restarted."""


class VectorEnv(Protocol):
    """N synchronized environments whose tensors never leave the device.

    Actions outside a Box are clipped to it.  A finished environment restarts within the step that finished it, and
    that step reports the true successor; one that needs a step of its own for restarting says so in that step's mask.
    Environments that one kind of ``Collector`` alone can collect from may name that class as their ``collector``.
    """

    name: str
    backend: str  # such as mujoco or torch
    description: str  # one line: backend, precision, closeness to gymnasium
    num_envs: int
    device: torch.device
    observation_space: spaces.Space[Any]  # of one environment
    action_space: spaces.Space[Any]  # of one environment

    @property
    def is_resumable(self) -> bool:
        """Whether ``state_dict`` holds everything that the future depends on.  If not, ``load_state_dict`` gives the
        next ``reset`` a seed that was never used, and no more."""
        ...

    @property
    def max_episode_steps(self) -> int | None:
        """None where episodes have no limit."""
        ...

    def reset(self) -> Obs:
        """Restart every environment; obs [N, *O]."""
        ...

    def step(self, action: Tensor) -> Step:
        """One step in every environment with action [N, *A]."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class VectorEnvConfig(ABC):
    """The settings of environments that somebody else vectorizes, and how to make them."""

    backends: ClassVar[tuple[str, ...]]

    @abstractmethod
    def build(self, num_envs: int, *, device: torch.device, dtype: torch.dtype, seed: int) -> VectorEnv:
        """N environments, with tensors of ``dtype`` on ``device``.  Raises ValueError for what cannot be made."""
