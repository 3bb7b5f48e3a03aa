"""Construction of vector environments, from a task, settings or a name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import gymnasium
import torch

from pgsuite.envs import tasks
from pgsuite.envs.base import VectorEnv, VectorEnvConfig
from pgsuite.envs.gym_env import Gym
from pgsuite.envs.task_env import TaskEnv
from pgsuite.envs.tasks.base import Task
from pgsuite.settings import closest


def make(
    world: Task | VectorEnvConfig | str,
    num_envs: int,
    *,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    threads: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> VectorEnv:
    """Make N environments with tensors of ``dtype`` on ``device``.

    ``world`` is a Task, a VectorEnvConfig, the name of a task, with or without gymnasium's version, or an id in
    gymnasium's registry.  ``options`` are for a world given by name.  ``threads`` is the number of CPU threads for
    physics, 0 for every core.  Raises ValueError for an unknown world, option or back end.
    """
    if isinstance(world, str):
        world = _named(world, options)
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    device, backends = torch.empty(0, device=device).device, world.backends  # cuda is cuda:0 from here on
    if backend not in ("auto", *backends):
        name = type(world).__name__
        raise ValueError(f"{name} runs on backend {' or '.join(backends)} (or auto), not {backend!r}")
    if not isinstance(world, Task):
        return world.build(num_envs, device=device, dtype=dtype, seed=seed)
    world.place(num_envs, device, world.preferred(device) if backend == "auto" else backend, threads)
    return TaskEnv(world, device=device, dtype=dtype, seed=seed)


def _named(world: str, options: dict[str, Any]) -> Task | VectorEnvConfig:
    name, names = world.split("-v")[0], set(tasks.__all__) - {"Task"}
    if name not in names:
        if world in gymnasium.registry:
            return Gym(id=world, options=options)
        raise ValueError(f"no environment {world!r}; {closest(name, names)}")
    cls = getattr(tasks, name)
    known = [field.name for field in fields(cls) if field.init]
    for option in options.keys() - set(known):
        raise ValueError(f"{name} has no option {option!r}; {closest(option, known)}")
    return cls(**options)
