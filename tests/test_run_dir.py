"""A run directory belongs to one run, which writes nowhere else and says what happens to it."""

import csv
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kills
import pytest
import yaml
from test_cli import TINY, Cli, command, finished, own_run  # noqa: F401

from pgsuite import files
from pgsuite.errors import UserError
from pgsuite.training import checkpoint, run_lock
from pgsuite.training.run_lock import NAME, RunLock
from pgsuite.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
POLE = ["env=CartPole", *TINY]


def at_iteration(command: Cli, number: int, action: Callable[[], Any]) -> None:  # noqa: F811
    """Do something in the run directory when an iteration begins."""
    iterate, count = Trainer.iterate, 0

    def patched(self: Trainer) -> Any:
        nonlocal count
        count += 1
        if count == number:
            action()
        return iterate(self)

    command.monkeypatch.setattr(Trainer, "iterate", patched)


# Shared directories


def holding(folder: str, seconds: float) -> None:
    os.chdir(folder)
    RunLock().take(Path("run"))
    Path("held").touch()
    time.sleep(seconds)


@pytest.mark.long
def test_runs_that_start_in_one_second_have_a_directory_each(tmp_path: Path) -> None:
    same = [*POLE, "hydra.run.dir='runs/${now:%Y}-s${seed}'"]
    started = []
    for i in range(4):
        (own := tmp_path / "output" / str(i)).mkdir(parents=True)
        (own / "runs").symlink_to(tmp_path)
        started.append(kills.start(own, [*same, f"algo.lr={i + 1}e-4"]))
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 4
    runs = sorted(tmp_path.glob("*-s0*"))
    assert [run.name.partition("-")[2] for run in runs] == ["s0", "s0_2", "s0_3", "s0_4"]
    assert sorted(yaml.safe_load((run / "config.yaml").read_text())["algo"]["lr"] for run in runs) == [
        pytest.approx(x * 1e-4) for x in (1, 2, 3, 4)
    ]
    for run in runs:
        assert checkpoint.numbered(run)[-1].stem == "000000001024"
        assert [int(row["steps"]) for row in csv.DictReader((run / "metrics.csv").open())] == list(range(64, 1025, 64))
        assert not (run / NAME).exists()


@pytest.mark.long
def test_jobs_of_sweeps_that_start_in_one_second_have_a_directory_each(command: Cli) -> None:  # noqa: F811
    for _ in range(2):
        sweep = ["hydra.sweep.subdir='${now:%Y}-s${seed}'", "seed=1,2", "total_steps=64"]
        assert command("train", "-m", *POLE, *sweep)[0] == 0
    names = sorted(path.name.partition("-")[2] for path in (command.folder / "runs").glob("*-*"))
    assert names == ["s1", "s1_2", "s2", "s2_2"]


@pytest.mark.long
def test_a_held_directory_is_refused_by_the_name_of_its_holder(command: Cli) -> None:  # noqa: F811
    process = kills.fork(holding, str(command.folder), 60)
    while not (command.folder / "held").exists():
        time.sleep(0.01)
    try:
        for given in (["hydra.run.dir=run"], ["hydra.run.dir=run", "resume=auto"], ["resume=run"]):
            code, _, err = command("train", *POLE, *given)
            assert code == 1 and f"run is in use by process {process.pid} on " in err and err.strip().count("\n") == 0
    finally:
        process.kill()
        process.join()
    assert (command.folder / "run" / NAME).exists()  # a holder that is dead
    assert command("train", *POLE, "hydra.run.dir=run")[0] == 0
    assert not (command.folder / "run" / NAME).exists()


def test_of_several_that_resume_one_run_one_goes_on(command: Cli, own_run: Path) -> None:  # noqa: F811
    for path in checkpoint.numbered(own_run)[-2:]:
        path.unlink()
    (own_run / "summary.json").unlink()
    os.rename(own_run, command.folder / "whole")
    auto = [*POLE, "checkpoint.every=250", "hydra.run.dir=whole", "resume=auto", "total_steps=1000"]
    started = [kills.start(command.folder, auto) for _ in range(3)]
    for process in started:
        process.join()
    said = (command.folder / "output.txt").read_text()
    assert "Traceback" not in said and said.count("resumed at ") == 1, said
    rows = [int(row["steps"]) for row in csv.DictReader((command.folder / "whole" / "metrics.csv").open())]
    assert rows == list(range(64, 1025, 64))


def test_new_directories_are_exclusive_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", lockf)
    locks = [RunLock() for _ in range(3)]
    assert [lock.claim(tmp_path / "run").name for lock in locks] == ["run", "run_2", "run_3"]
    RunLock().take(tmp_path / "run")


def test_a_lock_survives_what_its_holder_leaves_behind(tmp_path: Path) -> None:
    one, two = RunLock(), RunLock()
    one.take(tmp_path)
    (tmp_path / NAME).unlink()
    two.take(tmp_path)  # another file
    one.release()
    assert (tmp_path / NAME).exists()  # which is not the first one's to remove
    two.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("own_run")
def test_auto_goes_on_with_the_given_directory_and_no_other(command: Cli) -> None:  # noqa: F811
    kills.shutil.copytree("run", "copy")
    (command.folder / "run" / "checkpoints" / "000000001024.pt").unlink()
    (command.folder / "run" / "summary.json").unlink()
    os.utime("copy/config.yaml")
    code, out, _ = command("train", *POLE, "checkpoint.every=250", "hydra.run.dir=run", "resume=auto")
    assert code == 0 and "resumed at 768 steps | exact" in out and out.rstrip().endswith("| run")
    code, out, _ = command("train", *POLE, "checkpoint.every=250", "hydra.run.dir=new", "resume=auto")
    assert code == 0 and "resumed" not in out and (command.folder / "new" / "summary.json").exists()


