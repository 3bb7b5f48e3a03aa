"""gymnasium's MuJoCo tasks, version 5, over the Physics protocol.

Options carry gymnasium's names and defaults; the models are the XML files that gymnasium ships.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium import spaces
from torch import Generator, Tensor

from pgsuite.envs.physics.base import Physics
from pgsuite.envs.physics.mujoco_batch import BatchPhysics
from pgsuite.envs.physics.mujoco_warp import REMEDY, WarpPhysics
from pgsuite.envs.tasks.base import MirrorTables, Signed, Task
from pgsuite.settings import Count, NonNegative, Positive

ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


@contextmanager
def unwarned() -> Iterator[None]:
    """Suppress MuJoCo's deprecation notices about gymnasium's models, which it would print and append to MUJOCO_LOG.TXT
    in the working directory."""
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(None)


def load_model(xml: str) -> mujoco.MjModel:
    """Load a MuJoCo model: one of gymnasium's by its file name, or another by its path.

    Raises ValueError if the file is missing or unreadable.
    """
    path = ASSETS / xml if (ASSETS / xml).is_file() else Path(xml).expanduser()
    if not path.is_file():
        shipped = ", ".join(sorted(p.name for p in ASSETS.glob("*.xml")))
        raise ValueError(f"no MuJoCo model {xml!r}: a path, or one of gymnasium's: {shipped}")
    try:
        with unwarned():
            return mujoco.MjModel.from_xml_path(str(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a MuJoCo model: {error}") from error


def rest(table: Signed, first: int) -> Signed:
    """A signed permutation without its ``first`` entries, which it maps to themselves."""
    return tuple(j - first if j > 0 else j + first for j in table[first:])


def joined(*tables: Signed) -> Signed:
    """The signed permutation of vectors that follow one another."""
    found: list[int] = []
    for table in tables:
        size = len(found)
        found += [j + size if j > 0 else j - size for j in table]
    return tuple(found)


@dataclass(kw_only=True, eq=False)
class MujocoTask(Task):
    """Simulation of a task by MuJoCo; a subclass defines initial states, observation and reward."""

    backends = ("mujoco", "warp")
    outputs: ClassVar[tuple[str, ...]] = ()  # derived fields of MjData that the task uses

    xml_file: str  # MuJoCo model: one of gymnasium's, or a path
    frame_skip: Count = 5  # physics steps in each environment step
    warp_contacts: Count | None = None  # contacts per environment on Warp; null is enough for gymnasium's models
    warp_constraints: Count | None = None  # constraints per environment on Warp; null is enough for gymnasium's models

    def preferred(self, device: torch.device) -> str:
        if device.type != "cuda":
            return "mujoco"
        if importlib.util.find_spec("mujoco_warp") is None:
            warnings.warn(f"{self.name} is simulated on the CPU; for the GPU: {REMEDY}", stacklevel=3)
            return "mujoco"
        return "warp"

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        model = load_model(self.xml_file)
        if backend == "warp":
            room = (self.warp_contacts, self.warp_constraints)
            self.bind(WarpPhysics(model, num_envs, device, self.outputs, room))
        else:
            self.bind(BatchPhysics(model, num_envs, threads, self.outputs))

    @property
    def mirror(self) -> MirrorTables | None:
        """That of gymnasium's model; whether another one is symmetric is not known."""
        return self.mirror_tables() if self.xml_file == type(self).xml_file else None

    def mirror_tables(self) -> MirrorTables | None:
        return None

    def bind(self, physics: Physics) -> None:
        """Attach the worlds of a simulator, and set the attributes that depend on them."""
        self.physics, self.model = physics, physics.model
        self.num_envs, self.device, self.dtype = physics.num_envs, physics.device, physics.dtype
        self.timestep = self.model.opt.timestep  # seconds per substep
        self.dt = self.timestep * self.frame_skip  # seconds per step
        self.bodies = {self.model.body(i).name: i for i in range(self.model.nbody)}
        self.init_qpos = torch.as_tensor(self.model.qpos0.copy(), device=self.device, dtype=self.dtype)
        low, high = self.model.actuator_ctrlrange.astype(np.float32).T
        self.action_space = spaces.Box(low, high)
        self.observation_space = spaces.Box(-np.inf, np.inf, self.observe().shape[1:], np.float64)

    def reset(self, mask: Tensor, generator: Generator) -> None:
        self.physics.set_state(mask, self.initial_qpos(generator), self.initial_qvel(generator))

    @abstractmethod
    def initial_qpos(self, generator: Generator) -> Tensor:
        """Random initial positions [N, nq]."""

    @abstractmethod
    def initial_qvel(self, generator: Generator) -> Tensor:
        """Random initial velocities [N, nv]."""

    def uniform(self, like: Tensor, bound: float, generator: Generator) -> Tensor:
        return torch.empty_like(like).uniform_(-bound, bound, generator=generator)

    @property
    def on_host(self) -> bool:
        return self.physics.on_host

    def simulate(self, action: Tensor) -> None:
        self.physics.ctrl.copy_(action)
        self.physics.step(self.frame_skip)

    def never(self) -> Tensor:
        """False [N]: no world terminates."""
        return torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    def body(self, name: str) -> Tensor:
        """The position of a body [N, 3] one substep ago, which gymnasium uses too.  Raises KeyError if there is none of
        this name."""
        if name not in self.bodies:
            raise KeyError(f"no body {name!r} in the model, whose bodies are {', '.join(map(repr, self.bodies))}")
        return self.physics.outputs["xpos"][:, self.bodies[name]]

    def describe(self) -> tuple[str, str]:
        versions = f"gymnasium {gymnasium.__version__} step by step (mujoco {mujoco.__version__})"
        return self.physics.description, f"{self.physics.closeness} {versions}"

    def state_dict(self) -> dict[str, Any]:
        return self.physics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.physics.load_state_dict(state)


