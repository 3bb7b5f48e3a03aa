"""The Python of the README and of docs/api.md, executed as it stands."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import pgsuite
from pgsuite.__main__ import COMMANDS
from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Reinforce

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def block(page: str, containing: str) -> str:
    """The only block of a page that holds some words."""
    (found,) = (code for code in BLOCK.findall((ROOT / page).read_text()) if containing in code)
    return found


def execute(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "example", "exec"), names)
    return names


def test_composing_by_hand_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("README.md", "trainer.fit()")
    assert sum(" = " in line for line in code.splitlines()) <= 10
    names = execute(code, tmp_path, monkeypatch)
    assert names["trainer"].return_mean > 100 and not list(tmp_path.iterdir())


def test_the_readme_trains_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("README.md", "pgsuite.train(").replace("50_000", "4_000")
    run = execute(code, tmp_path, monkeypatch)["run"]
    assert run.summary["status"] == "finished" and run.config["algo"]["clip"] == 0.1


def test_the_page_of_the_interface_has_all_of_it_and_its_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert all(re.search(rf"^\| `{name}[(`]", page, re.M) for name in pgsuite.__all__)
    code = block("docs/api.md", "class Speed").replace("10_000", "2_000")
    assert execute(code, tmp_path, monkeypatch)["speed"].speed > 0


def test_the_first_screen_of_the_readme_has_three_ways_in() -> None:
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert all(way in screen for way in ("make train", "pgsuite train algo=", "pgsuite.train("))
    assert all(name in screen for name in COMMANDS)


SECTIONS = {"REINFORCE": Reinforce, "A2C": A2C, "PPO": PPO, "NPG": NPG, "TRPO": TRPO}


def test_the_switches_of_every_method_are_its_settings() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text()
    seen = set()
    for heading, section in re.findall(r"^## (\w+)[^\n]*\n(.*?)(?=^## |\Z)", page, re.M | re.S):
        if heading in SECTIONS:
            cls = SECTIONS[heading]
            names = {
                name for row in re.findall(r"^\| (`[^|]*) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)
            }
            assert names <= {f.name for f in fields(cls)}, heading
            seen.add(heading)
            assert names
    assert seen == SECTIONS.keys()
