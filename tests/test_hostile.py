"""A file that is no whole checkpoint of ours does nothing but be refused, in one message, wherever it is given."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import Cli
from test_cli import command as command
from test_export import save

import pgsuite
from pgsuite.runtime import checkpoint
from pgsuite.runtime.schema import UserError


class Hostile:
    """Makes a directory where it is unpickled carelessly."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def spoil(path: Path, how: str, harm: Path) -> None:
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
        torch.save({**state, "algorithm": Hostile(harm)}, path)
    elif how == "a hostile pickle":
        torch.save({**state, "algorithm": Hostile(harm)}, path, _use_new_zipfile_serialization=False)
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
    if how in ("hostile", "a tensor", "another format", "of nothing"):
        with path.open("r+b") as file:
            checkpoint.seal(file)  # so that it is not for its checksum that it is refused


KINDS = ["a directory", "empty", "text", "hostile", "a hostile pickle", "a tensor", "another format", "of nothing"]
KINDS += ["a dangling link", *(f"cut {i}" for i in range(6)), *(f"altered {i}" for i in range(2))]


@pytest.mark.parametrize("how", KINDS)
def test_what_is_no_checkpoint_is_refused_everywhere(command: Cli, how: str) -> None:
    path, harm = save(command.folder, "gaussian"), command.folder / "broken_into"
    spoil(path, how, harm)
    before = sorted(command.folder.rglob("*"))
    for name, key, *more in (("train", "resume"), ("evaluate", "run"), ("export", "run", "format=torch")):
        code, out, err = command(name, f"{key}={path.relative_to(command.folder)}", *more)
        assert code == 1 and err.startswith("error: ") and "Traceback" not in out + err, err
        assert err.strip().count("\n") == 0 and path.name in err and len(err) < 600, err
    with pytest.raises(UserError) as refused:
        pgsuite.load(path)
    assert path.name in str(refused.value) and "\n" not in str(refused.value)
    assert not harm.exists() and sorted(command.folder.rglob("*")) == before


def test_such_a_file_does_harm_when_loaded_carelessly(tmp_path: Path) -> None:
    """The test above proves nothing otherwise."""
    torch.save(Hostile(tmp_path / "broken_into"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "broken_into").is_dir()
