"""Training in several processes, started as people start them: by torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest

from pgsuite.runtime import checkpoint

ROOT = Path(__file__).parents[1]
RUN = ["num_envs=4", "horizon=16", "total_steps=640", "checkpoint.every=128", "hydra.run.dir=run"]
RESTART = ("--max-restarts=1", "--monitor-interval=0.2")


def torchrun(folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    script = [str(ROOT / "scripts" / "train.py"), "env=CartPole", *arguments]
    environment = {key: x for key, x in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launch, *script], cwd=folder, env=environment, **pipes)


def errors(err: str) -> list[str]:
    """What the script itself said, torchrun's own words left out."""
    return [line for line in err.splitlines() if line.startswith("error:")]


def lose_one(process: subprocess.Popen[str], run: Path) -> None:
    """Kill the second of the processes, once something is saved."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list((run / checkpoint.FOLDER).glob("*.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    ranks = {}
    for child in children.read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(v.removeprefix(b"RANK=")): int(child) for v in variables if v.startswith(b"RANK=")}
    os.kill(ranks[1], signal.SIGKILL)


@pytest.mark.parametrize("algo", ["a2c", "trpo"])
def test_two_processes_make_one_run_and_go_on_with_it_bit_for_bit(tmp_path: Path, algo: str) -> None:
    out, err = (process := torchrun(tmp_path, f"algo={algo}", *RUN)).communicate()
    assert process.returncode == 0, err
    assert out.count("env CartPole-v1") == 1 and "| 2 environments" in out
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["processes"]) == ("finished", 640, 2)
    reference = kills.left_behind(run)
    parts = [reference["state"], *reference["state"]["others"]]
    assert [part["collector"]["obs"].shape[0] for part in parts] == [2, 2]
    assert not kills.differences(*(part["algorithm"]["policy"] for part in parts))
    assert kills.differences(*(part["collector"]["obs"] for part in parts))  # their environments are their own
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    (run / "summary.json").write_text(json.dumps(summary | {"status": "running"}))  # as if it had been killed
    checkpoint.numbered(run)[-1].unlink()
    out, err = (process := torchrun(tmp_path, "resume=run")).communicate()
    assert process.returncode == 0 and out.count("| exact") == 1, err
    again = kills.left_behind(run)
    assert not kills.differences(reference["state"], again["state"])
    assert reference["metrics.csv"] == again["metrics.csv"]


def test_alone_a_run_of_two_goes_on_with_what_was_learned(tmp_path: Path) -> None:
    assert torchrun(tmp_path, "algo=a2c", *RUN).wait() == 0
    script = [sys.executable, str(ROOT / "scripts" / "train.py"), "resume=run", "total_steps=900"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "resumed at 640 steps | weights" in done.stdout, done.stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_a_lost_process_ends_all_with_one_message(tmp_path: Path) -> None:
    process = torchrun(tmp_path, "algo=a2c", *RUN, "total_steps=10_000_000")
    lose_one(process, tmp_path / "run")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(errors(err)) <= 1 and all("a process of this run was lost" in line for line in errors(err))
    checkpoint.load(checkpoint.numbered(tmp_path / "run")[-1])


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_a_restart_goes_on_by_itself(tmp_path: Path) -> None:
    process = torchrun(tmp_path, "algo=a2c", *RUN, "total_steps=6000", "resume=auto", options=RESTART)
    lose_one(process, tmp_path / "run")
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "resumed at" in out and "| exact" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_what_does_not_divide_is_said_once(tmp_path: Path) -> None:
    _, err = (process := torchrun(tmp_path, *RUN, "num_envs=5")).communicate()
    assert process.returncode != 0
    (line,) = errors(err)
    assert "num_envs=5, which counts those of all 2 processes" in line and "4, 6" in line
    assert not list(tmp_path.rglob("*.yaml"))
