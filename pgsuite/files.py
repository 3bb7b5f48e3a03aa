"""Files that are written whole, and never through a link."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a new, empty file beside ``path``, which takes its place when the context ends without an exception,
    and is removed otherwise.

    A reader sees the former file or the new one.  A link at ``path`` is replaced, and its target stays as it is.  The
    name carries the process id, so that processes do not write to each other's.  Raises OSError.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.writing{path.suffix}")
    temporary.unlink(missing_ok=True)  # of an earlier process with this id
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace the contents of a file by a text.  Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text)
