"""The table of benchmarks/speedrun.py, and the lowest versions that pyproject.toml permits."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lowest
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def speedrun(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("speedrun")


def made(date: str, runs: list[tuple[float | None, int | None, float]], before: Any = ()) -> dict[str, Any]:
    def run_of(seconds: float | None, steps: int | None, cpu: float) -> dict[str, Any]:
        return {"seconds": seconds, "steps": steps, "cpu_seconds": cpu}

    about = {"commit": date, "what": f"of {date}", "machine": "a machine", "versions": {"torch": "2"}}
    return {"date": date, "runs": [run_of(*x) for x in runs], "before": [run_of(*x) for x in before]} | about


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_medians_in_which_a_run_that_did_not_get_there_is_the_longest(speedrun: Any) -> None:
    first = made("2026-01-01", [(30.0, 300_000, 60.0), (None, None, 900.0), (20.0, 200_000, 40.0)])
    lines = speedrun.table([first]).splitlines()
    assert cells(lines[2])[2:4] == ["30.0 (from 20.0 to 30.0; 2 of 3 reached)", "300,000"]
    assert cells(lines[2])[4:] == ["-", "-"]  # there is no previous row


def test_a_row_is_compared_with_the_previous_row_as_measured_with_it(speedrun: Any) -> None:
    before = [(40.0, 200_000, 80.0), (50.0, 100_000, 40.0), (None, None, 1.0)]  # 40 CPU s for 100,000 steps
    second = made("2026-01-02", [(25.0, 100_000, 20.0), (35.0, 200_000, 40.0), (15.0, 100_000, 20.0)], before)
    row = cells(speedrun.table([second]).splitlines()[2])
    assert row[2] == "25.0 (from 15.0 to 35.0)"
    assert row[4:] == ["50.0 (from 40.0 to 50.0; 2 of 3 reached)", "0.50"]


def test_the_kept_rows_make_the_table_of_the_page(speedrun: Any) -> None:
    page = (ROOT / "docs" / "reference" / "speedrun.md").read_text()
    assert speedrun.table(speedrun.rows()) in page


def test_every_dependency_has_a_lowest_version_in_which_extras_of_ours_are_looked_into() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = lowest.lowest(project, ["peers", "test", "dev"])
    assert {"torch", "ale-py", "pytest", "ruff", "mkdocstrings"} <= found.keys()
    assert "pgsuite" not in found
    small = {"name": "mine", "dependencies": ["a[x]>=1.2,<2"], "optional-dependencies": {"b": ["c"], "d": ["mine[e]"]}}
    small["optional-dependencies"]["e"] = ["f-g>=3", "a>=1.10"]
    assert lowest.lowest(small, ["d"]) == {"a": "1.10", "f-g": "3"}
    with pytest.raises(SystemExit, match="c has no lower bound"):
        lowest.lowest(small, ["b"])
