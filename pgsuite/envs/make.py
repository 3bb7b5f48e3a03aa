"""From a task, or the name of one, to a running vector environment."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from pgsuite.envs import tasks
from pgsuite.envs.task_env import TaskEnv
from pgsuite.envs.tasks.base import Task
from pgsuite.settings import closest


def make(
    task: Task | str,
    num_envs: int,
    *,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    threads: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> TaskEnv:
    """N environments of a task, with tensors of ``dtype`` on ``device``.

    ``task`` is a Task or its name, with or without gymnasium's version; then ``options`` are its fields.  ``threads``
    is for physics on the CPU, 0 for every core.  Raises ValueError for an unknown task, option or back end.
    """
    if isinstance(task, str):
        task = _named(task, options)
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    if backend not in ("auto", *task.backends):
        name = type(task).__name__
        raise ValueError(f"{name} runs on backend {' or '.join(task.backends)} (or auto), not {backend!r}")
    device = torch.device(device)
    task.place(num_envs, device, task.backends[0] if backend == "auto" else backend, threads)
    return TaskEnv(task, device=device, dtype=dtype, seed=seed)


def _named(task: str, options: dict[str, Any]) -> Task:
    name, names = task.split("-v")[0], set(tasks.__all__) - {"Task"}
    if name not in names:
        raise ValueError(f"no environment {task!r}; {closest(name, names)}")
    cls = getattr(tasks, name)
    known = [field.name for field in fields(cls) if field.init]
    for option in options.keys() - set(known):
        raise ValueError(f"{name} has no option {option!r}; {closest(option, known)}")
    return cls(**options)
