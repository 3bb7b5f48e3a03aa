"""The exclusive use of a run directory."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from contextlib import suppress
from pathlib import Path

from pgsuite.errors import UserError
from pgsuite.training import checkpoint

try:
    import fcntl
except ImportError:  # Windows has no POSIX locks
    fcntl = None

NAME = "run.lock"
CONFIG = "config.yaml"  # by which a run directory is known
HELD = (errno.EACCES, errno.EAGAIN)  # which of them depends on the system
WRITTEN_TO = (checkpoint.FOLDER, "videos", "wandb")  # directories within a run directory


class RunLock:
    """Holds at most one run directory, until ``release`` or the end of the process, however it ends.

    The lock is POSIX's, on a file that says who holds it.  It works across machines on NFS, and child processes do not
    inherit it, so that a worker that outlives a killed run does not block the next one.  Where a file system knows no
    locks, only new directories are exclusive.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.file: int | None = None

    def claim(self, wanted: Path) -> Path:
        """Make and hold a directory that no other process holds and that contains no run: ``wanted``, or where it is
        taken, the same name with _2, _3 and so on.  Raises UserError and OSError."""
        for count in itertools.count(1):
            folder = wanted if count == 1 else wanted.with_name(f"{wanted.name}_{count}")
            with suppress(FileExistsError, BlockingIOError):
                self._hold(folder, os.O_EXCL)
                if not os.path.lexists(folder / CONFIG):
                    return folder
                self.release()
        raise AssertionError("unreachable")

    def take(self, folder: Path) -> None:
        """Hold this directory, which is made where there is none.

        Raises UserError, naming the holder, where another process holds it, and OSError.
        """
        try:
            self._hold(folder, 0)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is in use by {error}: wait until it has ended, or give another hydra.run.dir="
            ) from error

    def release(self) -> None:
        if self.folder is None or self.file is None:
            return
        path, file = self.folder / NAME, self.file
        self.folder = self.file = None
        with suppress(OSError):
            if _is_at(file, path):
                path.unlink()  # before it is unlocked, or it could be another's
        os.close(file)

    def _hold(self, folder: Path, flags: int) -> None:
        """Raises BlockingIOError, with the words of the holder, where the directory is held; and FileExistsError with
        O_EXCL."""
        self.release()
        path = folder / NAME
        while self.file is None:
            folder.mkdir(parents=True, exist_ok=True)
            for link in (folder / name for name in WRITTEN_TO):
                if link.is_symlink():
                    raise UserError(
                        f"{link} is a link, and a run writes only to its own directory: put a directory in its place, "
                        "or let a link lead to the whole run directory"
                    )
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)
            except FileNotFoundError:
                continue  # another process has just removed the directory, which was empty
            try:
                _lock(file)
                if _is_at(file, path):  # not a file that its holder has just removed
                    os.ftruncate(file, 0)
                    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    self.folder, self.file = folder, file
            finally:
                if self.file is None:
                    os.close(file)


def _lock(file: int) -> None:
    """Raises BlockingIOError, with the words of the holder, where another process has the lock."""
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise BlockingIOError(os.read(file, 200).decode(errors="replace") or "another process") from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False
