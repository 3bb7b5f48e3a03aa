"""Files of models: weights, vocabulary and architecture in a checkpoint with a checksum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pgsuite.errors import UserError
from pgsuite.rlhf.tokens import Vocabulary
from pgsuite.training import checkpoint


def save(
    path: Path, kind: str, vocabulary: Vocabulary, config: dict[str, Any], state: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write the weights, vocabulary and architecture of a model, and facts.

    Raises UserError if path cannot be written.
    """
    checkpoint.save(facts | {"kind": kind, "words": vocabulary.words, "model": config, "state": state}, path)


def load(
    given: str | Path, name: str, kind: str, made_by: str
) -> tuple[Vocabulary, dict[str, Any], dict[str, Any], Path]:
    """Load vocabulary, architecture and weights, from the file of this name in a directory or from the given file; also
    returns its path.

    Raises UserError, with the command that makes one, if there is no file of this kind.
    """
    path = Path(given) / name if Path(given).suffix != ".pt" else Path(given)
    if not path.is_file():
        raise UserError(f"no {kind} at {path}: {made_by} makes one")
    found = checkpoint.load(path)
    if found.get("kind") != kind:
        raise UserError(f"{path} holds no {kind}: {made_by} makes one")
    with fitting(path):
        return Vocabulary(found["words"]), found["model"], found["state"], path


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Raise UserError if the contents of a file do not fit the model."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit this version of the suite: {reason}") from error


def require_empty(folder: Path, name: str) -> Path:
    """The path to write to in a run directory.  Raises UserError if the file exists."""
    if (folder / name).exists():
        raise UserError(f"{folder / name} is there already: move it away, or give another hydra.run.dir=")
    return folder / name
