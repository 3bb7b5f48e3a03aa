"""MuJoCo's own C batch stepper: many worlds on a pool of threads, float64, bit for bit a loop over single worlds."""

from __future__ import annotations

import os
from typing import Any

import mujoco
import torch
from mujoco import batch
from torch import Tensor


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BatchPhysics:
    """N worlds of one model on ``threads`` CPU threads; 0 takes every core this process may use."""

    name = "mujoco"
    on_host = True

    def __init__(self, model: mujoco.MjModel, num_envs: int, threads: int = 0) -> None:
        self.model, self.num_envs = model, num_envs
        self.device, self.dtype = torch.device("cpu"), torch.float64
        threads = threads or usable_cores()
        self.batch = batch.Batch(model, nsim=num_envs, nthread=threads)
        self.description = f"mujoco.batch float64, {threads} thread{'s' if threads > 1 else ''}"
        self.closeness = "equals"
        self.qpos, self.qvel, self.ctrl, self.warmstart, self.time = (
            torch.from_numpy(self.batch.bind(field)) for field in ("qpos", "qvel", "ctrl", "qacc_warmstart", "time")
        )

    def step(self, substeps: int) -> None:
        self.batch.step(nstep=substeps)

    def set_state(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        worlds = mask.nonzero().squeeze(1)
        self.batch.reset(worlds.numpy(), stage=int(mujoco.mjtStage.mjSTAGE_NONE))
        self.qpos[worlds], self.qvel[worlds] = qpos[worlds], qvel[worlds]
        self.batch.forward(worlds.numpy())

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in ("qpos", "qvel", "ctrl", "warmstart", "time")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)