@dataclass(kw_only=True, eq=False)
class NoisyStart(MujocoTask):
    """Initial states near the model's initial pose."""

    normal_qvel: ClassVar[bool] = False  # noise on velocities is normal rather than uniform

    reset_noise_scale: NonNegative = 0.1  # size of the noise on positions and velocities at the start

    def initial_qpos(self, generator: Generator) -> Tensor:
        return self.init_qpos + self.uniform(self.physics.qpos, self.reset_noise_scale, generator)

    def initial_qvel(self, generator: Generator) -> Tensor:
        if self.normal_qvel:
            return torch.empty_like(self.physics.qvel).normal_(generator=generator) * self.reset_noise_scale
        return self.uniform(self.physics.qvel, self.reset_noise_scale, generator)


@dataclass(kw_only=True, eq=False)
class Robot(NoisyStart):
    """Observes joint positions, except the position along the track, and velocities."""

    skipped: ClassVar[int] = 1  # leading positions that an observation leaves out
    mirrors: ClassVar[tuple[Signed, Signed, Signed] | None] = None  # of positions, velocities and actions, if exact
    qvel_limit: ClassVar[float] = math.inf  # of what is observed

    exclude_current_positions_from_observation: bool = True  # leave out the position along the track

    def observe(self) -> Tensor:
        first = self.skipped if self.exclude_current_positions_from_observation else 0
        qvel = self.physics.qvel.clamp(-self.qvel_limit, self.qvel_limit)
        return torch.cat([self.physics.qpos[:, first:], qvel, *(x.flatten(1) for x in self.more())], -1)

    def more(self) -> list[Tensor]:
        """Further observations [N, ...]."""
        return []

    def mirror_tables(self) -> MirrorTables | None:
        if self.mirrors is None:
            return None
        qpos, qvel, action = self.mirrors
        first = self.skipped if self.exclude_current_positions_from_observation else 0
        return MirrorTables(joined(rest(qpos, first), qvel, *self.more_mirrors()), action)

    def more_mirrors(self) -> list[Signed]:
        """The signed permutations of the further observations."""
        return []


