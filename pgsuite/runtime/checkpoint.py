"""Checkpoints: tensors, numbers and words only, written whole or not at all, loaded without running any code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from pgsuite.runtime.schema import UserError

FORMAT = 1
FOLDER = "checkpoints"


def save(state: dict[str, Any], path: Path) -> None:
    """Write state to path; whatever stood there stays until the new file is whole and on disk.

    Raises UserError if it cannot be written.
    """
    temporary = path.with_suffix(".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT} | state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"cannot write {path} ({reason}); checkpoints saved before are intact") from error


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote, onto the CPU.

    Raises UserError if path is missing, damaged, of another format, or holds anything but data: the contents are
    never executed.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and numbers, so it is refused unopened: it is no checkpoint of ours, or "
            "it was damaged"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged or cut short ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "use an earlier one of the same run"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of format {FORMAT}")
    return state


def path_of(run: Path, steps: int) -> Path:
    return run / FOLDER / f"{steps:012d}.pt"


def latest(run: Path) -> Path:
    """The newest checkpoint of a run directory.  Raises UserError if there is none."""
    found = sorted((run / FOLDER).glob("*.pt"))
    if not found:
        raise UserError(f"no checkpoint in {run / FOLDER}" if run.is_dir() else f"no run directory {run}")
    return found[-1]
