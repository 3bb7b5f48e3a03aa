"""Which modules named in settings may be imported.

Settings of a command line or of a call may name any class.  Settings that were read from a file, such as the
checkpoint of another user's run, may name those of this package and of torch.optim; any other only if this user
trained that run, or says so (docs/howto/security.md).
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import json
import os
import secrets
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pgsuite.errors import UserError, place, reason

Trust = bool | str | list[str]  # true, or what else may be imported: packages, modules, or the paths of classes
PACKAGES = ("pgsuite", "torch.optim", "ale_py")  # the last registers the Atari games of configs/env
# What package:name may be.  Not all of pgsuite: these are called with arguments from the file, and pgsuite.train, for
# one, writes to any directory.
OBJECTS = {
    "pgsuite.rlhf.corpus:prompts",
    "pgsuite.rlhf.corpus:held_out",
    "pgsuite.rlhf.corpus:vocabulary",
    "pgsuite.rlhf.reward:RewardModel.load",
    "pgsuite.rlhf.scorer:score",
}

DEPTH, LARGEST = 50, 100_000  # of settings, and how many


@dataclass(frozen=True)
class Source:
    """A file whose settings are used, and what these may name beside ``PACKAGES`` and ``OBJECTS``."""

    file: str
    everything: bool = False
    given: tuple[str, ...] = ()  # by ``trust``; whatever is in a package or module with it
    named: frozenset[str] = frozenset()  # on this command line: exactly these

    def permits(self, path: str) -> bool:
        if path in OBJECTS or self.everything or path in self.named or _within(path, self.given):
            return True
        return ":" not in path and _within(path, PACKAGES)


_source: ContextVar[Source | None] = ContextVar("source", default=None)
_foreign: set[str] = set()  # what this process imported from outside PACKAGES because settings named it


def source_of(
    file: Path, state: Mapping[str, Any], trust: Trust = False, named: frozenset[str] = frozenset()
) -> Source:
    """The settings in the checkpoint ``file`` of this ``state``, trusted as far as the user said and as the signature
    proves."""
    trust = [trust] if isinstance(trust, str) else trust
    mine = _signed(state.get("config"), state.get("signature"))
    return Source(str(file), trust is True or mine, tuple(trust) if isinstance(trust, list) else (), named)


@contextmanager
def within(source: Source | None = None) -> Iterator[None]:
    """Settings come from this source; without one, from where they came before, until ``adopt`` is called."""
    token = _source.set(source or _source.get())
    try:
        yield
    finally:
        _source.reset(token)


def adopt(source: Source) -> None:
    """Settings come from this source from here to the end of ``within``."""
    _source.set(source)


def imported(module: str, name: str = "", where: str = "a setting", separator: str = ".") -> ModuleType:
    """The module that the setting ``where`` names, for the sake of ``name`` in it.

    Raises ImportError if there is none, and in place of whatever its code raises, with the user's file and line; and
    UserError if the setting comes from a file that is not trusted so far.
    """
    if not module or module.startswith("."):
        raise ImportError(f"{module!r} is no full name of a module")
    path, source = f"{module}{separator}{name}" if name else module, _source.get()
    if source is not None and not source.permits(path):
        raise UserError(
            f"{source.file} names {path} for {where}, which is not of pgsuite, and you have not trained it here: to "
            f"run that code, which can do all that you can, give trust={path}, or trust=true for whatever it names"
        )
    if not _within(path, PACKAGES):
        _foreign.add(path)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        words = str(error) if isinstance(error, ImportError) else reason(error)
        raise ImportError(f"{place(error)}{words}") from error


def strings(tree: Any) -> frozenset[str]:
    """Every string in nested settings."""
    if isinstance(tree, Mapping):
        return frozenset().union(*map(strings, tree.values()))
    if isinstance(tree, list | tuple):
        return frozenset().union(*map(strings, tree))
    return frozenset({tree}) if isinstance(tree, str) else frozenset()


def check_archive(path: Path) -> None:
    """Raise UserError unless a file of torch.save holds no more than its own size: a few kilobytes of compressed or
    overlapping members unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UserError(f"{path} is no archive of tensors") from error
    unpacked, size = sum(x.file_size for x in members), path.stat().st_size
    if unpacked > size or any(x.compress_type != zipfile.ZIP_STORED for x in members):
        raise UserError(
            f"{path} of {size:,} bytes unpacks to {unpacked:,}, which no file of ours does: refused unopened"
        )


def check_settings(tree: Any, file: Path, depth: int = 0) -> int:
    """The number of values in nested settings.  Raises UserError for more than anybody writes, such as settings that
    contain themselves, or one another a billion times."""
    inner = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    count = 1
    for each in inner:
        count += check_settings(each, file, depth + 1) if depth < DEPTH else LARGEST
        if count > LARGEST:
            raise UserError(f"{file} has settings without end: refused")
    return count


def sign(config: Mapping[str, Any]) -> str | None:
    """A proof that a run with these settings was trained by this user, for settings that name code from elsewhere; None
    where there is none, or no place to keep the user's key."""
    return _signature(config, _key(create=True)) if _foreign else None


def _signed(config: Any, signature: Any) -> bool:
    if not isinstance(signature, str):
        return False
    expected = _signature(config, _key(create=False))
    return expected is not None and hmac.compare_digest(expected.encode(), signature.encode())


def _signature(config: Any, key: bytes | None) -> str | None:
    try:
        text = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None
    return None if key is None else hmac.digest(key, text.encode(), hashlib.sha256).hex()


def _key(*, create: bool) -> bytes | None:
    """The key of this user, readable by this user only; None if there is none."""
    try:
        home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        path = Path(home, "pgsuite", "key")
        if create and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = path.with_name(f"key.{os.getpid()}")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
            try:
                os.link(temporary, path)  # fails where another process was faster, whose key is then read
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        about = path.stat()
        private = about.st_uid == os.getuid() and not about.st_mode & 0o077
        return path.read_bytes() if private and about.st_size == 32 else None
    except (OSError, RuntimeError):  # of Path.home
        return None


def _within(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith((f"{name}.", f"{name}:")) for name in names if name)
