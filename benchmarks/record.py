"""What the benchmarks share: saying where a result comes from, and putting a table into a page."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

from pgsuite.app.build import commit, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> str:
    """Processor and cores, in words."""
    info = Path("/proc/cpuinfo")
    names = [x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def source() -> dict[str, Any]:
    """Command, commit, machine and versions of this process."""
    command = " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])
    return {"command": command, "commit": commit(), "machine": machine(), "versions": versions()}


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):,.{digits}f}{deviation}"


def keep(result: dict[str, Any], path: Path) -> None:
    """Write down what was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def write_table(page: str, script: str, text: str) -> None:
    """Put what a script of this directory found between its markers in a page of the repository."""
    path = ROOT / page
    before, begin, rest = path.read_text().partition(f"<!-- python benchmarks/{script} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not (begin and end):
        raise SystemExit(f"{page} has no markers for {script}")
    path.write_text(f"{before}{begin}{text}\n{end}{after}")
