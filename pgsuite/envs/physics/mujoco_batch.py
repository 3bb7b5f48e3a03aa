"""MuJoCo's own C batch stepper: many worlds on a pool of threads, float64, bit for bit a loop over single worlds."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import mujoco
import torch
from mujoco import batch
from torch import Tensor

from pgsuite import distributed


def usable_cores() -> int:
    """How many cores are this process' own, where several share a machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // distributed.local_size())


class BatchPhysics:
    """N worlds of one model on ``threads`` CPU threads; 0 takes every core that is this process' own.

    ``outputs`` are derived fields of MjData, kept as the last call left them: after a step one substep behind qpos, as
    in gymnasium.  cfrc_ext, the contact force on each body, is not part of a step; as in gymnasium it is computed
    after one and zero after a reset.
    """

    name = "mujoco"
    on_host = True

    def __init__(self, model: mujoco.MjModel, num_envs: int, threads: int = 0, outputs: Collection[str] = ()) -> None:
        self.model, self.num_envs = model, num_envs
        self.device, self.dtype = torch.device("cpu"), torch.float64
        threads = threads or usable_cores()
        self.contact_forces = "cfrc_ext" in outputs
        self.batch = batch.Batch(model, nsim=num_envs, nthread=threads, persistent=self.contact_forces)
        self.description = f"mujoco.batch float64, {threads} thread{'s' if threads > 1 else ''}"
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
