"""Whose fault it is, and where, for what checks raise."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

NOT_AT_FAULT = tuple(str(Path(str(file)).parent) for file in (torch.__file__, __file__))


@contextmanager
def blame(culprit: str) -> Iterator[None]:
    """Have what a check complains of begin with the culprit; errors of its own code get a note of whose it is."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{culprit}: {error}") from error
    except Exception as error:
        error.add_note(f"raised while {culprit} was checked")
        raise


def place(error: BaseException) -> str:
    """The innermost function, with its file and line, that an error passed through outside torch and the checks."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if not frame.filename.startswith(NOT_AT_FAULT)]
    frame = (inside or frames)[-1]
    return f"{frame.name} ({frame.filename}, line {frame.lineno})"
