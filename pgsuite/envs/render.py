"""Offscreen rendering of environments, with the same pictures as gymnasium."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import SyncVectorEnv
from mujoco.rendering.classic import gl_context

from pgsuite.envs.base import VectorEnv
from pgsuite.envs.gym_env import GymEnv
from pgsuite.envs.task_env import TaskEnv
from pgsuite.envs.tasks.classic import ClassicTask
from pgsuite.envs.tasks.mujoco import MujocoTask
from pgsuite.errors import install, reason

REMEDY = install("video")
SIDE = 480  # pixels of a robot's picture, as in gymnasium
TRIAL = """
import mujoco
from mujoco.{} import GLContext
context = GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100).free()
context.free()
"""  # the trial renders, since GLFW makes an unusable context without a screen


@dataclass
class Camera:
    """``render`` returns a picture of the first environment, bytes [H, W, 3]; real time is ``fps`` steps per second."""

    render: Callable[[], np.ndarray]
    fps: float


def camera(env: VectorEnv) -> Camera:
    """A camera on the first environment.  Raises ValueError if it cannot be rendered, or a required package is
    missing."""
    if not screen():
        # SDL takes the first that it has; what some environments draw stays black with dummy.
        os.environ.setdefault("SDL_VIDEODRIVER", "offscreen,dummy")
    if isinstance(env, TaskEnv):
        return of_task(env.task)
    if isinstance(env, GymEnv):
        if isinstance(env.vec, SyncVectorEnv) and env.vec.envs[0].render_mode == "rgb_array":
            first = env.vec.envs[0]
            if "gymnasium.envs.mujoco.mujoco_rendering" in sys.modules:  # whatever part of the environment uses it
                choose_gl()
            return Camera(lambda: drawn(env.name, first.render), fps_of(first.metadata, 30))
        shape = env.observation_space.shape or ()
        if len(shape) == 3:
            return Camera(lambda: picture(env.last[0].cpu().numpy()), fps_of(env.vec.metadata, 15))
    raise ValueError(f"{env.name} cannot be drawn: it neither renders rgb_array in this process nor observes images")


def fps_of(metadata: Mapping[str, Any], default: float) -> float:
    """The frames per second that an environment declares, or the default where it declares none that can be."""
    fps = metadata.get("render_fps")
    return fps if isinstance(fps, int | float) and 0 < fps < math.inf else default


def picture(image: np.ndarray) -> np.ndarray:
    """An observed image [C, H, W], the last of stacked ones, enlarged."""
    colours = image[-3:] if len(image) == 3 else image[-1:].repeat(3, 0)
    return colours.transpose(1, 2, 0).repeat(4, 0).repeat(4, 1)


def of_task(task: Any) -> Camera:
    """A camera that renders the first environment of a task by gymnasium's own drawing code."""
    if isinstance(task, MujocoTask):
        return of_robot(task)
    if isinstance(task, ClassicTask) and task.gymnasium_id in gymnasium.registry:
        twin: Any = gymnasium.make(task.gymnasium_id, render_mode="rgb_array").unwrapped
        twin.reset()

        def render() -> np.ndarray:
            twin.state = task.state[0].cpu().double().numpy()
            return drawn(task.gymnasium_id, twin.render)

        render()  # missing packages are reported now
        return Camera(render, twin.metadata["render_fps"])
    raise ValueError(f"{type(task).__name__} has no gymnasium environment that draws it")


