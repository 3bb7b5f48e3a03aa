"""The Python of the README and of the page of the interface is executed; the architecture is compared with the code."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from test_structure import FILES, FLOORS, LEVEL, imports
from test_structure import ROOT as PACKAGE

import pgsuite
from pgsuite.__main__ import COMMANDS
from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Reinforce
from pgsuite.app import sweeps  # noqa: F401  # registers what configurations call
from pgsuite.app.cli import replacing
from pgsuite.app.schema import register

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
RENAMED_METRICS = {"algorithm/improvement": "algorithm/surrogate_improvement"}  # of runs before the present name
ARCHITECTURE = (ROOT / "docs" / "explanation" / "architecture.md").read_text()


def block(page: str, containing: str) -> str:
    """The only block of a page that holds some words."""
    (found,) = (code for code in BLOCK.findall((ROOT / page).read_text()) if containing in code)
    return found


def execute(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "example", "exec"), names)
    return names


@pytest.mark.long
def test_composing_by_hand_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("docs/reference/api.md", "trainer.fit()")
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
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    assert all(re.search(rf"^\| `{name}[(`]", page, re.M) for name in pgsuite.__all__)
    code = block("docs/reference/api.md", "class Speed").replace("10_000", "2_000")
    assert execute(code, tmp_path, monkeypatch)["speed"].speed > 0


def test_the_readme_is_short_and_has_three_ways_in() -> None:
    page = (ROOT / "README.md").read_text()
    assert len(page.splitlines()) <= 150
    assert all(way in page for way in ("make train", "pgsuite train algo=", "pgsuite.train("))
    assert all(name in page for name in COMMANDS)


def test_the_method_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = execute(block("README.md", "class KLPPO"), tmp_path, monkeypatch)
    surrogate = names["KLPPO"].surrogate
    ratio, advantage = torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0])
    penalty = ratio - 1 - ratio.log()
    assert torch.allclose(surrogate(SimpleNamespace(beta=3.0), ratio, advantage), ratio * advantage - 3 * penalty)


LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_links_outside_the_site_lead_somewhere(page: str) -> None:
    """MkDocs checks those of the site."""
    for link in LINK.findall((ROOT / page).read_text()):
        path, _, anchor = link.partition("#")
        assert "://" in link or (ROOT / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def trainings() -> Iterator[tuple[str, list[str]]]:
    """The settings of every single training that the pages show, by page and command."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*/*.md"))]:
        for line in re.findall(r"^(?:pgsuite|python -m pgsuite) ?(?:train )?(.*=.*)$", path.read_text(), re.M):
            words = shlex.split(line.removesuffix("\\"), comments=True)
            if not any(
                "<" in x or "my" in x or x in ("-m", "\\") or x.startswith(("sweep=", "run=", "--")) for x in words
            ):
                yield f"{path.name}: {line}", [x for x in words if x.startswith("~") or "=" in x]


@pytest.mark.long
def test_the_settings_of_every_page_exist() -> None:
    register()
    commands = dict(trainings())
    assert len(commands) > 30
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for command, settings in commands.items():
            try:
                compose("train", [part for setting in settings for part in replacing(setting)])
            except Exception as error:  # whatever Hydra raises
                pytest.fail(f"{command}: {error}")


def test_every_metric_of_the_committed_runs_is_described() -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    described = set(re.findall(r"`((?:algorithm|episode|time)/\w+)`", page))
    schedules = {"algorithm/lr", "algorithm/critic_lr"}  # of these runs
    for folder in ("ppo-CartPole", "trpo-CartPole", "ppo-MountainCarContinuous", "trpo-MountainCarContinuous"):
        for table in (ROOT / "benchmarks" / "results" / "comparing" / folder).glob("*/metrics.csv"):
            columns = set(table.read_text().split("\n", 1)[0].split(",")) - {"steps"} - schedules
            assert {RENAMED_METRICS.get(name, name) for name in columns} <= described


