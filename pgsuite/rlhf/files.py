"""Models as files: weights, vocabulary and size in a sealed checkpoint."""

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
    """Write weights, the words that they are for, the transformer that they belong to, and facts.

    Raises UserError if path cannot be written.
    """
    checkpoint.save(facts | {"kind": kind, "words": vocabulary.words, "model": config, "state": state}, path)


def load(
    given: str | Path, name: str, kind: str, made_by: str
) -> tuple[Vocabulary, dict[str, Any], dict[str, Any], Path]:
    """Vocabulary, transformer and weights of the file of this name in a directory, or of the file given, and its path.

    Raises UserError where there is none of this kind, saying what makes one.
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
    """Raise UserError where what a file holds does not make a model."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit this version of the suite: {reason}") from error


def require_empty(folder: Path, name: str) -> Path:
    """Where to write in a run directory.  Raises UserError where something was written before."""
    if (folder / name).exists():
        raise UserError(f"{folder / name} is there already: move it away, or give another hydra.run.dir=")
    return folder / name
