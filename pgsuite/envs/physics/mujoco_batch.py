"""MuJoCo's batch stepper in C: many worlds on a thread pool, in float64, bit for bit equal to a loop over worlds."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import mujoco
import torch
from mujoco import batch
from torch import Tensor

from pgsuite import distributed
from pgsuite.errors import counted


def usable_cores() -> int:
    """The number of cores for this process, if several processes share the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // distributed.local_size())


class BatchPhysics:
    """N worlds of one model on ``threads`` CPU threads; 0 takes every core of this process.

    ``outputs`` are derived fields of MjData.  After a step they are one substep older than qpos, as in gymnasium.
    cfrc_ext, the contact force on each body, is not part of MuJoCo's step; as in gymnasium it is computed after each
    step, and is zero after a reset.
    """

    name = "mujoco"
    on_host = True

    def __init__(self, model: mujoco.MjModel, num_envs: int, threads: int = 0, outputs: Collection[str] = ()) -> None:
        self.model, self.num_envs = model, num_envs
        self.device, self.dtype = torch.device("cpu"), torch.float64
        threads = threads or usable_cores()
        self.contact_forces = "cfrc_ext" in outputs
        self.batch = batch.Batch(model, nsim=num_envs, nthread=threads, persistent=self.contact_forces)
        self.description = f"mujoco.batch float64, {counted(threads, 'thread')}"
        self.closeness = "equals"
        self.qpos, self.qvel, self.ctrl, self.warmstart, self.time = (
            torch.from_numpy(self.batch.bind(field)) for field in ("qpos", "qvel", "ctrl", "qacc_warmstart", "time")
        )

        self.derived = {name: self.batch.bind(name) for name in outputs if name != "cfrc_ext"}
        self.outputs = {name: torch.from_numpy(x.copy()) for name, x in self.derived.items()}
        if self.contact_forces:
            self.outputs["cfrc_ext"] = torch.zeros(num_envs, model.nbody, 6, dtype=self.dtype)
            self.scratch = mujoco.MjData(model)

    def step(self, substeps: int) -> None:
        self.batch.step(nstep=substeps)
        self.copy_outputs()
        if self.contact_forces:
            forces = self.outputs["cfrc_ext"].numpy()
            for i in range(self.num_envs):
                self.batch.get_data(i, self.scratch)
                mujoco.mj_rnePostConstraint(self.model, self.scratch)
                forces[i] = self.scratch.cfrc_ext

    def set_state(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        worlds = mask.nonzero().squeeze(1)
        self.batch.reset(worlds.numpy(), stage=int(mujoco.mjtStage.mjSTAGE_NONE))
        self.qpos[worlds], self.qvel[worlds] = qpos[worlds], qvel[worlds]
        self.batch.forward(worlds.numpy())
        self.copy_outputs()
        if self.contact_forces:
            self.outputs["cfrc_ext"][worlds] = 0

    def copy_outputs(self) -> None:
        for name, x in self.derived.items():
            self.outputs[name].numpy()[...] = x

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name).clone() for name in ("qpos", "qvel", "ctrl", "warmstart", "time")}
        return state | {"outputs": {name: x.clone() for name, x in self.outputs.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state["outputs"].items():
            self.outputs[name].copy_(value)
        for name in state.keys() - {"outputs"}:
            getattr(self, name).copy_(state[name])