def test_the_citation_is_of_this_version() -> None:
    found = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert found and found[1] == pgsuite.__version__


SECTIONS = {"REINFORCE": Reinforce, "A2C": A2C, "PPO": PPO, "NPG": NPG, "TRPO": TRPO}


def test_the_switches_of_every_method_are_its_settings() -> None:
    page = (ROOT / "docs" / "explanation" / "algorithms.md").read_text()
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


def members(body: list[ast.stmt]) -> Iterator[tuple[str, list[ast.stmt]]]:
    """The names that statements of a module or a class define, each with the statements in it."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, node.body
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield ast.unparse(target), []


def is_defined(body: list[ast.stmt], name: str) -> bool:
    """Whether a dotted name is defined, as ``function``, ``Class.method`` or ``Class.attribute``."""
    first, _, rest = name.partition(".")
    for found, inner in members(body):
        if found == first and not rest:
            return True
        if found == first:
            attributes = {key for _, method in members(inner) for key, _ in members(method)}
            return is_defined(inner, rest) or f"self.{rest}" in attributes
    return False


def test_the_architecture_mentions_only_what_exists() -> None:
    mentions = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", ARCHITECTURE)
    assert len(mentions) > 60
    for path, name in mentions:
        file = (ROOT if path.startswith("tests/") else PACKAGE) / path
        assert file.is_file(), f"there is no {path}"
        assert not name or is_defined(ast.parse(file.read_text()).body, name), f"{path} does not define {name}"


def test_a_name_that_is_not_defined_is_noticed() -> None:
    body = ast.parse("class A:\n  def f(self):\n    self.x = 1\n    y = 2\nz: int = 3").body
    assert all(is_defined(body, name) for name in ("A", "A.f", "A.x", "z"))
    assert not any(is_defined(body, name) for name in ("f", "x", "A.y", "A.g", "B.f", "z.f"))


def test_the_architecture_lists_every_package_on_its_floor() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)(/|\.py)` \|", ARCHITECTURE, re.M)
    assert len(rows) == len({name for _, name, _ in rows})
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert {name for _, name, kind in rows if kind == "/"} == packages
    assert {name for _, name, kind in rows if kind == ".py"} == {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert {name: int(floor) for floor, name, _ in rows} == LEVEL and max(LEVEL.values()) == len(FLOORS) - 1


def test_the_arrows_of_the_architecture_are_the_imports() -> None:
    """Each arrow is an import, and each import is an arrow or follows from several."""
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    imported: dict[str, set[str]] = {name: set() for name in packages}
    for path in FILES:
        here = path.relative_to(PACKAGE).parts[0]
        there = {name.split(".")[1] for name in imports(path) if name.startswith("pgsuite.")}
        if here in packages:
            imported[here] |= {name if name in packages else "modules" for name in there - {here}}
    drawn: dict[str, set[str]] = {}
    for line in re.findall(r"^  (.+ --> .+)$", ARCHITECTURE, re.M):
        left, right = (re.sub(r"\[.*\]", "", side).split(" & ") for side in line.split(" --> "))
        for name in left:
            drawn.setdefault(name, set()).update(right)

    def reached(name: str) -> set[str]:
        return {x for to in drawn.get(name, ()) for x in (to, *reached(to))}

    for name, there in imported.items():
        assert drawn[name] <= there <= reached(name), name


PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *(str(x.relative_to(ROOT)) for x in (ROOT / "docs").rglob("*.md")),
]


def test_every_row_of_a_table_belongs_to_a_header_and_has_as_many_cells() -> None:
    """A blank line within a table makes text of the rest, and a bar within a cell two cells of it."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
        for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
            header, rule, *rows = table.splitlines()
            assert re.fullmatch(r"\|(?: ?:?-+:? ?\|)+", rule), f"{page}: no header above {header}"
            for row in (header, *rows):
                assert len(re.findall(r"(?<!\\)\|", row)) == rule.count("|"), f"{page}: {row}"
