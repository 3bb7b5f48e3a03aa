"""Imports point down: a floor may use the floors below it, and its own."""

import ast
import json
import pathlib

import pytest
from mutations import MUTATIONS, RECORD

FLOORS = [
    {"errors", "settings", "seeding", "distributed", "kernel", "version", "files"},
    {"trust"},
    {"components", "types"},
    {"functional", "transfer"},
    {"nn", "envs"},
    {"rollout"},
    {"algorithms"},
    {"training", "testing"},
    {"execution", "reports"},
    {"many"},
    {"app"},
    {"rlhf", "export", "sweep"},
    {"__main__"},
]
LEVEL = {name: i for i, floor in enumerate(FLOORS) for name in floor}
ROOT = pathlib.Path(__file__).parents[1] / "pgsuite"
FILES = sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py" or p.parent != ROOT)


def imports(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, dotted."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: pathlib.Path) -> None:
    here = path.relative_to(ROOT).with_suffix("").parts[0]
    assert here in LEVEL, f"{here} stands on no floor"
    for name in imports(path):
        if name.startswith("pgsuite."):
            there = name.split(".")[1]
            assert there == here or LEVEL[there] < LEVEL[here], f"{here} imports {there}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_hydra_stays_at_the_border_and_numpy_at_the_edges(path: pathlib.Path) -> None:
    top = path.relative_to(ROOT).parts[0]
    packages = {name.split(".")[0] for name in imports(path)}
    assert top == "app" or "hydra" not in packages
    assert (
        top in ("app", "reports", "export") or "omegaconf" not in packages
    )  # a report reads what runs were configured with
    assert top in ("envs", "app", "reports", "training", "export") or "numpy" not in packages


def test_algorithms_know_nothing_of_where_they_run() -> None:
    for path in (ROOT / "algorithms").glob("*.py"):
        text = path.read_text()
        for word in ("cuda", "torch.distributed", "hydra", "mujoco", "compile("):
            assert word not in text.lower(), f"{path.name} mentions {word}"


def test_no_package_is_over_a_sixth_of_the_code() -> None:
    lines = {p: len(p.read_text().splitlines()) for p in ROOT.rglob("*.py")}
    rooms: dict[str, int] = {}
    for p, count in lines.items():
        parts = p.relative_to(ROOT).parts
        rooms[parts[0]] = rooms.get(parts[0], 0) + count
    assert max(rooms.values()) <= sum(lines.values()) / 6, max(rooms, key=lambda name: rooms[name])


def test_every_planted_fault_has_its_place_and_was_found() -> None:
    """What tests/mutations.py replaces is still in the code, and its record is of all faults."""
    for x in MUTATIONS:
        assert (ROOT / x.file).read_text().count(x.old) == 1, x.name
    record = json.loads((ROOT.parent / RECORD).read_text())
    assert [each["fault"] for each in record["each"]] == [x.name for x in MUTATIONS]
    assert record["found"] == record["faults"] == len({x.name for x in MUTATIONS}) > 60
    assert f"each of {record['faults']} faults" in (ROOT.parent / "README.md").read_text()
