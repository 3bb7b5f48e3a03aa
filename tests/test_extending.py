"""Every example of docs/extending.md, executed as it stands."""

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from pgsuite import algorithms
from pgsuite.app import cli
from pgsuite.app.train import train

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)
FILES = {code.split("\n", 1)[0].removeprefix("# "): code for kind, code in BLOCKS if kind == "python"}
FILES |= dict(re.findall(r"^`(configs/\S+)`:\n\n```yaml\n(.*?)^```", PAGE, re.M | re.S))
COMMANDS = [line for kind, code in BLOCKS if kind == "sh" for line in code.splitlines()]
START = ["python", "-m", "pgsuite", "train"]
CHECKS = [
    (path.removesuffix(".py"), name)
    for path, code in FILES.items()
    for name in re.findall(r"^def (test_\w+)\(\)", code, re.M)
]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory outside the repository that holds every file of the page."""
    for path, code in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for path in FILES:
        sys.modules.pop(path.removesuffix(".py"), None)


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    GlobalHydra.instance().clear()
    cli.main(train, "train")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_trains(package: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    words = shlex.split(command)
    assert words[:4] == START
    run(monkeypatch, [*words[4:], "num_envs=8", "horizon=32", "total_steps=512", "hydra.run.dir=run"])
    assert json.loads((package / "run" / "summary.json").read_text())["status"] == "finished"
    for own in re.findall(r"my_\w+\.\w+", command):
        assert own in (package / "run" / "config.yaml").read_text()
    assert ("own.txt" in command) == (package / "run" / "own.txt").exists()


@pytest.mark.parametrize(("module", "name"), CHECKS)
def test_every_check_passes(package: Path, module: str, name: str) -> None:
    getattr(importlib.import_module(module), name)()


def test_every_file_is_used() -> None:
    """By a command, a configuration, or a check."""
    used = " ".join(COMMANDS) + " ".join(FILES.values())
    assert all(f"{path.removesuffix('.py')}" in used for path in FILES if path.startswith("my_"))
    assert len(COMMANDS) > 15 and len(CHECKS) == 3 and len(FILES) > 10


def test_the_methods_to_override_are_there() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| [^|]+ \|$", PAGE, re.M)
    named = [match for row in rows for match in re.findall(r"`(\w+)\(([\w, ]*)\)`", row)]
    assert len(named) > 8
    for name, parameters in named:
        found = [getattr(algorithms, cls) for cls in ("A2C", "PPO", "TRPO") if hasattr(getattr(algorithms, cls), name)]
        assert found, name
        code = getattr(found[-1], name)
        code = getattr(code, "__wrapped__", code)
        assert code.__code__.co_varnames[1 : code.__code__.co_argcount] == tuple(parameters.split(", ")), name


WRONG = [
    (["policy.body=my_networks.Furier"], "is no subclass of pgsuite.nn.network.Body"),
    (["policy.body=my_netwroks.Fourier"], "policy.body=my_netwroks.Fourier cannot be imported: No module named"),
    (["policy.body={_target_: my_networks.Fourier, frequences: 3}"], "policy.body; did you mean frequencies"),
    (["policy.body={_target_: my_networks.Fourier, frequencies: 0}"], "policy.body.frequencies must be a whole number"),
    (["policy.body={frequencies: 3}"], "no policy.body ''; a class by its dotted path"),
    (["policy.body=3"], "body must be a word or settings by name or null, got 3"),
    (["policy.body=my_networks.Fourier", "policy.hidden=[8]"], "policy.hidden would have no effect with policy.body"),
    (["policy.recurrent=gruu"], "no policy.recurrent 'gruu'; did you mean gru, or a class by its dotted path"),
    (["policy.recurrent=my_networks.Fourier"], "is no subclass of pgsuite.nn.recurrent.Recurrence"),
    (["policy.recurrent={_target_: gru, gates: 3}"], "no setting 'gates' in policy.recurrent"),
    (["policy.distribution=my_networks.Fourier"], "is no subclass of pgsuite.nn.heads.Head"),
    (["algo.optim=torch.optim.LBFGS"], "LBFGS computes the loss again by a closure"),
    (["algo.optim=torch.optim.Adamw"], "is no subclass of"),
    (["algo.optim={_target_: torch.optim.AdamW, weight_decoy: 1}"], "did you mean weight_decay"),
    (["algo.optim={_target_: adam, beta1: 2}"], "algo.optim.beta1 must be a number from 0 to 1, got 2"),
    (["algo.optim={_target_: my_optimizers.Lion, beta1: x}"], "algo.optim.beta1 must be a number from 0 to 1, got 'x'"),
    (["algo.optim={_target_: torch.optim.AdamW, lr: 1}"], "no setting 'lr' in algo.optim"),
    (["algo.optim=torch.optim.AdamW", "execution=cuda_graph"], "cuda_graph"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_mistakes_with_components_get_one_message(
    package: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(monkeypatch, ["env=CartPole", "num_envs=8", "total_steps=256", "hydra.run.dir=run", *arguments])
    assert not (package / "run").exists()