def of_robot(task: MujocoTask) -> Camera:
    """A camera of MuJoCo's renderer; gymnasium's would break other renderers when it is closed."""
    choose_gl()
    model = copy.copy(task.model)
    size = model.vis.global_
    size.offwidth, size.offheight = max(size.offwidth, SIDE), max(size.offheight, SIDE)
    data, renderer = mujoco.MjData(model), mujoco.Renderer(model, SIDE, SIDE)

    def place() -> None:
        data.qpos[:], data.qvel[:] = (x[0].cpu().double().numpy() for x in (task.physics.qpos, task.physics.qvel))
        mujoco.mj_forward(model, data)
        for floor, jump in floors:
            data.geom_xpos[floor, :2] += jump * np.round((data.xpos[1, :2] - data.geom_xpos[floor, :2]) / jump)

    floors = [*floors_of(model)]
    place()
    view = viewpoint(model, data, task.gymnasium_id)

    def render() -> np.ndarray:
        place()
        renderer.update_scene(data, view)
        return renderer.render()

    return Camera(render, 1 / task.dt)


def floors_of(model: mujoco.MjModel) -> Iterator[tuple[int, np.ndarray]]:
    """The patterned planes, and the distances [2] in m by which each is moved to follow the robot.

    A plane extends to infinity in the physics, but is drawn at a finite size.  It is moved by whole periods of its
    pattern, once the robot is halfway to the edge that gymnasium draws.
    """
    for geom in np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE):
        material, size = model.geom_matid[geom], model.geom_size[geom, :2]
        if material >= 0 and not model.mat_texuniform[material] and (size > 0).all():
            period = 2 * size / model.mat_texrepeat[material]
            yield int(geom), period * np.ceil(size / period)


def viewpoint(model: mujoco.MjModel, data: mujoco.MjData, gymnasium_id: str) -> str | mujoco.MjvCamera:
    """The model's camera ``track``, which follows the robot, or the fixed camera that gymnasium configures."""
    if "track" in (model.camera(i).name for i in range(model.ncam)):
        return "track"
    view = mujoco.MjvCamera()
    view.lookat[:], view.distance = np.median(data.geom_xpos, 0), model.stat.extent
    spec = gymnasium.registry.get(gymnasium_id)
    if spec is not None and isinstance(spec.entry_point, str):
        default = inspect.signature(load_env_creator(spec.entry_point)).parameters.get("default_camera_config")
        for name, value in (default.default or {}).items() if default else ():
            setattr(view, name, value)
    return view


def drawn(name: str, draw: Callable[[], Any]) -> np.ndarray:
    """The picture returned by third-party drawing code.  Raises ValueError if it fails or returns no picture."""
    try:
        frame = draw()
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise ValueError(f"drawing needs packages that are not here: {REMEDY} ({error})") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be drawn: {reason(error)}") from error
    if isinstance(frame, np.ndarray) and frame.ndim == 3 and frame.shape[2] == 4:
        frame = frame[..., :3]  # RGBA: a film has no transparency
    if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3):
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ValueError(f"{name} cannot be drawn: its render() gives {got} and not bytes [H, W, 3]")
    return frame


def screen() -> bool:
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@functools.cache
def choose_gl() -> None:
    """Choose an OpenGL back end for MuJoCo: the first of EGL, OSMesa and, with a screen, GLFW that works; or the one
    that MUJOCO_GL names.

    Each is tried in a separate process, since a failed back end breaks the next.  Raises ValueError if none works.
    """
    logging.getLogger("OpenGL.acceleratesupport").setLevel(logging.WARNING)  # it logs at level INFO
    wanted = os.environ.get("MUJOCO_GL")
    names = [wanted] if wanted else ["egl", "osmesa", "glfw"] if screen() else ["egl", "osmesa"]
    for name in names:
        done = subprocess.run([sys.executable, "-c", TRIAL.format(name)], capture_output=True, check=False)
        if done.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            importlib.reload(gl_context)  # the module reads MUJOCO_GL at import
            return
    tried = f"with MUJOCO_GL={wanted}" if wanted else f"with any of {', '.join(names)}"
    raise ValueError(
        f"MuJoCo cannot draw here {tried}: install libegl1, libegl-mesa0 and libgl1-mesa-dri for MUJOCO_GL=egl, or "
        "libosmesa6 for MUJOCO_GL=osmesa (the names in Debian and Ubuntu); unset, the first that works is taken"
    )
