"""MuJoCo Warp: all worlds on the GPU, in float32, in memory shared with torch."""

from __future__ import annotations

import copy
import gc
import importlib
import warnings
from collections.abc import Callable, Collection
from typing import Any

import mujoco
import torch
from torch import Tensor

from pgsuite.errors import install
from pgsuite.kernel import Kernel
from pgsuite.types import choose

REMEDY = install("gpu")
STATE = ("qpos", "qvel", "ctrl", "warmstart", "time")


class WarpPhysics:
    """N worlds of one model on a CUDA device; also on a CPU, slowly, for tests.

    Steps and resets are CUDA graphs, launched on torch's current stream without synchronization or copies.  ``room`` is
    the capacity of each world for contacts and for constraints; None suffices for gymnasium's models.  A world that
    diverges is reset to rest in the model's initial pose, as in MuJoCo.  ``state_dict`` warns of exceeded capacities
    and of diverged worlds.  A solver that Warp lacks is replaced by Newton's.  Raises ValueError if mujoco-warp is not
    installed or cannot simulate the model, or if the driver is too old.

    ``outputs`` are as in ``BatchPhysics``.
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
            warp, mujoco_warp = (importlib.import_module(name) for name in ("warp", "mujoco_warp"))
        except ImportError as error:
            raise ValueError(f"backend=warp needs mujoco-warp: {REMEDY} ({error})") from error
        warp.config.log_level = warp.LOG_WARNING if device.type == "cuda" else warp.LOG_ERROR
        warp.init()
        if device.type == "cuda" and not warp.is_conditional_graph_supported():
            raise ValueError("backend=warp needs a CUDA driver 12.4 or newer: update it, or choose backend=mujoco")
        self.warp, self.mujoco_warp, self.device, self.dtype = warp, mujoco_warp, device, torch.float32
        self.model, self.num_envs = model, num_envs
        self.description = f"warp float32 on {device}, mujoco-warp {mujoco_warp.__version__}"
        # The contact frame of a capsule that meets a plane steeply differs from MuJoCo's; planar robots are unaffected.
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
        self.synchronize()
        self.worlds.opt.warn_overflow = 0  # otherwise kernels print a line per world and step
        shared = warp.to_torch
        self.qpos, self.qvel, self.ctrl = (shared(getattr(self.data, name)) for name in ("qpos", "qvel", "ctrl"))
        self.warmstart, self.time = shared(self.data.qacc_warmstart), shared(self.data.time)
        self.overflow = shared(self.data.overflow)  # [N] sticky bits
        self.broken = torch.zeros(num_envs, dtype=torch.bool, device=device)  # worlds that have ever diverged
        self.trouble = torch.zeros(2, dtype=torch.long, pin_memory=device.type == "cuda")
        self.warned: set[str] = set()  # of what; no number, whose change would have a captured rollout captured again
        self.pose = self.qpos[:1].clone()
        self.derived = {name: shared(getattr(self.data, name)) for name in outputs}
        self.outputs = {name: x.clone() for name, x in self.derived.items()}
        self.rest = {name: x[:1].clone() for name, x in self.derived.items()}  # outputs in the initial pose
        self.graphs: dict[int, Any] = {}
        self.launch = Kernel("launch", self._launch)
        self.refresh = self.capture(lambda: mujoco_warp.forward(self.worlds, self.data)) if outputs else None

    @property
    def place(self) -> Any:
        """Warp's device object."""
        return self.warp.device_from_torch(self.device)

    def capture(self, work: Callable[[], None]) -> Any:
        """Capture work as a graph, after running it once to load its kernels.  The state of the worlds is restored."""
        before = self.state_dict()
        self.synchronize()
        collecting = gc.isenabled()
        gc.disable()  # memory freed during a capture would become part of it
        try:
            with self.warp.ScopedDevice(self.place):
                work()
                with self.warp.ScopedCapture() as capture:
                    work()
        finally:
            if collecting:
                gc.enable()
        self.synchronize()
        self.load_state_dict(before)
        return capture.graph

    def synchronize(self) -> None:
        """Wait for the streams of Warp and of torch."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _launch(self, graph: Any) -> None:
        stream = None
        if self.device.type == "cuda":
            stream = self.warp.stream_from_torch(torch.cuda.current_stream(self.device))
        self.warp.capture_launch(graph, stream=stream)

    def step(self, substeps: int) -> None:
        if substeps not in self.graphs:
            self.graphs[substeps] = self.capture(lambda: self.advance(substeps))
        self.launch(self.graphs[substeps])
        state = torch.cat([self.qpos, self.qvel], -1)
        broken = ~(state.abs() <= mujoco.mjMAXVAL).all(-1)  # nor is NaN
        self.broken |= broken
        self.put(broken, self.pose, torch.zeros_like(self.qvel))
        for name, x in self.derived.items():
            self.outputs[name].copy_(choose(broken, self.rest[name], x))

    def advance(self, substeps: int) -> None:
        for _ in range(substeps):
            self.mujoco_warp.step(self.worlds, self.data)
        if "cfrc_ext" in self.derived:
            self.mujoco_warp.rne_postconstraint(self.worlds, self.data)

    def set_state(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        self.put(mask, qpos, qvel)
        if self.refresh is None:
            return
        self.launch(self.refresh)
        for name, x in self.derived.items():
            fresh = torch.zeros_like(x) if name == "cfrc_ext" else x
            self.outputs[name].copy_(choose(mask, fresh, self.outputs[name]))

    def put(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        self.qpos.copy_(choose(mask, qpos, self.qpos))
        self.qvel.copy_(choose(mask, qvel, self.qvel))
        self.warmstart.masked_fill_(mask.unsqueeze(-1), 0)
        self.time.masked_fill_(mask, 0)

    def tell(self) -> None:
        """Warn once of worlds with exceeded capacities, and once of diverged ones.  The counts are copied without
        waiting, so recent events are reported by a later call."""
        kinds = self.mujoco_warp.OverflowType
        full = (self.overflow & ~int(kinds.ITERATIONS | kinds.LS_ITERATIONS)) != 0
        self.trouble.copy_(torch.stack([full, self.broken]).sum(-1), non_blocking=True)
        crowded, broken = self.trouble.tolist()
        if crowded and "crowded" not in self.warned:
            self.warned.add("crowded")
            warnings.warn(
                f"{crowded} of {self.num_envs} worlds ran out of room for contacts or constraints, and ignored some: "
                f"raise env.warp_contacts above {self.contacts} or env.warp_constraints above {self.constraints}",
                stacklevel=3,
            )
        if broken and "broken" not in self.warned:
            self.warned.add("broken")
            warnings.warn(
                f"{broken} of {self.num_envs} worlds reached numbers that are not finite, and began again from rest",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """The state of the worlds.  Also warns of worlds that were not simulated correctly."""
        self.tell()
        state = {name: getattr(self, name).clone() for name in STATE}
        return state | {"outputs": {name: x.clone() for name, x in self.outputs.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            getattr(self, name).copy_(state[name])
        for name, value in state["outputs"].items():
            self.outputs[name].copy_(value)
