"""A job of benchmarks/gpu.py in its own process: lines of results, whatever happens."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

Line = dict[str, Any]

OPTIONAL = ("jax", "mujoco_warp", "optax", "triton", "warp")  # packages without which a job is skipped


class Unavailable(Exception):  # noqa: N818
    """The machine lacks what a job needs."""


def results(part: str, job: str, device: str, seconds: float) -> Iterator[Line]:
    """The lines of a job, which may take so many seconds."""

    def work() -> Iterator[Line]:  # imports are part of it: what cannot be imported costs only who needs it
        module = importlib.import_module("jax_peer" if job == "jax" else "gpu_parts")
        yield from getattr(module, part)(job, device, seconds)

    return guarded(work())


def guarded(lines: Iterable[Line], **about: Any) -> Iterator[Line]:
    """Lines, each with what it is about.  An error becomes the last of them, and whoever reads them goes on."""
    try:
        for line in lines:
            yield about | line
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
            yield about | {"skipped": f"{error.name} is not installed"}
        elif isinstance(error, Unavailable):
            yield about | {"skipped": str(error)}
        else:
            traceback.print_exc()
            message = str(error).strip().partition("\n")[0]
            yield about | {"failed": f"{type(error).__name__}: {message}"}
