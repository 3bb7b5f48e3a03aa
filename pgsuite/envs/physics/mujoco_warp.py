"""MuJoCo Warp: every world on the GPU, in single precision, in memory that torch shares."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Collection
from typing import Any

import mujoco
import torch
from torch import Tensor

REMEDY = "pip install 'pgsuite[gpu]'"
STATE = ("qpos", "qvel", "ctrl", "warmstart", "time")


class WarpPhysics:
    """N worlds of one model on a CUDA device; on a CPU too, slowly, for tests.

    A step and a reset are captured graphs, launched on torch's current stream: the host neither waits nor copies.
    ``room`` is what each world has for contacts and for constraints, None for enough for gymnasium's models; worlds
    that ran out of it are told of when the state is saved.  A solver that Warp has not is replaced by Newton's.  Raises
    ValueError where mujoco-warp is not installed, or cannot simulate the model.

    ``outputs`` are as ``BatchPhysics`` has them.
    """

    name = "warp"
    on_host = False

    def __init__(
        self,
        model: mujoco.MjModel,
        num_envs: int,
        device: torch.device,
        outputs: Collection[str] = (),
        room: tuple[int | None, int | None] = (None, None),
    ) -> None:
        try:
            import mujoco_warp
            import warp
        except ImportError as error:
            raise ValueError(f"backend=warp needs mujoco-warp: {REMEDY} ({error})") from error
        warp.config.log_level = warp.LOG_WARNING if device.type == "cuda" else warp.LOG_ERROR
        warp.init()
        self.warp, self.mujoco_warp, self.device, self.dtype = warp, mujoco_warp, device, torch.float32
        self.model, self.num_envs = model, num_envs
        self.description = f"warp float32 on {device}, mujoco-warp {mujoco_warp.__version__}"
        # A capsule that meets a plane steeply gets another contact frame than in MuJoCo; planar robots cannot tell.
        rolls = bool((model.jnt_type == mujoco.mjtJoint.mjJNT_FREE).any())
        self.closeness = "approximates" if rolls else "rounds"
        simulated = model
        if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
            simulated = copy.deepcopy(model)
            simulated.opt.solver, simulated.opt.iterations = mujoco.mjtSolver.mjSOL_NEWTON, 100
        self.contacts, self.constraints = room[0] or 48, room[1] or max(64, 6 * model.nv)
        data = mujoco.MjData(simulated)
        mujoco.mj_forward(simulated, data)
        try:
            with warp.ScopedDevice(self.place):
                self.worlds = mujoco_warp.put_model(simulated)
                self.data = mujoco_warp.put_data(
                    simulated, data, nworld=num_envs, nconmax=self.contacts, njmax=self.constraints
                )
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"mujoco-warp cannot simulate this model: {error}") from error
        self.settle()
        self.worlds.opt.warn_overflow = 0  # kernels would print a line for each world and step
        shared = warp.to_torch
        self.qpos, self.qvel, self.ctrl = (shared(getattr(self.data, name)) for name in ("qpos", "qvel", "ctrl"))
        self.warmstart, self.time = shared(self.data.qacc_warmstart), shared(self.data.time)
        self.overflow = shared(self.data.overflow)  # [N] bits that stay once they are set
        self.told = False
        self.derived = {name: shared(getattr(self.data, name)) for name in outputs}
        self.outputs = {name: x.clone() for name, x in self.derived.items()}
        self.graphs: dict[int, Any] = {}
        self.refresh = self.capture(lambda: mujoco_warp.forward(self.worlds, self.data)) if outputs else None

    @property
    def place(self) -> Any:
        """The device, as Warp calls it."""
        return self.warp.device_from_torch(self.device)

    def capture(self, work: Callable[[], None]) -> Any:
        """A graph of work, which runs once before, so that every kernel is there; the worlds stay where they are."""
        before = self.state_dict()
        self.settle()
        collecting = gc.isenabled()
        gc.disable()  # what Warp frees during a capture would become part of it
        try:
            with self.warp.ScopedDevice(self.place):
                work()
                with self.warp.ScopedCapture() as capture:
                    work()
        finally:
            if collecting:
                gc.enable()
        self.settle()
        self.load_state_dict(before)
        return capture.graph

    def settle(self) -> None:
        """Wait until Warp's stream and torch's have both done what they were given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def launch(self, graph: Any) -> None:
        stream = None
        if self.device.type == "cuda":
            stream = self.warp.stream_from_torch(torch.cuda.current_stream(self.device))
        self.warp.capture_launch(graph, stream=stream)

    def step(self, substeps: int) -> None:
        if substeps not in self.graphs:
            self.graphs[substeps] = self.capture(lambda: self.advance(substeps))
        self.launch(self.graphs[substeps])
        for name, x in self.derived.items():
            self.outputs[name].copy_(x)

    def advance(self, substeps: int) -> None:
        for _ in range(substeps):
            self.mujoco_warp.step(self.worlds, self.data)
        if "cfrc_ext" in self.derived:
            self.mujoco_warp.rne_postconstraint(self.worlds, self.data)

    def set_state(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        rows = mask.unsqueeze(-1)
        self.qpos.copy_(torch.where(rows, qpos, self.qpos))
        self.qvel.copy_(torch.where(rows, qvel, self.qvel))
        self.warmstart.masked_fill_(rows, 0)
        self.time.masked_fill_(mask, 0)
        if self.refresh is None:
            return
        self.launch(self.refresh)
        for name, x in self.derived.items():
            fresh = torch.zeros_like(x) if name == "cfrc_ext" else x
            self.outputs[name].copy_(torch.where(mask.view(-1, *[1] * (x.ndim - 1)), fresh, self.outputs[name]))

    def crowded(self) -> int:
        """How many worlds have run out of room since the beginning; waits for the device."""
        kinds = self.mujoco_warp.OverflowType
        return int((self.overflow & ~int(kinds.ITERATIONS | kinds.LS_ITERATIONS)).ne(0).sum())

    def state_dict(self) -> dict[str, Any]:
        """Also warns, once, if worlds ran out of room: here the host waits for the device anyway."""
        if not self.told and (count := self.crowded()):
            self.told = True
            warnings.warn(
                f"{count} of {self.num_envs} worlds ran out of room for contacts or constraints, and ignored some: "
                f"raise env.warp_contacts above {self.contacts} or env.warp_constraints above {self.constraints}",
                stacklevel=2,
            )
        state = {name: getattr(self, name).clone() for name in STATE}
        return state | {"outputs": {name: x.clone() for name, x in self.outputs.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            getattr(self, name).copy_(state[name])
        for name, value in state["outputs"].items():
            self.outputs[name].copy_(value)
