"""The run directory, which callbacks and loggers are set up with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pgsuite import distributed
from pgsuite.training.loggers import Csv, Logger


@dataclass
class RunDir:
    """The directory of a run, with its facts, console and loggers."""

    folder: Path
    facts: Mapping[str, Any]  # config, choices, versions, device and spaces, as in a checkpoint
    console: Console
    seed: int
    hyperparameters: Mapping[str, Any]  # the settings by dotted names
    resumed_at: int | None = None  # steps of the checkpoint that the run is resumed from; None for a new run
    loggers: list[Logger] = field(default_factory=list)  # empty except in the first process

    @property
    def writes(self) -> bool:
        """Whether this process writes files and logs; only the first one does."""
        return distributed.rank() == 0

    def table(self, name: str) -> Csv:
        """A CSV file in the directory, without rows later than the checkpoint that the run is resumed from."""
        return Csv(self.folder / name, self.resumed_at)
