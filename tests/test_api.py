"""Using it from Python: pgsuite.train and what it returns, beside the command line."""

import csv
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra import version
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime
from hypothesis import example, given
from hypothesis import strategies as st
from test_cli import Cli, command  # noqa: F401

import pgsuite
from pgsuite.app.api import override
from pgsuite.training import checkpoint
from pgsuite.training.trainer import Callback, Report, Trainer

TINY: dict[str, Any] = {"num_envs": 4, "horizon": 16, "algo.epochs": 1, "checkpoint.every": 256}


@dataclass(kw_only=True, eq=False)
class Counter(Callback):
    count: int = 0
    kill_at: int = 0

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGINT)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def train(folder: str | None = "run", **settings: Any) -> pgsuite.Run:
    return pgsuite.train("ppo", "CartPole", folder=folder, **{"total_steps": 512, **TINY, **settings})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def untimed(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def test_python_and_the_command_line_leave_the_same_run(command: Cli) -> None:  # noqa: F811
    schedule = {"algo.lr": {"cosine": [1e-3, 0]}, "algo/estimator": "n_step", "policy.hidden": [32, 16]}
    run = pgsuite.train(
        "ppo", "CartPole", total_steps=512, seed=3, folder="python", **TINY, **schedule, standardize_obs=False
    )
    arguments = ["algo=ppo", "env=CartPole", "total_steps=512", "seed=3", "standardize_obs=false", "hydra.run.dir=line"]
    arguments += ["algo.lr={cosine: [1e-3, 0]}", "algo/estimator=n_step", "policy.hidden=[32,16]"]
    code, _, err = command("train", *arguments, *(f"{key}={x}" for key, x in TINY.items()))
    assert code == 0, err
    ours, theirs = run.folder, command.folder / "line"

    def names(folder: Path) -> list[str]:
        files = (str(path.relative_to(folder)) for path in folder.rglob("*"))
        return sorted("events" if "tfevents" in name else name for name in files)

    assert names(ours) == names(theirs)
    assert (ours / "config.yaml").read_text() == (theirs / "config.yaml").read_text()
    assert untimed(ours / "metrics.csv") == untimed(theirs / "metrics.csv") != []
    states = [checkpoint.load(path) for folder in (ours, theirs) for path in checkpoint.numbered(folder)[-1:]]
    for key in ("config", "choices", "versions", "spaces", "device", "steps"):
        assert states[0][key] == states[1][key]
    for key in ("algorithm", "collector", "tracker"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)


def test_a_run_acts_measures_evaluates_and_draws(here: Path) -> None:
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    run = train(torch_threads=threads + 1)
    assert run.folder == here / "run" and run.summary["status"] == "finished"
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), random)
    assert repr(run).startswith(f"Run({str(run.folder)!r}, finished, 512 steps, return ")
    assert run.config["algo"]["epochs"] == 1

    action = run.policy.act(np.zeros(4, np.float32))
    assert np.shape(action) == () and run.policy.action_space.contains(action)
    batch = run.policy.act(torch.zeros(5, 4))
    assert isinstance(batch, torch.Tensor) and batch.shape == (5,)

    metrics = run.metrics
    with (run.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert metrics["steps"].tolist() == [64.0 * i for i in range(1, 9)]
    assert {x.dtype for x in metrics.values()} == {np.dtype(np.float64)}
    for name, x in metrics.items():
        assert [row[name] == "" for row in rows] == np.isnan(x).tolist(), name

    result = run.evaluate(episodes=3)
    assert result["episodes"] == len(result["returns"]) == 3
    assert pgsuite.evaluate(run.folder, 3)["returns"] == pgsuite.evaluate(run, 3)["returns"] == result["returns"]
    figure: Any = run.plot()
    (line,) = figure.axes[0].lines
    assert not np.isnan(line.get_ydata()).any() and line.get_xdata()[-1] == 512
    assert figure._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(pgsuite.UserError, match="did you mean algorithm/entropy"):
        run.plot("algorithm/entropi")


def test_former_names_are_answered_with_the_present_ones(here: Path) -> None:
    former: dict[str, Any] = {"algo.shrink": 0.5}
    with pytest.raises(pgsuite.UserError, match=r"no setting 'shrink' in algo; it is now called backtrack_coef$"):
        pgsuite.train("trpo", "CartPole", **former)
    folder = here / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    (folder / "metrics.csv").write_text(
        "steps,algorithm/surrogate_improvement,algorithm/effective_sample_fraction\n1,2,3\n"
    )
    run = pgsuite.Run(folder)
    for name, present in (("improvement", "surrogate_improvement"), ("effective_share", "effective_sample_fraction")):
        for prefix in ("", "algorithm/"):
            with pytest.raises(pgsuite.UserError, match=f"no metric .*; it is now called algorithm/{present}$"):
                run.plot(f"{prefix}{name}")


def test_reports_take_runs_and_folders(here: Path) -> None:
    pytest.importorskip("scipy")
    train("b", seed=1)
    pgsuite.report(train("a"), "b", out="page")
    assert "2 runs" in (here / "page" / "index.html").read_text()


@pytest.mark.parametrize(
    "bad",
    [
        {"algo.clpi": 0.1},
        {"algo.clip": -1},
        {"algo.clip": "wide"},
        {"env": "CartPol"},
        {"algo": "pppo"},
        {"total_stpes": 3},
        {"algo/estimator": "gea"},
        {"num_envs": 0},
        {"policy": 3},
        {"device": "gpu"},
        {"resume": "nowhere"},
        {"callbacks.mine": {"_target_": "nowhere.Callback"}},
    ],
    ids=str,
)
def test_bad_settings_raise_the_message_of_the_command_line(command: Cli, bad: dict[str, Any]) -> None:  # noqa: F811
    given: dict[str, Any] = {"env": "CartPole"} | bad
    code, _, err = command("train", *(override(key, x) for key, x in given.items()))
    assert code == 1 and err.startswith("error: ")
    with pytest.raises(pgsuite.UserError) as caught:
        pgsuite.train(**given)
    assert f"error: {caught.value}" == err.strip()
    assert not list(command.folder.iterdir())


def test_callbacks_are_called_saved_and_resumed(here: Path) -> None:
    first = Counter()
    train(callbacks=[first])
    _, state = checkpoint.newest(here / "run", print)
    assert first.count == 8 and state["callbacks"]["Counter"] == {"count": 8}
    second = Counter()
    run = pgsuite.train(resume="run", total_steps=640, callbacks=[second])
    assert second.count == 10 and run.folder == here / "run" and run.summary["steps"] == 640
    wrong: Any = Counter
    with pytest.raises(pgsuite.UserError, match=r"instances of pgsuite.training.trainer.Callback, got <class"):
        train(callbacks=[wrong])


@pytest.mark.parametrize("own", [signal.default_int_handler, signal.SIG_IGN], ids=["default", "ignored"])
def test_an_interrupt_saves_and_then_raises(here: Path, capsys: pytest.CaptureFixture[str], own: Any) -> None:
    """Also where interrupts are ignored, as shells have it in background jobs."""
    before = signal.signal(signal.SIGINT, own)
    try:
        interrupted(own, capsys)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(handler: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(callbacks=[Counter(kill_at=3)], total_steps=100_000)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "SIGINT at 256 steps, saved; go on with: pgsuite.train(resume='run')" in capsys.readouterr().out
    assert pgsuite.Run("run").summary["status"] == "interrupted"
    assert pgsuite.train(resume="run", total_steps=320).summary["steps"] == 320


def test_configurations_of_ones_own_are_found(here: Path) -> None:
    (here / "mine" / "algo").mkdir(parents=True)
    (here / "mine" / "algo" / "careful.yaml").write_text("defaults: [ppo, _self_]\nclip: 0.05\n")
    settings: dict[str, Any] = {"hydra.searchpath": [f"file://{here / 'mine'}"]} | TINY
    run = pgsuite.train("careful", "CartPole", total_steps=64, **settings)
    assert run.config["algo"]["clip"] == 0.05 and run.folder.parent.name == "careful-CartPole"


def test_runs_of_one_second_have_directories_of_their_own(here: Path) -> None:
    folders = {train(None, total_steps=1).folder for _ in range(3)}
    assert len(folders) == 3 and {folder.parent for folder in folders} == {here / "runs" / "ppo-CartPole"}


def test_a_program_that_uses_hydra_keeps_its_state(here: Path) -> None:
    (here / "conf").mkdir()
    (here / "conf" / "mine.yaml").write_text("x: 1\n")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(here / "conf"), job_name="mine", version_base="1.2"):
        before, name = HydraConfig.instance().cfg, JobRuntime.instance().get("name")
        train()
        train("again", seed=1)
        assert hydra.compose("mine", ["x=2"]) == {"x": 2}
        assert HydraConfig.instance().cfg is before
        assert JobRuntime.instance().get("name") == name == "mine"
        assert str(version.getbase()) == "1.2"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab1.' \\\"${,=:[]}-", max_size=6),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from("ab"), x, max_size=2),
    max_leaves=5,
)


@given(VALUES)
@example("a\\")
@example("it's \\' $")
@example("null")
@example("1e3")
def test_python_values_arrive_as_they_are(value: Any) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([override("key", value)])
    assert parsed.value() == value


def test_torchrun_is_for_the_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(pgsuite.UserError, match="torchrun -m pgsuite train"):
        train()


def test_values_that_no_setting_has_are_refused() -> None:
    with pytest.raises(pgsuite.UserError, match="a setting is a number"):
        override("algo.clip", torch.ones(1))
    assert override("algo.clip", np.float64(0.5)) == "algo.clip=0.5" and override("~tuned", None) == "~tuned"


def test_the_public_names_are_there_and_importing_them_is_cheap() -> None:
    assert all(getattr(pgsuite, name) is not None for name in pgsuite.__all__)
    assert set(pgsuite.__all__) <= set(dir(pgsuite))
    code = "import pgsuite, sys; assert not {'torch', 'hydra', 'numpy'} & sys.modules.keys(); pgsuite.train"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
