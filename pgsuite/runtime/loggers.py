"""Where scalars go: TensorBoard and a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pgsuite.runtime.video import Gif, log_gif


class Logger(Protocol):
    def write(self, steps: int, scalars: Mapping[str, float]) -> None:
        """Record named scalars at a number of environment steps."""
        ...

    def close(self, results: Mapping[str, float]) -> None:
        """Record what the run came to, if it came to its end, and let go of the file."""
        ...


class TensorBoard:
    """Event files, with the run's hyperparameters and its results in the HParams tab."""

    def __init__(
        self, folder: Path, hyperparameters: Mapping[str, Any], results: tuple[str, ...], after: int | None = None
    ) -> None:
        """``after`` so many steps the run goes on, and what another process logged later is no longer shown."""
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)
        simple = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hyperparameters.items()}
        experiment, session, self.end = hparams(simple, {f"result/{name}": math.nan for name in results})
        if after is None:
            file_writer = self.writer._get_file_writer()
            file_writer.add_summary(experiment)
            file_writer.add_summary(session)

    def write(self, steps: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, steps)
        self.writer.flush()
        self.steps = steps

    def animate(self, film: Gif, steps: int) -> None:
        """Show a moving picture among the images."""
        log_gif(self.writer, film, steps)

    def close(self, results: Mapping[str, float]) -> None:
        for name, value in results.items():
            if math.isfinite(value):
                self.writer.add_scalar(f"result/{name}", value, getattr(self, "steps", 0))
        if results:
            self.writer._get_file_writer().add_summary(self.end)
        self.writer.close()


class Csv:
    """One row a time, on disk at once.  Where a column first appears late, the file is replaced by one that has it."""

    def __init__(self, path: Path, after: int | None = None) -> None:
        """``after`` so many steps the run goes on, and what another process wrote later is dropped."""
        self.path = path
        self.columns: list[str] = ["steps"]
        self.rows: list[dict[str, Any]] = []
        if after is not None and path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                self.rows = [row for row in reader if (row["steps"] or "").isdigit() and int(row["steps"]) <= after]
        self.replace()

    def write(self, steps: int, scalars: Mapping[str, float]) -> None:
        row = {"steps": steps} | dict(scalars)
        self.rows.append(row)
        if new := [name for name in row if name not in self.columns]:
            self.columns += new
            self.file.close()
            self.replace()
        else:
            csv.DictWriter(self.file, self.columns).writerow(row)
            self.file.flush()

    def replace(self) -> None:
        temporary = self.path.with_suffix(".writing")
        with temporary.open("w", newline="") as file:
            table = csv.DictWriter(file, self.columns)
            table.writeheader()
            table.writerows(self.rows)
        temporary.replace(self.path)
        self.file = self.path.open("a", newline="")

    def close(self, results: Mapping[str, float]) -> None:
        self.file.close()
