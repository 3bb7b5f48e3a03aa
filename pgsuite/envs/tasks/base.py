"""What a task owes ``TaskEnv``, which adds the clock, restarts and precision of the outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from torch import Generator, Tensor

from pgsuite import settings
from pgsuite.settings import Count


@dataclass(kw_only=True, eq=False)
class Task(ABC):
    """N copies of one world, in tensors.  Options are the dataclass fields; ``place`` gives it a device.

    A subclass says what is observed (``observe``), paid and terminated (``advance``), how worlds start (``reset``), and
    which two spaces it has; one whose worlds are tensors makes them in ``place``.  Everything else has a default.

    Code of a task neither reads tensors back to the host nor makes shapes that depend on data, unless its back end
    lives on the host, so that it can be captured and compiled.
    """

    gymnasium_id: ClassVar[str] = ""  # the environment that it is equal to, if there is one
    backends: ClassVar[tuple[str, ...]] = ("torch",)

    max_episode_steps: Count = 1000  # time limit: episodes are truncated there

    num_envs: int = field(init=False)
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)  # of the physics
    observation_space: spaces.Space[Any] = field(init=False)
    action_space: spaces.Space[Any] = field(init=False)

    def __post_init__(self) -> None:
        settings.check(self)
        settings.require(Count, self.max_episode_steps, f"{type(self).__name__}.max_episode_steps")  # as redeclared too

    @property
    def name(self) -> str:
        return self.gymnasium_id or type(self).__name__

    def preferred(self, device: torch.device) -> str:
        """The back end that auto stands for on a device."""
        return self.backends[0]

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        """Set up N worlds with a back end, and the attributes above that depend on it.  By default, float32."""
        self.num_envs, self.device, self.dtype = num_envs, device, torch.float32

    @abstractmethod
    def reset(self, mask: Tensor, generator: Generator) -> None:
        """Start afresh the worlds where mask [N] is true."""

    @property
    def on_host(self) -> bool:
        """Whether a look at its tensors costs nothing."""
        return False

    def simulate(self, action: Tensor) -> None:
        """What of a step with action [N, *A] is no tensor arithmetic."""

    @abstractmethod
    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of the step: reward [N] and terminated [N]."""

    @abstractmethod
    def observe(self) -> Tensor:
        """The observation [N, *O] of where the worlds stand, in memory of its own."""

    def describe(self) -> tuple[str, str]:
        """Back end with precision, and closeness to gymnasium; empty for a world of one's own."""
        return f"torch {str(self.dtype).removeprefix('torch.')}", ""

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on, copied.  By default, every tensor that is an attribute."""
        return {name: x.clone() for name, x in vars(self).items() if isinstance(x, Tensor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, written into the tensors that are there."""
        for name, x in state.items():
            getattr(self, name).copy_(x)
