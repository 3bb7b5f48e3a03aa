"""Parts of a user's own, from a package outside the repository, by configuration."""

import json
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from pgsuite.app import cli
from pgsuite.app.train import train
from pgsuite.training import checkpoint

TINY = ["env=CartPole", "num_envs=2", "horizon=8", "total_steps=64", "algo.epochs=1", "hydra.run.dir=run"]
CODE = """
from dataclasses import dataclass
from pgsuite.settings import Count
from pgsuite.training.loggers import Logger
from pgsuite.training.trainer import Callback


@dataclass(kw_only=True, eq=False)
class Counter(Callback):
    every: Count = 1

    def setup(self, run):
        self.run, self.count = run, 0

    def on_iteration(self, trainer, report):
        self.count += self.every

    def on_end(self, trainer):
        (self.run.folder / f"{self.slot}.txt").write_text(str(self.count))

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@dataclass(kw_only=True)
class Lines(Logger):
    file: str = "lines.txt"

    def setup(self, run):
        self.out = (run.folder / self.file).open("w")

    def write(self, steps, scalars):
        print(steps, *scalars, file=self.out)

    def close(self, results):
        self.out.close()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_package.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    GlobalHydra.instance().clear()
    cli.main(train, "train")


TWO = [f"callbacks.{name}._target_=my_package.Counter" for name in ("one", "two")] + ["callbacks.two.every=10"]


def test_two_callbacks_of_one_class_have_settings_and_a_state_each(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, *TINY, *TWO)
    _, state = checkpoint.newest(package / "run", print)
    assert state["callbacks"]["callbacks.one"] == {"count": 4}
    assert state["callbacks"]["callbacks.two"] == {"count": 40}
    run(monkeypatch, "resume=run", "total_steps=128")
    assert (package / "run" / "callbacks.one.txt").read_text() == "8"
    assert (package / "run" / "callbacks.two.txt").read_text() == "80"


def test_a_logger_of_ones_own_is_given_every_line(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, *TINY, "loggers.mine._target_=my_package.Lines", "loggers.mine.file=own.txt")
    lines = (package / "run" / "own.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["16", "32", "48", "64"]
    assert json.loads((package / "run" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["callbacks.mine._target_=my_package.Counter", "callbacks.mine.evry=2"], "did you mean every"),
        (["callbacks.mine._target_=my_package.Counter", "callbacks.mine.every=0"], "every must be"),
        (["callbacks.mine._target_=my_package.Count"], "did you mean Counter"),
        (["callbacks.mine._target_=my_package.Lines"], "is no pgsuite.training.trainer.Callback"),
        (["loggers.mine._target_=my_package.Lines", "loggers.mine.fil=x"], "did you mean file"),
    ],
)
def test_wrong_settings_are_refused_by_name(
    package: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, *TINY, *arguments)
    assert not (package / "run" / "config.yaml").exists()