@dataclass(kw_only=True, eq=False)
class Locomotion(Robot):
    """Rewards forward velocity, minus a cost of control.

    With a ``velocity_limit``, the channel ``cost`` is one in each step faster than that, and zero in others: the
    velocity tasks of Safety-Gymnasium (Ji et al., 2023).
    """

    forward_reward_weight: float = 1.0  # weight of the forward velocity
    ctrl_cost_weight: float = 0.1  # weight of the squared action, a cost
    velocity_limit: Positive | None = None  # in m/s: each faster step costs one; null has no cost

    def bind(self, physics: Physics) -> None:
        super().bind(physics)
        self.before = torch.zeros_like(self.position())

    def simulate(self, action: Tensor) -> None:
        self.before.copy_(self.position())
        super().simulate(action)

    def x(self) -> Tensor:
        """The position [N] along the track, in m."""
        return self.physics.qpos[:, 0]

    def position(self) -> Tensor:
        """The positions [N, 1] or [N, 2] whose velocities count, in m: along the track, and perhaps across it."""
        return self.x().unsqueeze(-1)

    def velocity(self) -> Tensor:
        """The forward velocity [N] in the last step, in m/s."""
        return (self.x() - self.before[:, 0]) / self.dt

    def speed(self) -> Tensor:
        """What ``velocity_limit`` limits [N], in m/s."""
        return self.velocity()

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        velocity, effort = self.velocity(), action.square().sum(-1)
        return self.forward_reward_weight * velocity - self.ctrl_cost_weight * effort, self.never()

    def channels(self) -> dict[str, Tensor]:
        if self.velocity_limit is None:
            return {}
        return {"cost": (self.speed() > self.velocity_limit).to(self.dtype)}


@dataclass(kw_only=True, eq=False)
class HalfCheetah(Locomotion):
    gymnasium_id = "HalfCheetah-v5"
    normal_qvel = True

    xml_file: str = "half_cheetah.xml"


@dataclass(kw_only=True, eq=False)
class Swimmer(Locomotion):
    gymnasium_id = "Swimmer-v5"
    skipped = 2
    mirrors = (1, -2, -3, -4, -5), (1, -2, -3, -4, -5), (-1, -2)  # left and right

    xml_file: str = "swimmer.xml"
    frame_skip: Count = 4
    ctrl_cost_weight: float = 1e-4


@dataclass(kw_only=True, eq=False)
class Legged(Locomotion):
    """Locomotion that terminates with a fall."""

    healthy_reward: float = 1.0  # reward of each step that has not fallen
    terminate_when_unhealthy: bool = True  # end the episode with a fall

    @abstractmethod
    def healthy(self) -> Tensor:
        """[N] bool."""

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        reward, _ = super().advance(action)
        healthy = self.healthy()
        return reward + self.healthy_reward * healthy, ~healthy & self.terminate_when_unhealthy


