"""The run directory, which callbacks and loggers are set up with; its CSV files, and the base class of loggers."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pgsuite import distributed
from pgsuite.errors import UserError
from pgsuite.files import replacing
from pgsuite.settings import Checked
from pgsuite.training.video import Gif


@dataclass(kw_only=True)
class Logger(Checked):
    """Base class of loggers.  If a subclass is a dataclass, its fields are its settings under ``loggers.<name>``.

    Only the first process has loggers.
    """

    def setup(self, run: RunDir) -> None:
        """Called once, before training: open files or connections.  Raises UserError if that fails."""

    def write(self, steps: int, scalars: Mapping[str, float]) -> None:
        """Log named scalars at a number of environment steps."""
        raise NotImplementedError

    def log_text(self, name: str, text: str, steps: int) -> None:
        """Log Markdown; ignored by default."""

    def log_video(self, film: Gif, steps: int) -> None:
        """Log a video; ignored by default."""

    def close(self, results: Mapping[str, float]) -> None:
        """Log the results of the run, which are empty unless it finished, and close files."""


class Csv(Logger):
    """A CSV file, flushed after each row.  It is written again as a whole for a new column, or where it was deleted."""

    def __init__(self, path: Path, after: int | None = None) -> None:
        """``after`` is the number of steps from which the run is resumed; later rows are dropped.

        Raises UserError if an existing file is no table with a column of steps.
        """
        self.path = path
        self.columns: list[str] = ["steps"]
        self.rows: list[dict[str, Any]] = []
        if after is not None and path.is_file():
            try:
                with path.open(newline="") as file:
                    reader = csv.DictReader(file)
                    self.columns = list(reader.fieldnames or self.columns)
                    rows = [row for row in reader if (row.get("steps") or "").isdecimal()]
                if "steps" not in self.columns or any(None in row for row in rows):
                    raise ValueError("its first line does not name its columns")
            except (ValueError, csv.Error) as error:
                raise UserError(
                    f"{path} is damaged ({error}), so the run cannot go on with it: move it away, and another begins"
                ) from error
            self.rows = [row for row in rows if int(row["steps"]) <= after]
        self.replace()

    def write(self, steps: int, scalars: Mapping[str, float]) -> None:
        row = {"steps": steps} | dict(scalars)
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        if new or not self.path.exists():  # it may have been deleted
            self.columns += new
            self.file.close()
            self.replace()
        else:
            csv.DictWriter(self.file, self.columns).writerow(row)
            self.file.flush()

    def replace(self) -> None:
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            table = csv.DictWriter(file, self.columns)
            table.writeheader()
            table.writerows(self.rows)
        self.file = self.path.open("a", newline="")

    def close(self, results: Mapping[str, float]) -> None:
        self.file.close()


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
