"""Checkpoints, which hold only tensors, numbers and strings, are written atomically and loaded without executing code.

A file is a zip archive of ``torch.save`` whose comment is a checksum of the archive, so
``torch.load(path, weights_only=True)`` reads it as well.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pgsuite.errors import UserError, counted
from pgsuite.files import replacing
from pgsuite.functional.trust_region import map_tensors
from pgsuite.trust import check_archive, check_settings

FORMAT = 3  # raised whenever states of an earlier version cannot be loaded
FOLDER = "checkpoints"
BEST = "best.pt"
SEAL = 64  # bytes of a SHA-256 in hexadecimal


def save(state: dict[str, Any], path: Path) -> None:
    """Write state to path atomically: a previous file is replaced only once the new one is complete and on disk.

    Raises UserError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("w+b") as file:
            torch.save({"format": FORMAT} | map_tensors(alone, state), file)
            seal(file)
            file.flush()
            os.fsync(file.fileno())
        fsync_dir(path.parent)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"cannot write {path} ({reason}); checkpoints saved before are intact") from error


def alone(x: Tensor) -> Tensor:
    """x without the rest of the memory that it is a view of, which torch would save too."""
    return x.detach().clone() if x.untyped_storage().nbytes() > x.nbytes else x


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote, onto the CPU.

    Raises UserError if path is missing, damaged, of another format, or holds anything but data: the contents are
    never executed.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - SEAL
            sealed = size > 2 and checksum(file, size) == file.read()[2:]
        if not sealed:
            raise UserError(
                f"{path} is no checkpoint of this suite, or it was altered, damaged or cut short: it does not end in "
                "the checksum of what it holds; use an earlier one of the same run"
            )
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors, numbers and words, so it is refused unopened") from error
    except UserError:
        raise
    except Exception as error:  # a crafted file can cause any exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read {path} ({reason}); use an earlier one of the same run") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of format {FORMAT}")
    if not isinstance(config := state.get("config", {}), dict):
        raise UserError(f"{path} holds no settings by name, but {type(config).__name__}")
    check_settings(config, path)
    return state


def seal(file: BinaryIO) -> None:
    """Write the checksum of an archive as its comment."""
    digest = checksum(file, file.seek(0, os.SEEK_END))
    file.write(SEAL.to_bytes(2, "little") + digest)


def checksum(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of an archive of ``size`` bytes, computed as if it had no comment.  Leaves the file position at the
    length of the comment, the last two bytes of the archive."""
    digest, left = hashlib.sha256(), size - 2
    file.seek(0)
    while left and (chunk := file.read(min(left, 1 << 20))):
        digest.update(chunk)
        left -= len(chunk)
    digest.update(bytes(2))
    file.seek(size - 2)
    return digest.hexdigest().encode()


def fsync_dir(folder: Path) -> None:
    """Flush the directory entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def path_of(run: Path, steps: int) -> Path:
    return run / FOLDER / f"{steps:012d}.pt"


def numbered(run: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first, without ``best.pt``.

    Raises UserError if there is none.
    """
    if found := _numbered(run):
        return found
    if within := sorted(folder.parent for folder in run.glob(f"*/{FOLDER}")):
        raise UserError(f"{run} is the directory of {counted(len(within), 'run')}: name one, such as {within[0]}")
    raise UserError(f"no checkpoint in {run / FOLDER}" if run.is_dir() else f"no run directory {run}")


def _numbered(run: Path) -> list[Path]:
    return sorted(path for path in (run / FOLDER).glob("*.pt") if path.stem.isdigit())


def newest(given: Path, say: Callable[[str], object]) -> tuple[Path, dict[str, Any]]:
    """The newest intact checkpoint of a run directory, or the given one; reports each damaged one that it skips.

    Raises UserError if there is none.
    """
    if given.suffix == ".pt":
        return given, load_run_checkpoint(given)
    refused: list[UserError] = []
    for path in reversed(numbered(given)):
        try:
            state = load_run_checkpoint(path)
        except UserError as error:
            refused.append(error)
        else:
            for error in refused:
                say(f"passed over: {error}")
            return path, state
    raise refused[0]


def load_run_checkpoint(path: Path) -> dict[str, Any]:
    """Load the checkpoint of a run.  Raises UserError for any other file."""
    state = load(path)
    if missing := {"config", "choices", "versions", "steps", "algorithm", "spaces"} - state.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: it is no checkpoint of a run")
    return state


def run_of(path: Path) -> Path:
    """The run directory of a checkpoint."""
    return path.parent.parent if path.parent.name == FOLDER else path.parent


def prune(run: Path, keep: int) -> None:
    """Remove all checkpoints but the last ``keep``, and what killed processes left half written; ``best.pt`` stays."""
    for path in (*_numbered(run)[:-keep], *(run / FOLDER).glob(".*.writing.pt")):
        path.unlink(missing_ok=True)


def mark_best(path: Path) -> None:
    """Make ``best.pt`` a hard link to this checkpoint."""
    with replacing(path.with_name(BEST)) as temporary:
        temporary.unlink()
        link(path, temporary)


def link(path: Path, to: Path) -> None:
    """Make ``to`` a hard link to a checkpoint, which is never written again, or a copy where there are none."""
    try:
        os.link(path, to)
    except OSError:  # not every file system supports hard links
        shutil.copyfile(path, to)


def retire_newer(run: Path, steps: int) -> None:
    """Rename the checkpoints of a run that are newer than ``steps``, from which it is resumed."""
    for path in _numbered(run):
        if int(path.stem) > steps:
            path.replace(path.with_suffix(".aside"))
