"""The protocol of vector environments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from gymnasium import spaces
from torch import Tensor

from pgsuite.errors import place, reason
from pgsuite.types import Obs, Step


class BrokenEnvError(RuntimeError):
    """An environment failed; the message names the environment, the step and the error."""


class NotFiniteError(BrokenEnvError):
    """An environment returned a non-finite number; training can recover by a restart."""


@contextmanager
def broken_env(what: str) -> Iterator[None]:
    """Raise BrokenEnvError in place of exceptions: the user's file and line, ``what`` and the exception.  A
    BrokenEnvError is raised as it is."""
    try:
        yield
    except BrokenEnvError:
        raise
    except (Exception, SystemExit) as error:
        raise BrokenEnvError(f"{place(error)}{what} {reason(error)}") from error


class VectorEnv(Protocol):
    """N synchronized environments whose tensors stay on the device.

    Actions outside a Box are clipped to it.  When an episode ends, the environment restarts within the same step, which
    still reports the true successor state; a step that only restarts an environment is masked in ``Step.mask``.
    Environments that need a particular ``Collector`` class name it as their attribute ``collector``, and those whose
    steps have channels name these as their attribute ``channels``.
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
        """Whether ``state_dict`` holds the complete state of the environments.  If not, ``load_state_dict`` only gives
        the next ``reset`` a new seed."""
        ...

    @property
    def max_episode_steps(self) -> int | None:
        """The time limit of episodes in steps; None if there is none."""
        ...

    def reset(self) -> Obs:
        """Restart every environment; returns obs [N, *O]."""
        ...

    def step(self, action: Tensor) -> Step:
        """Step every environment once with action [N, *A]."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def channels_of(env: VectorEnv) -> tuple[str, ...]:
    """The names of the channels of an environment's steps."""
    return tuple(getattr(env, "channels", ()))


class VectorEnvConfig(ABC):
    """Settings of environments from another library that are already vectorized, and their construction."""

    backends: ClassVar[tuple[str, ...]]

    @abstractmethod
    def build(self, num_envs: int, *, device: torch.device, dtype: torch.dtype, seed: int) -> VectorEnv:
        """Make N environments with tensors of ``dtype`` on ``device``.  Raises ValueError if that is impossible."""

    def peek(self) -> spaces.Space[Any] | None:
        """The space of observations as tensors, where it can be seen without the environments of the run.  Raises
        ValueError as ``build`` does."""
        return None
