"""What benchmarks/games.py trains games with, and its table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def games(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("games")


def test_a_sticky_run_differs_from_the_protocol_of_rl_zoo_in_its_actions_alone(games: Any) -> None:
    plain, sticky = (games.settings("ppo", 500_000, sticky) for sticky in (False, True))
    assert set(plain) ^ set(sticky) == {"env.sticky=0", "env.sticky=0.25"} and "env.sticky=0.25" in sticky


def test_sticky_runs_have_a_row_of_their_own_and_leave_that_beside_rl_zoo_as_it_is(
    games: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"KEPT": 2.0, "KEPT_STICKY": 7.0}
    for name, level in folders.items():
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setattr(games, name, folder)
        curve = {"steps": [50_000, 100_000], "return": [0.0, level]}
        evaluation = {how: {"mean": level} for how in ("sampled", "deterministic")}
        run = {"curve": curve, "evaluation": evaluation, "commit": "c", "machine": "m"}
        (folder / "ppo-Breakout-s0.json").write_text(json.dumps(run))
    rows = [line.split(" | ") for line in games.table().splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| PPO, Breakout", "| RL Zoo", "| PPO, Breakout, sticky actions"]
    assert [row[2] for row in rows] == ["2.0", "3.9", "7.0"]


def test_the_kept_results_make_the_table_of_the_page(games: Any) -> None:
    assert games.table() in (ROOT / "docs" / "reference" / "results.md").read_text()
