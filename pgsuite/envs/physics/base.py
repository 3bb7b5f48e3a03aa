"""What a MuJoCo task asks of a simulator."""

from __future__ import annotations

from typing import Any, Protocol

import mujoco
import torch
from torch import Tensor


class Physics(Protocol):
    """N worlds of one model, stepped together.

    ``qpos`` [N, nq], ``qvel`` [N, nv] and ``ctrl`` [N, nu] are live views: written in place, current after each call.
    """

    name: str  # of the back end
    description: str  # back end, precision, threads
    closeness: str  # what it does to gymnasium's physics: equals, or approximates
    model: mujoco.MjModel
    num_envs: int
    device: torch.device
    dtype: torch.dtype
    on_host: bool  # whether a look at the tensors costs nothing
    qpos: Tensor
    qvel: Tensor
    ctrl: Tensor
    outputs: dict[str, Tensor]  # derived fields [N, ...] by MjData's name, as of the last call; those asked for

    def step(self, substeps: int) -> None:
        """Advance every world by substeps of the model's time step under ``ctrl``."""
        ...

    def set_state(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        """Put the worlds where mask [N] is true at qpos, qvel, at rest in time, with the solver's memory cleared."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
