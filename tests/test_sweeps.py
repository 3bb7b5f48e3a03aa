"""Sweeps: many runs of one command, in parallel, cut off and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from pgsuite.app import cli, sweeps
from pgsuite.app.train import train

TINY = ["env=CartPole", "num_envs=2", "horizon=16"]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in a directory of its own; the message that it exits with, or 0."""

    def command(*arguments: str, steps: int = 100) -> str | int:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *TINY, f"total_steps={steps}"])
        GlobalHydra.instance().clear()
        try:
            cli.main(train, "train")
        except SystemExit as stop:
            return stop.code or 0
        return 0

    monkeypatch.chdir(tmp_path)
    return command


def runs() -> list[str]:
    return sorted(str(path.parent.relative_to("runs")) for path in Path("runs").glob("*/*/summary.json"))


@pytest.mark.long
def test_jobs_train_side_by_side_and_the_same_command_makes_no_run_again(sweep: Any) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = ("sweep=local", "algo=ppo,a2c")
    assert sweep(*arguments, "hydra.launcher.n_jobs=2") == 0
    made = runs()
    assert [name.split("/")[0] for name in made] == ["a2c-CartPole", "ppo-CartPole"]
    for name in made:
        assert json.loads(Path("runs", name, "summary.json").read_text())["status"] == "finished"
        assert yaml.safe_load(Path("runs", name, "config.yaml").read_text())["env_threads"] == sweeps.cores_each(2)
    assert sweep(*arguments, "hydra.launcher.n_jobs=1") == 0
    assert runs() == made


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_sweep_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, number: signal.Signals) -> None:
    """Launcher and workers end in the middle; the same command again leaves what is finished and makes no run twice."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    script = str(Path(__file__).parents[1] / "scripts" / "train.py")
    arguments = ["sweep=local", "algo=a2c", "seed=0,1,2", "hydra.launcher.n_jobs=2", "env=CartPole", "num_envs=4"]
    arguments += ["horizon=16", "total_steps=60_000", "checkpoint.every=2000"]

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, script, *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def found(seed: int) -> tuple[Path, str]:
        (folder,) = {path.parents[1] for path in tmp_path.glob(f"runs/*/*-s{seed}*/checkpoints/*.pt")}
        return folder, json.loads((folder / "summary.json").read_text())["status"]

    process, deadline = begin(), time.monotonic() + 120
    while any(not list(tmp_path.glob(f"runs/*/*-s{seed}*/checkpoints/*.pt")) for seed in (0, 1)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    process.communicate()
    before = [found(seed) for seed in (0, 1)]
    assert {"running", "interrupted"} & {status for _, status in before}
    again = begin()
    out, _ = again.communicate(timeout=240)
    assert again.returncode == 0 and "exact: as if it had never stopped" in out
    assert [found(seed) for seed in (0, 1, 2)] == [*((folder, "finished") for folder, _ in before), found(2)]
    third = begin()
    out, _ = third.communicate(timeout=240)
    assert third.returncode == 0 and out.count("has made all its") == 3


def test_names_of_runs_tell_what_was_overridden(sweep: Any) -> None:
    assert sweep("-m", "algo=ppo", "seed=3", "algo.lr=0.001,0.002", "policy.hidden=[8,8]") == 0
    endings = [name.split("-s", 1)[1] for name in runs()]
    assert endings == [f"3-lr={lr},policy.hidden=_8,8_,num_envs=2,horizon=16" for lr in ("0.001", "0.002")]


def test_a_job_that_fails_is_named_and_the_others_go_on(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    message = sweep("-m", "algo=ppo", "algo.epochs=0,2", "seed=0")
    assert "algo.epochs=0" in message and "at least 1" in message
    assert "error: job 0" in capsys.readouterr().err
    assert len(runs()) == 1


@pytest.mark.parametrize(("choice", "package"), [("slurm", "hydra_submitit_launcher"), ("ray", "hydra_ray_launcher")])
def test_cluster_configurations_fit_their_launchers(sweep: Any, choice: str, package: str, capsys: Any) -> None:
    pytest.importorskip(f"hydra_plugins.{package}")
    assert sweep("--cfg", "hydra", f"sweep={choice}") == 0
    assert package in capsys.readouterr().out


@pytest.mark.long
def test_submitit_trains_on_this_machine(sweep: Any) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    limits = ("hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=2")
    assert sweep("sweep=slurm", "hydra/launcher=submitit_local", *limits) == 0
    assert len(runs()) == 1


def test_every_worker_has_its_share_of_the_cores() -> None:
    cores = sweeps.cores_each(1)
    assert sweeps.cores_each(-1) == 1
    assert sweeps.cores_each(2) == max(1, cores // 2)
    assert sweeps.cores_each(10 * cores) == 1
