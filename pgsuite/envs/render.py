"""Pictures of an environment, drawn as gymnasium draws it and without a screen."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import SyncVectorEnv

from pgsuite.envs.base import VectorEnv
from pgsuite.envs.gym_env import GymEnv
from pgsuite.envs.task_env import TaskEnv
from pgsuite.envs.tasks.classic import ClassicTask
from pgsuite.envs.tasks.mujoco import MujocoTask, unwarned

REMEDY = "pip install 'pgsuite[video]'"


@dataclass
class Camera:
    """``shoot`` draws the first environment as it stands: bytes [H, W, 3]; real time is ``fps`` steps per second."""

    shoot: Callable[[], np.ndarray]
    fps: float


def camera(env: VectorEnv) -> Camera:
    """Raises ValueError for an environment that cannot be drawn, or where a package is missing that draws it."""
    if isinstance(env, TaskEnv):
        return of_task(env.task)
    if isinstance(env, GymEnv):
        if isinstance(env.vec, SyncVectorEnv) and env.vec.envs[0].render_mode == "rgb_array":
            first = env.vec.envs[0]
            return Camera(lambda: np.asarray(guarded(first.render)), first.metadata.get("render_fps", 30))
        shape = env.observation_space.shape or ()
        if len(shape) == 3:
            return Camera(lambda: picture(env.last[0].cpu().numpy()), env.vec.metadata.get("render_fps", 15))
    raise ValueError(f"{env.name} cannot be drawn: it neither renders rgb_array in this process nor observes images")


def picture(image: np.ndarray) -> np.ndarray:
    """An observed image [C, H, W], the last of several, enlarged."""
    colours = image[-3:] if len(image) == 3 else image[-1:].repeat(3, 0)
    return colours.transpose(1, 2, 0).repeat(4, 0).repeat(4, 1)


def of_task(task: Any) -> Camera:
    """gymnasium's environment, put where the first of ours is."""
    if isinstance(task, MujocoTask):
        choose_gl()
        logging.getLogger("OpenGL.acceleratesupport").setLevel(logging.WARNING)  # of which it has much to say
        cameras = [task.model.camera(i).name for i in range(task.model.ncam)]
        options: dict[str, Any] = {"xml_file": task.xml_file, "render_mode": "rgb_array"}
        if "track" in cameras:
            options["camera_name"] = "track"  # or robots walk out of view
        with unwarned():
            made = guarded(lambda: gymnasium.make(task.gymnasium_id, **options))
        twin: Any = made.unwrapped

        def shoot() -> np.ndarray:
            qpos, qvel = (x[0].cpu().double().numpy() for x in (task.physics.qpos, task.physics.qvel))
            twin.set_state(qpos, qvel)
            return twin.render()

        return Camera(shoot, 1 / task.dt)
    if isinstance(task, ClassicTask):
        drawn: Any = guarded(lambda: gymnasium.make(task.gymnasium_id, render_mode="rgb_array")).unwrapped
        drawn.reset()

        def draw() -> np.ndarray:
            drawn.state = task.state[0].cpu().double().numpy()
            return drawn.render()

        guarded(draw)
        return Camera(draw, drawn.metadata["render_fps"])
    raise ValueError(f"{type(task).__name__} has no gymnasium environment that draws it")


def guarded(work: Callable[[], Any]) -> Any:
    """What work gives.  Raises ValueError where a package for drawing is missing."""
    try:
        return work()
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise ValueError(f"drawing needs packages that are not here: {REMEDY} ({error})") from error


@functools.cache
def choose_gl() -> None:
    """Have MuJoCo draw with what works here: EGL, OSMesa, or, where there is a screen, GLFW; MUJOCO_GL comes first.

    Each is tried in a process of its own, for one that fails spoils the next.  Raises ValueError if none works.
    """
    if "MUJOCO_GL" in os.environ:
        return
    screen = bool(os.environ.get("DISPLAY")) or sys.platform != "linux"
    for name in ("egl", "osmesa", "glfw") if screen else ("egl", "osmesa"):
        trial = (
            f"from mujoco.{name} import GLContext; context = GLContext(8, 8); context.make_current(); context.free()"
        )
        done = subprocess.run([sys.executable, "-c", trial], capture_output=True, check=False)
        if done.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return
    raise ValueError(
        "MuJoCo cannot draw here, neither with EGL nor with OSMesa: install libegl1 and libgl1-mesa-dri, or libosmesa6 "
        "(the names in Debian and Ubuntu); MUJOCO_GL=egl or =osmesa picks one"
    )