# Links


def test_links_are_not_written_through(command: Cli, tmp_path_factory: pytest.TempPathFactory) -> None:  # noqa: F811
    elsewhere, run = tmp_path_factory.mktemp("elsewhere"), command.folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    names = ["config.yaml", "metrics.csv", "summary.json", "evaluation.csv", "evaluation.json", "policy.pt2"]
    names += ["checkpoints/000000000064.pt", "checkpoints/best.pt", "checkpoints/000000000064.writing"]
    names += [f"checkpoints/.000000000064.{os.getpid()}.writing.pt", "metrics.writing", "summary.writing"]
    scored = ["evaluation.every=64", "evaluation.episodes=2", "total_steps=64"]
    for name in names:
        target = elsewhere / name.replace("/", "-")
        target.write_text("precious")
        if name != "config.yaml":  # by which a directory would hold a run
            (run / name).symlink_to(target)

    def link_settings() -> None:
        (run / "config.yaml").unlink()
        (run / "config.yaml").symlink_to(elsewhere / "none")  # as good as deleted, so they are written again

    at_iteration(command, 1, link_settings)
    assert command("train", *POLE, *scored, "hydra.run.dir=run")[0] == 0
    assert command("evaluate", "run=run", "episodes=2")[0] == 0
    assert command("export", "run=run", "format=torch")[0] == 0
    assert len(list(elsewhere.iterdir())) == len(names)
    assert all(path.read_text() == "precious" for path in elsewhere.iterdir())
    assert not (run / "evaluation.json").is_symlink() and (run / "evaluation.json").stat().st_size > 100


@pytest.mark.parametrize("name", ["checkpoints", "videos", NAME])
def test_a_directory_behind_a_link_is_refused(command: Cli, name: str) -> None:  # noqa: F811
    (command.folder / "elsewhere").mkdir()
    (command.folder / "run").mkdir()
    (command.folder / "run" / name).symlink_to(command.folder / "elsewhere" / "x" if name == NAME else "../elsewhere")
    code, _, err = command("train", *POLE, "hydra.run.dir=run")
    assert code == 1 and f"run/{name}" in err and err.strip().count("\n") == 0
    assert not list((command.folder / "elsewhere").iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("before")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "x.txt") as temporary:
        assert f".{os.getpid()}." in temporary.name
        temporary.write_text("half")
        raise ZeroDivisionError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


# What happens to it


@pytest.mark.parametrize("how", ["delete", "move"])
def test_a_directory_that_goes_away_is_made_again(command: Cli, how: str) -> None:  # noqa: F811
    run = command.folder / "run"
    away = kills.shutil.rmtree if how == "delete" else lambda path: path.rename(path.with_name("moved"))
    at_iteration(command, 5, lambda: away(run))
    scored = ["evaluation.every=320", "evaluation.episodes=2", "checkpoint.every=320"]
    code, out, err = command("train", *POLE, *scored, "hydra.run.dir=run")
    assert code == 0 and "was deleted or moved while the run was at 320 steps" in out, err
    rows = [int(row["steps"]) for row in csv.DictReader((run / "metrics.csv").open())]
    assert rows == list(range(64, 1025, 64))
    assert command("evaluate", "run=run", "episodes=2")[0] == 0 and (run / "summary.json").exists()
    assert not (run / NAME).exists()


def piped(folder: Path, reader: str, *arguments: str) -> tuple[int, str]:
    """The exit code and the errors of a training whose output goes to another command."""
    line = " ".join([sys.executable, str(ROOT / "scripts" / "train.py"), *arguments])
    script = f"{line} | {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("more", [[], pytest.param(["-m", "seed=1,2"], marks=pytest.mark.long)], ids=["run", "sweep"])
def test_a_closed_pipe_does_not_end_the_run(tmp_path: Path, more: Sequence[str]) -> None:
    code, err = piped(tmp_path, "head -1", *more[:1], *POLE, *more[1:])
    assert code == 0 and "standard output is lost (Broken pipe); going on without it" in err
    assert "Traceback" not in err and "Exception ignored" not in err
    summaries = list(tmp_path.glob("runs/*/*/summary.json"))
    assert len(summaries) == (2 if more else 1)
    assert all('"status": "finished"' in path.read_text() for path in summaries)


@pytest.mark.parametrize("name", ["q[/y]", "[red]x", "a:smile:b"])
def test_names_are_printed_as_they_are(command: Cli, name: str) -> None:  # noqa: F811
    code, out, _ = command("train", *POLE, f"hydra.run.dir='{name}'")
    assert code == 0 and out.rstrip().endswith(f"| {name}")
    code, out, _ = command("train", f"resume='{name}'", "total_steps=1100")
    assert code == 0 and out.rstrip().endswith(f"| {name}")
    if "/" not in name:
        last = checkpoint.numbered(command.folder / name)[-1]
        last.write_bytes(b"damaged")
        assert f"passed over: {name}/checkpoints/{last.name}" in command("evaluate", f"run='{name}'", "episodes=1")[1]


def test_a_refused_lock_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to("/")
    with pytest.raises(UserError, match="is a link"):
        RunLock().take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
