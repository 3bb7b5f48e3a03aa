"""The protocol of simulators for MuJoCo tasks."""

from __future__ import annotations

from typing import Any, Protocol

import mujoco
import torch
from torch import Tensor


class Physics(Protocol):
    """N worlds of one model, stepped together.

    ``qpos`` [N, nq], ``qvel`` [N, nv] and ``ctrl`` [N, nu] are views of the simulator's state: may be written in place,
    and are current after each call.
    """

    name: str  # of the back end
    description: str  # back end, precision, threads
    closeness: str  # relation to gymnasium's physics: equals, rounds or approximates
    model: mujoco.MjModel
    num_envs: int
    device: torch.device
    dtype: torch.dtype
    on_host: bool  # whether the tensors are on the host, so that reading them needs no synchronization
    qpos: Tensor
    qvel: Tensor
    ctrl: Tensor
    outputs: dict[str, Tensor]  # requested derived fields [N, ...] by MjData's name, as of the last call

    def step(self, substeps: int) -> None:
        """Advance every world by substeps of the model's time step under ``ctrl``."""
        ...

    def set_state(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        """Set qpos and qvel of the worlds where mask [N] is true, with time and solver warm start at zero."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
