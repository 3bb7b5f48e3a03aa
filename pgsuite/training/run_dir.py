"""What callbacks and loggers of the configuration are given of a run."""

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
    """The directory of a run, and what is written there and to the console."""

    folder: Path
    facts: Mapping[str, Any]  # config, choices, versions, device and spaces, as a checkpoint holds them
    console: Console
    seed: int
    hyperparameters: Mapping[str, Any]  # the settings by dotted names
    resumed_at: int | None = None  # steps of the checkpoint that the run goes on from; None for a new run
    loggers: list[Logger] = field(default_factory=list)  # empty in all processes but the first

    @property
    def writes(self) -> bool:
        """Whether this process writes files and logs: the first one does, for all."""
        return distributed.rank() == 0

    def table(self, name: str) -> Csv:
        """A CSV file in the directory, without the rows that are later than the checkpoint."""
        return Csv(self.folder / name, self.resumed_at)
