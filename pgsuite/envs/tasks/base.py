"""The base class of tasks.  ``TaskEnv`` adds time limit, restarts and the precision of the interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from gymnasium import spaces
from torch import Generator, Tensor

from pgsuite import settings
from pgsuite.settings import Count

Signed = Sequence[int]  # a signed permutation, counted from 1: entry i is j or -j if mirrored x[i] is x[j] or -x[j]


class MirrorTables(NamedTuple):
    """The signed permutations of a mirror symmetry: of the components of an observation, and of those of an action or
    of the discrete actions."""

    observation: Signed
    action: Signed


@dataclass(kw_only=True, eq=False)
class Task(ABC):
    """N copies of one world, as tensors.  Options are the dataclass fields; ``place`` allocates the worlds on a device.

    A subclass defines the observation (``observe``), reward and termination (``advance``), the initial states
    (``reset``) and the two spaces; a task whose state is tensors allocates them in ``place``.  Everything else has a
    default.  Costs, and rewards that are learned apart, are its ``channels``.

    So that a task can be compiled and captured, its code must not read tensors back to the host and must not make
    shapes that depend on data, unless its back end is on the host; what changes from step to step must be tensors.
    """

    gymnasium_id: ClassVar[str] = ""  # the equivalent environment of gymnasium, if there is one
    backends: ClassVar[tuple[str, ...]] = ("torch",)

    max_episode_steps: Count = 1000  # time limit: episodes are truncated there

    num_envs: int = field(init=False)
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)  # of the physics
    observation_space: spaces.Space[Any] = field(init=False)
    action_space: spaces.Space[Any] = field(init=False)

    def __post_init__(self) -> None:
        settings.check(self)
        # Also if a subclass redeclares it with another type.
        settings.require(Count, self.max_episode_steps, f"{type(self).__name__}.max_episode_steps")

    @property
    def mirror(self) -> MirrorTables | None:
        """A mirror symmetry of observations, dynamics, reward, termination and initial states; None without one."""
        return None

    @property
    def name(self) -> str:
        return self.gymnasium_id or type(self).__name__

    def preferred(self, device: torch.device) -> str:
        """The back end that ``auto`` chooses on a device."""
        return self.backends[0]

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        """Allocate N worlds with a back end, and set the attributes above that depend on it.  By default, float32."""
        self.num_envs, self.device, self.dtype = num_envs, device, torch.float32

    @abstractmethod
    def reset(self, mask: Tensor, generator: Generator) -> None:
        """Set the worlds where mask [N] is true to initial states."""

    @property
    def on_host(self) -> bool:
        """Whether the tensors are on the host, so that reading them needs no synchronization."""
        return False

    def simulate(self, action: Tensor) -> None:
        """The part of a step with action [N, *A] that is not tensor arithmetic, such as physics."""

    @abstractmethod
    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of the step: reward [N] and terminated [N]."""

    def channels(self) -> dict[str, Tensor]:
        """Costs, or rewards beside the reward, by name: [N] each, of the step that ``advance`` has just completed.
        Called before the first reset too, for the names, which are always the same."""
        return {}

    @abstractmethod
    def observe(self) -> Tensor:
        """The observation [N, *O] of the current states, in new memory."""

    def describe(self) -> tuple[str, str]:
        """Back end with precision, and closeness to gymnasium, which is empty without a counterpart there."""
        return f"torch {str(self.dtype).removeprefix('torch.')}", ""

    def state_dict(self) -> dict[str, Any]:
        """A copy of the complete state.  By default, every attribute that is a tensor."""
        return {name: x.clone() for name, x in vars(self).items() if isinstance(x, Tensor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, writing to the existing tensors in place."""
        for name, x in state.items():
            getattr(self, name).copy_(x)
