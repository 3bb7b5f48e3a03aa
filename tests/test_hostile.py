"""A file that is no whole checkpoint of ours does nothing but be refused, in one message, wherever it is given."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from test_export import save
from toys import mostly_long

import pgsuite
from pgsuite.errors import UserError
from pgsuite.training import checkpoint

HARM = Path("broken_into")  # what a hostile file would make


class Hostile:
    """Makes a directory where it is unpickled carelessly."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(HARM),)


def spoil(path: Path, how: str) -> None:
    """Put something else in a checkpoint's place."""
    data, draw = path.read_bytes(), random.Random(how)
    state = torch.load(path, weights_only=True)
    path.unlink()
    if how == "a directory":
        path.mkdir()
    elif how == "empty":
        path.touch()
    elif how == "text":
        path.write_text("[1, 2, 3]")
    elif how == "hostile":
        torch.save({**state, "algorithm": Hostile()}, path)
    elif how == "of the old kind":
        torch.save({**state, "algorithm": Hostile()}, path, _use_new_zipfile_serialization=False)
    elif how == "a bare pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    elif how == "a tensor":
        torch.save(torch.zeros(3), path)
    elif how == "another format":
        torch.save({**state, "format": 99}, path)
    elif how == "of nothing":
        torch.save({"format": state["format"]}, path)
    elif how == "a dangling link":
        path.symlink_to("nowhere")
    elif how.startswith("cut"):
        path.write_bytes(data[: draw.randrange(1, len(data))])
    else:  # altered where the pickle lies
        at = data.index(b"data.pkl") + draw.randrange(60, 200)
        path.write_bytes(data[:at] + draw.randbytes(40) + data[at + 40 :])
    if how in SEALED:
        with path.open("r+b") as file:
            checkpoint.seal(file)  # so that it is not for its checksum that it is refused


SEALED = ["hostile", "of the old kind", "a bare pickle", "a tensor", "another format", "of nothing"]
KINDS = [
    *SEALED,
    "a directory",
    "empty",
    "text",
    "a dangling link",
    "cut 0",
    "cut 1",
    "cut 2",
    "altered 0",
    "altered 1",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stamps(folder: Path) -> dict[Path, int]:
    """What there is, and when files changed."""
    return {path: 0 if path.is_dir() else path.lstat().st_mtime_ns for path in folder.rglob("*")}


def refuse(folder: Path, script: str, *arguments: str, naming: str) -> None:
    """One message that names what is refused, and nothing else."""
    before = stamps(folder)
    found = fuzz.answer(script, list(arguments))
    assert not found.wrong and found.kind == "UserError" and naming in found.said, found
    assert not HARM.exists() and stamps(folder) == before


@pytest.mark.parametrize("how", mostly_long(KINDS, *list(KINDS)[::2]))
def test_what_is_no_checkpoint_is_refused_everywhere(folder: Path, how: str) -> None:
    path = save(folder, "gaussian").relative_to(folder)
    spoil(path, how)
    doors = {"evaluate": "run", "train": "resume", "export": "run", "replay": "crash"}
    for script in doors if how in SEALED else ["evaluate"]:  # the others come no further than to their checksum
        refuse(folder, script, f"{doors[script]}={path}", naming=path.name)
    with pytest.raises(UserError) as refused:
        pgsuite.load(path)
    assert path.name in str(refused.value) and "\n" not in str(refused.value) and not HARM.exists()


def test_a_run_of_hostile_files_does_nothing_but_be_refused(folder: Path) -> None:
    """Whatever of it is given, and to whom."""
    home, small = Path("runs", "ppo-CartPole"), ["env=CartPole", *fuzz.SMALL, "horizon=16", "evaluation.every=160"]
    run = home / "old"
    fuzz.answer("train", [*small, "evaluation.episodes=1", f"hydra.run.dir={run}"], iterations=100)
    best = run / checkpoint.FOLDER / checkpoint.BEST
    assert best.is_file()
    files = [*run.glob("checkpoints/*.pt"), run / "crash.pt", run / "policy.pt2", run / "policy.onnx"]
    for path in files:
        path.unlink(missing_ok=True)
        path.write_bytes(pickle.dumps(Hostile()))
        with path.open("r+b") as file:
            checkpoint.seal(file)
    for name in ("config.yaml", "summary.json", "metrics.csv", "evaluation.csv"):
        (run / name).write_text(f"!!python/object/apply:os.mkdir [{HARM}]\n")

    last, crash, *exported = run / checkpoint.FOLDER / "000000000320.pt", run / "crash.pt", *files[-2:]
    doors = {"train": [run, last, best], "evaluate": [run, best, *exported], "export": [run], "replay": [run, crash]}
    for script, given in doors.items():
        for path in given:
            key = {"train": "resume", "replay": "crash"}.get(script, "run")
            refuse(folder, script, f"{key}={path}", naming=path.name if path.suffix else str(run))
    refuse(folder, "report", str(run), naming=str(run))
    for path in (run, best, *exported):
        with pytest.raises(UserError):
            pgsuite.load(path)
    found = fuzz.answer("train", [*small, "resume=auto"], iterations=100)  # which looks for a run, and finds none
    assert found.kind == "trained" and len(list(home.iterdir())) == 2 and not HARM.exists()


def test_such_a_file_does_harm_when_loaded_carelessly(folder: Path) -> None:
    """The tests above prove nothing otherwise."""
    torch.save(Hostile(), folder / "x.pt")
    torch.load(folder / "x.pt", weights_only=False)
    assert HARM.is_dir()
