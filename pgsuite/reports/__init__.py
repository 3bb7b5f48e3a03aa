"""Comparison of runs: a page in HTML, its figures, and its tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pgsuite.errors import UserError, counted, install
from pgsuite.files import replacing

REMEDY = install("report")


def report(paths: Sequence[str], out: Path, command: str) -> list[str]:
    """Write ``out``/index.html, table.md and the figures, and return the lines to print.

    paths: run directories, directories that contain some at any depth, or globs.  command: the command shown on the
    page.  Raises UserError, without writing, if there is no run to report.
    """
    try:
        from pgsuite.reports import page, runs, sweeps
    except ImportError as error:
        raise UserError(f"a report needs packages that are not here: {REMEDY} ({error})") from error
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write into {str(out)!r}, which is a file: give a directory with --out")
    swept, damaged = sweeps.find(paths)
    found, skipped = runs.find(paths, sweeps=bool(swept))
    skipped += damaged
    groups, remarks = runs.group(found)
    files = page.build(groups, swept, remarks, skipped, command)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with replacing(out / name) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    pictures = sum(name.endswith(".png") for name in files)
    return [
        *(f"skipped {line}" for line in skipped),
        *(f"{sweep.name}: {sweeps.summary(sweep)}" for sweep in swept),
        *([f"{counted(len(found), 'run')} in {counted(len(groups), 'group')}"] if found else []),
        *remarks,
        f"open {out / 'index.html'}; beside it table.md and {counted(pictures, 'picture')}",
    ]
