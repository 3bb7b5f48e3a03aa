"""What --help says: every setting with its description, for each command and each choice of its groups."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra.core.global_hydra import GlobalHydra
from test_cli import Cli, command  # noqa: F401
from toys import mostly_long

from pgsuite.app import cli, envs, help, schema  # noqa: A004
from pgsuite.settings import Count, Fraction

ROOT = Path(__file__).parents[1]
CHOICES = {group: sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml")) for group in ("algo", "env")}
ESTIMATORS = sorted(path.stem for path in (ROOT / "configs/algo/estimator").glob("*.yaml"))
TRAINS = [f"algo={x}" for x in CHOICES["algo"]] + [f"env={x}" for x in CHOICES["env"]]
TRAINS += [f"algo/estimator={x}" for x in ESTIMATORS]
SHOWN = [*((x, "") for x in help.COMMANDS), *(("train", x) for x in TRAINS)]


@pytest.fixture(autouse=True)
def hydra_of_its_own() -> Iterator[None]:
    schema.register()
    yield
    GlobalHydra.instance().clear()


def composed(monkeypatch: pytest.MonkeyPatch, config: str, *given: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    monkeypatch.setattr(sys, "argv", [f"pgsuite {config}", *given, "--help"])
    return help.composed(config, str(cli.CONFIGS))


@pytest.mark.parametrize(("config", "given"), mostly_long(SHOWN, *SHOWN[::3]))
def test_every_setting_has_a_description(monkeypatch: pytest.MonkeyPatch, config: str, given: str) -> None:
    plain, _ = composed(monkeypatch, config, *filter(None, [given]))
    found = [setting for part in help.sections(plain) for setting in part.settings]
    assert found and [setting.name for setting in found if not setting.description] == []
    for setting in found:
        assert "pyright" not in setting.description and "noqa" not in setting.description
        assert setting.kind != "anything" or setting.name.endswith((".estimator", ".language")), setting.name


def test_every_configured_setting_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = composed(monkeypatch, "train", "env=rlhf")

    def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, x in tree.items():
            if isinstance(x, dict) and ("_target_" in x or key == "callbacks"):
                yield from leaves(x, f"{prefix}{key}.")
            elif key != "_target_":
                yield f"{prefix}{key}"

    listed = [setting.name for part in help.sections(plain) for setting in part.settings]
    assert sorted(listed) == sorted(leaves(plain)) and len(set(listed)) == len(listed)


def test_training_shows_the_chosen_method_and_environment_and_all_groups(command: Cli) -> None:  # noqa: F811
    code, out, err = command("train", "algo=trpo", "env=CartPole", "algo.max_kl=0.03", "--help")
    assert code == 0 and err == "" and not list(command.folder.iterdir())
    assert out.startswith("usage: python scripts/train.py [setting=value ...]")
    for group in ("algo=", "algo/estimator=", "env=", "sweep=", "tuned="):
        assert f"\n  {group} " in out
    for said in (*CHOICES["algo"], *CHOICES["env"], *ESTIMATORS, "100 recipes", "python scripts/train.py env=CartPole"):
        assert said in out
    assert "algo (TRPO): The natural step" in out and "env (CartPole): Balance a pole" in out
    assert "env.sutton_barto_reward" in out and "algo.clip" not in out
    (line,) = (line for line in out.splitlines() if line.startswith("  algo.max_kl "))
    assert line.split()[:2] == ["algo.max_kl", "0.03"] and "trust region" in line


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_other_commands_show_their_own_settings_and_no_groups(command: Cli, flag: str) -> None:  # noqa: F811
    for name, own in {"evaluate": "episodes", "export": "tolerance", "replay": "crash"}.items():
        code, out, _ = command(name, flag)
        assert code == 0 and f"\n  {own} " in out
        assert "algo=" not in out and "env=" not in out and "tuned" not in out and "total_steps" not in out


def test_mistakes_beside_help_get_their_message(command: Cli) -> None:  # noqa: F811
    code, _, err = command("train", "algo=pppo", "--help")
    assert code == 1 and "no algo 'pppo'; did you mean ppo" in err
    code, _, err = command("train", "algo.clpi=3", "--help")
    assert code == 1 and "did you mean clip" in err


def test_a_method_from_elsewhere_is_described_by_its_own_comments(command: Cli) -> None:  # noqa: F811
    (command.folder / "own_method.py").write_text(
        "from dataclasses import dataclass\nfrom pgsuite.algorithms import PPO\n"
        "from pgsuite.settings import Positive\n\n\n"
        "@dataclass(kw_only=True, eq=False)\nclass Own(PPO):\n    width: Positive = 3.0  # of what it does\n"
    )
    path = command.folder / "configs" / "algo" / "own.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("defaults: [/schema/own_method.Own@_here_]\n")
    command.monkeypatch.syspath_prepend(command.folder)
    code, out, err = command("train", "--config-dir", "configs", "algo=own", "--help")
    assert code == 0 and "of what it does (number greater than 0)" in out, err
    assert "own" in out.split("algo/estimator=")[0]


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(["-m", "pgsuite", "train"], marks=pytest.mark.long),
        pytest.param([str(ROOT / "scripts" / "train.py")], marks=pytest.mark.long),
        ["-c", "from pgsuite.__main__ import main; main()", "train"],
    ],
    ids=["module", "script", "console"],
)
def test_all_ways_in_print_plain_aligned_lines(start: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"COLUMNS": "80", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, *start, "env=CartPole", "--help"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.stderr == "" and "\x1b" not in done.stdout and not list(tmp_path.iterdir())
    assert max(map(len, lines)) <= 80 and not any(line != line.rstrip() for line in lines)
    rows = [line for line in lines if line.startswith("  checkpoint.")]
    (column,) = {len(re.match(r" +\S+ +\S+ +", row)[0]) for row in rows}  # pyright: ignore[reportOptionalSubscript]
    following = lines[lines.index(rows[0]) + 1]
    assert len(rows) == 3 and len(following) - len(following.lstrip()) == column


def test_a_pager_may_be_left_before_the_end(tmp_path: Path) -> None:
    piped = f"{sys.executable} -m pgsuite train --help | head -n 1"
    done = subprocess.run(["sh", "-c", piped], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "usage: pgsuite train [setting=value ...]\n" and done.stderr == ""


def test_the_list_of_environments_is_described_too(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["pgsuite envs", "--help"])
    with pytest.raises(SystemExit) as left:
        envs.main()
    told = capsys.readouterr().out
    assert left.value.code == 0 and told.startswith("usage: pgsuite envs [-h]\n\nList the environments of env=, with")
    monkeypatch.setattr(sys, "argv", ["pgsuite envs", "CartPole"])
    with pytest.raises(SystemExit):
        envs.main()
    assert "error: unrecognized arguments: CartPole" in capsys.readouterr().err


def test_narrow_terminals_and_long_names_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, choices = composed(monkeypatch, "train", "env=HalfCheetah")
    out = help.render("train", plain, choices, 60)
    assert "\n  env.exclude_current_positions_from_observation\n" in out
    assert "leave out the position along the track" in " ".join(out.split())


@dataclass(kw_only=True)
class Parent:
    a: int = 1  # of the parent
    b: Literal["x"] = "x"  # pyright: ignore[reportGeneralTypeIssues]
    c: tuple[int, int] = (
        1,  # first
        2,  # second
    )


@dataclass(kw_only=True)
class Child(Parent):
    a: int = 2
    d: str = "#"  # a word, # and more


def test_comments_are_read_as_a_person_reads_them() -> None:
    said = {name: help.describe(Child, name) for name in "abcde"}
    assert said == {"a": "of the parent", "b": "", "c": "first second", "d": "a word, # and more", "e": ""}
    assert help.comments(int) == {} and help.describe(type("Made", (), {}), "a") == ""


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        (Count, "whole number at least 1"),
        (Fraction | None, "number from 0 to 1 or null"),
        (Literal["a", "b"] | None, "one of a, b or null"),
        (list[Count], "list of whole number at least 1"),
        (tuple[float, float], "list of number"),
        (dict[str, Any], "settings by name"),
        (bool, "true or false"),
        (int | str, "whole number or text"),
        (Any, "anything"),
    ],
)
def test_types_are_in_plain_words(hint: Any, said: str) -> None:
    assert help.words(hint) == said
