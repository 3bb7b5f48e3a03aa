"""Names of the checked object and of the faulty line in errors of checks."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

NOT_AT_FAULT = tuple(str(Path(str(file)).parent) for file in (torch.__file__, __file__))


@contextmanager
def blame(culprit: str) -> Iterator[None]:
    """Prefix messages of AssertionErrors with the name of the checked object, and add a note with it to other
    exceptions."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{culprit}: {error}") from error
    except Exception as error:
        error.add_note(f"raised while {culprit} was checked")
        raise


def place(error: BaseException) -> str:
    """The innermost frame of an error's traceback outside torch and the checks: function, file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if not frame.filename.startswith(NOT_AT_FAULT)]
    frame = (inside or frames)[-1]
    return f"{frame.name} ({frame.filename}, line {frame.lineno})"