def between(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Whether x lies strictly between the bounds; false for NaN."""
    return (bounds[0] < x) & (x < bounds[1])


@dataclass(kw_only=True, eq=False)
class Walker2d(Legged):
    gymnasium_id = "Walker2d-v5"
    qvel_limit = 10.0
    mirrors = (1, 2, 3, 7, 8, 9, 4, 5, 6), (1, 2, 3, 7, 8, 9, 4, 5, 6), (4, 5, 6, 1, 2, 3)  # the two legs

    xml_file: str = "walker2d_v5.xml"
    frame_skip: Count = 4
    ctrl_cost_weight: float = 1e-3
    reset_noise_scale: NonNegative = 5e-3
    healthy_z_range: tuple[float, float] = (0.8, 2.0)  # heights of the torso that are no fall, in m
    healthy_angle_range: tuple[float, float] = (-1.0, 1.0)  # angles of the torso that are no fall, in rad

    def healthy(self) -> Tensor:
        z, angle = self.physics.qpos[:, 1], self.physics.qpos[:, 2]
        return between(z, self.healthy_z_range) & between(angle, self.healthy_angle_range)


@dataclass(kw_only=True, eq=False)
class Hopper(Walker2d):
    gymnasium_id = "Hopper-v5"
    mirrors = None

    xml_file: str = "hopper.xml"
    healthy_state_range: tuple[float, float] = (-100.0, 100.0)  # values of all other state variables that are no fall
    healthy_z_range: tuple[float, float] = (0.7, math.inf)
    healthy_angle_range: tuple[float, float] = (-0.2, 0.2)

    def healthy(self) -> Tensor:
        state = torch.cat([self.physics.qpos[:, 2:], self.physics.qvel], -1)
        return super().healthy() & between(state, self.healthy_state_range).all(-1)


@dataclass(kw_only=True, eq=False)
class Roaming(Legged):
    """Legged locomotion in the plane, where the limited velocity is that in any direction."""

    @abstractmethod
    def y(self) -> Tensor:
        """The position [N] across the track, in m."""

    def position(self) -> Tensor:
        return super().position() if self.velocity_limit is None else torch.stack([self.x(), self.y()], -1)

    def speed(self) -> Tensor:
        return torch.hypot(*((self.position() - self.before) / self.dt).unbind(-1))


@dataclass(kw_only=True, eq=False)
class Ant(Roaming):
    gymnasium_id = "Ant-v5"
    outputs = ("xpos", "cfrc_ext")
    skipped = 2
    mirrors = (  # left and right: hips turn the other way, ankles the same way
        (1, -2, 3, 4, -5, 6, -7, -14, 15, -12, 13, -10, 11, -8, 9),
        (1, -2, 3, -4, 5, -6, -13, 14, -11, 12, -9, 10, -7, 8),
        (-3, 4, -1, 2, -7, 8, -5, 6),
    )
    normal_qvel = True

    xml_file: str = "ant.xml"
    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4  # weight of squared contact forces, a cost
    main_body: int | str = 1  # name or number of the body whose velocity counts
    healthy_z_range: tuple[float, float] = (0.2, 1.0)  # heights of the torso that are no fall, in m
    contact_force_range: tuple[float, float] = (-1.0, 1.0)  # contact forces are clipped to it
    include_cfrc_ext_in_observation: bool = True  # observe contact forces

    def bind(self, physics: Physics) -> None:
        try:
            self.main = physics.model.body(self.main_body).id
        except (KeyError, IndexError) as error:
            raise ValueError(f"Ant.main_body: {error.args[0]}") from error
        super().bind(physics)

    def contact_forces(self) -> Tensor:
        """Clipped contact torque and force on each body [N, nbody, 6], in N m and N."""
        return self.physics.outputs["cfrc_ext"].clamp(*self.contact_force_range)

    def more(self) -> list[Tensor]:
        return [self.contact_forces()[:, 1:]] if self.include_cfrc_ext_in_observation else []

    def more_mirrors(self) -> list[Signed]:
        bodies = (1, 11, 12, 13, 8, 9, 10, 5, 6, 7, 2, 3, 4)  # the torso, and three bodies of each leg
        turned = (-1, 2, -3, 4, -5, 6)  # torque and force
        forces = tuple(j + 6 * (i - 1) if j > 0 else j - 6 * (i - 1) for i in bodies for j in turned)
        return [forces] if self.include_cfrc_ext_in_observation else []

    def x(self) -> Tensor:
        return self.physics.outputs["xpos"][:, self.main, 0]

    def y(self) -> Tensor:
        return self.physics.outputs["xpos"][:, self.main, 1]

    def healthy(self) -> Tensor:
        z, (low, high) = self.physics.qpos[:, 2], self.healthy_z_range
        finite = self.physics.qpos.isfinite().all(-1) & self.physics.qvel.isfinite().all(-1)
        return finite & (low <= z) & (z <= high)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        reward, terminated = super().advance(action)
        return reward - self.contact_cost_weight * self.contact_forces().square().sum((-1, -2)), terminated


@dataclass(kw_only=True, eq=False)
class HumanBody(Robot):
    """The observation of humanoid robots."""

    outputs = ("xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    skipped = 2

    reset_noise_scale: NonNegative = 1e-2
    include_cinert_in_observation: bool = True  # observe inertia and mass of each body
    include_cvel_in_observation: bool = True  # observe the velocity of each body
    include_qfrc_actuator_in_observation: bool = True  # observe actuator forces
    include_cfrc_ext_in_observation: bool = True  # observe contact forces

    def more(self) -> list[Tensor]:
        skipped = {
            "cinert": 1,
            "cvel": 1,
            "qfrc_actuator": 6,
            "cfrc_ext": 1,
        }  # leading entries of the world or the root
        return [
            self.physics.outputs[name][:, first:]
            for name, first in skipped.items()
            if getattr(self, f"include_{name}_in_observation")
        ]

    def contact_cost(self, weight: float, bounds: tuple[float, float]) -> Tensor:
        """The weighted sum of squared contact torques and forces [N] over all bodies, clipped."""
        return (weight * self.physics.outputs["cfrc_ext"].square().sum((-1, -2))).clamp(*bounds)


@dataclass(kw_only=True, eq=False)
class Humanoid(HumanBody, Roaming):
    gymnasium_id = "Humanoid-v5"

    xml_file: str = "humanoid.xml"
    forward_reward_weight: float = 1.25
    contact_cost_weight: float = 5e-7  # weight of squared contact forces, a cost
    contact_cost_range: tuple[float, float] = (-math.inf, 10.0)  # the contact cost is clipped to it
    healthy_reward: float = 5.0
    healthy_z_range: tuple[float, float] = (1.0, 2.0)  # heights of the torso that are no fall, in m

    def bind(self, physics: Physics) -> None:
        mass = torch.as_tensor(physics.model.body_mass, device=physics.device, dtype=physics.dtype)
        self.mass_share = mass / mass.sum()
        super().bind(physics)

    def x(self) -> Tensor:
        return self.physics.outputs["xipos"][:, :, 0] @ self.mass_share

    def y(self) -> Tensor:
        return self.physics.outputs["xipos"][:, :, 1] @ self.mass_share

    def healthy(self) -> Tensor:
        return between(self.physics.qpos[:, 2], self.healthy_z_range)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        reward, terminated = super().advance(action)
        return reward - self.contact_cost(self.contact_cost_weight, self.contact_cost_range), terminated


@dataclass(kw_only=True, eq=False)
class HumanoidStandup(HumanBody):
    """Stand up from lying.  gymnasium also accepts uph_cost_weight, without using it."""

    gymnasium_id = "HumanoidStandup-v5"

    xml_file: str = "humanoidstandup.xml"
    ctrl_cost_weight: float = 0.1  # weight of the squared action, a cost
    impact_cost_weight: float = 0.5e-6  # weight of squared contact forces, a cost
    impact_cost_range: tuple[float, float] = (-math.inf, 10.0)  # the contact cost is clipped to it

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        height = self.physics.qpos[:, 2] / self.timestep
        impact = self.contact_cost(self.impact_cost_weight, self.impact_cost_range)
        return height - self.ctrl_cost_weight * action.square().sum(-1) - impact + 1, self.never()


@dataclass(kw_only=True, eq=False)
class InvertedPendulum(NoisyStart):
    """Keep the pole up by moving the cart."""

    gymnasium_id = "InvertedPendulum-v5"

    xml_file: str = "inverted_pendulum.xml"
    frame_skip: Count = 2
    reset_noise_scale: NonNegative = 0.01

    def observe(self) -> Tensor:
        return torch.cat([self.physics.qpos, self.physics.qvel], -1)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        obs = self.observe()
        upright = obs.isfinite().all(-1) & (obs[:, 1].abs() <= 0.2)
        return upright.to(obs.dtype), ~upright


@dataclass(kw_only=True, eq=False)
class InvertedDoublePendulum(NoisyStart):
    """Keep two linked poles up by moving the cart."""

    gymnasium_id = "InvertedDoublePendulum-v5"
    outputs = ("site_xpos", "qfrc_constraint")
    normal_qvel = True

    xml_file: str = "inverted_double_pendulum.xml"
    healthy_reward: float = 10.0  # reward of each step that has not fallen

    def observe(self) -> Tensor:
        angles, force = self.physics.qpos[:, 1:], self.physics.outputs["qfrc_constraint"][:, :1]
        qvel = self.physics.qvel.clamp(-10, 10)
        return torch.cat([self.physics.qpos[:, :1], angles.sin(), angles.cos(), qvel, force.clamp(-10, 10)], -1)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        x, _, y = self.physics.outputs["site_xpos"][:, 0].unbind(-1)
        _, spin, second_spin = self.physics.qvel.unbind(-1)
        fallen = y <= 1
        distance = 0.01 * x**2 + (y - 2) ** 2
        reward = self.healthy_reward * ~fallen - distance - (1e-3 * spin**2 + 5e-3 * second_spin**2)
        return reward, fallen


@dataclass(kw_only=True, eq=False)
class Reacher(MujocoTask):
    """Bring the tip of a two-link arm to a target."""

    gymnasium_id = "Reacher-v5"
    outputs = ("xpos",)

    max_episode_steps: Count = 50
    xml_file: str = "reacher.xml"
    frame_skip: Count = 2
    reward_dist_weight: float = 1.0  # weight of the distance from fingertip to goal, a cost
    reward_control_weight: float = 1.0  # weight of the squared action, a cost

    def initial_qpos(self, generator: Generator) -> Tensor:
        qpos = self.init_qpos + self.uniform(self.physics.qpos, 0.1, generator)
        # Uniform in a disc of 0.2 m, which gymnasium draws by rejection.
        draw = torch.empty_like(qpos[:, :2]).uniform_(generator=generator)
        radius, angle = 0.2 * draw[:, 0].sqrt(), 2 * math.pi * draw[:, 1]
        qpos[:, -2:] = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
        return qpos

    def initial_qvel(self, generator: Generator) -> Tensor:
        qvel = self.uniform(self.physics.qvel, 0.005, generator)
        qvel[:, -2:].zero_()
        return qvel

    def gap(self) -> Tensor:
        """The vector from target to fingertip [N, 3], in m."""
        return self.body("fingertip") - self.body("target")

    def mirror_tables(self) -> MirrorTables:
        return MirrorTables((1, 2, -3, -4, 5, -6, -7, -8, 9, -10), (-1, -2))

    def observe(self) -> Tensor:
        angles, goal = self.physics.qpos[:, :2], self.physics.qpos[:, 2:]
        return torch.cat([angles.cos(), angles.sin(), goal, self.physics.qvel[:, :2], self.gap()[:, :2]], -1)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        distance, effort = self.gap().norm(dim=-1), action.square().sum(-1)
        return -self.reward_dist_weight * distance - self.reward_control_weight * effort, self.never()


@dataclass(kw_only=True, eq=False)
class Pusher(MujocoTask):
    """Push a cylinder to a goal with an arm of seven joints."""

    gymnasium_id = "Pusher-v5"
    outputs = ("xpos",)

    max_episode_steps: Count = 100
    xml_file: str = "pusher_v5.xml"
    reward_near_weight: float = 0.5  # weight of the distance from fingertip to object, a cost
    reward_dist_weight: float = 1.0  # weight of the distance from object to goal, a cost
    reward_control_weight: float = 0.1  # weight of the squared action, a cost

    TRIES: ClassVar = 40  # all fail once in 10^17 resets

    def initial_qpos(self, generator: Generator) -> Tensor:
        # The cylinder is uniform in a box, farther than 0.17 m from the goal at its edge: the first try that is.
        tries = torch.empty(self.num_envs, self.TRIES, 2, device=self.device, dtype=self.dtype)
        tries[..., 0].uniform_(-0.3, 0.0, generator=generator)
        tries[..., 1].uniform_(-0.2, 0.2, generator=generator)
        first = (tries.norm(dim=-1) > 0.17).to(torch.int8).argmax(-1)
        qpos = self.init_qpos.repeat(self.num_envs, 1)
        qpos[:, -4:-2] = tries.gather(1, first.view(-1, 1, 1).expand(-1, 1, 2)).squeeze(1)
        qpos[:, -2:].zero_()
        return qpos

    def initial_qvel(self, generator: Generator) -> Tensor:
        qvel = self.uniform(self.physics.qvel, 0.005, generator)
        qvel[:, -4:].zero_()
        return qvel

    def observe(self) -> Tensor:
        bodies = (self.body(name) for name in ("tips_arm", "object", "goal"))
        return torch.cat([self.physics.qpos[:, :7], self.physics.qvel[:, :7], *bodies], -1)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        cylinder = self.body("object")
        near, far = (cylinder - self.body("tips_arm")).norm(dim=-1), (cylinder - self.body("goal")).norm(dim=-1)
        cost = self.reward_near_weight * near + self.reward_dist_weight * far
        return -cost - self.reward_control_weight * action.square().sum(-1), self.never()
