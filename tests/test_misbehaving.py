"""Whatever an environment does wrong, it is answered in one message that says what and where."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import misbehaving
import pytest
from toys import mostly_long

from pgsuite.envs import BrokenEnvError, Gym, make
from pgsuite.errors import UserError


@pytest.fixture(autouse=True)
def in_workshop() -> Iterator[None]:
    with misbehaving.workshop():
        yield


SAMPLE = [
    "reward of shape (2,)",
    "terminated None",
    "old step under a time limit",
    "step opens a missing file",
    "observation of another shape",
    "image of floats",
    "images with dots and names of torch",
    "old reset",
    "reset NaN",
    "constructor raises",
    "a package divides by zero",
    "a module with an error of syntax",
    "too many workers",
    "render_fps None",
]


@pytest.mark.parametrize("name", mostly_long(SAMPLE, *SAMPLE[::2]))
def test_a_misbehaviour_is_answered_in_one_message(name: str) -> None:
    assert not misbehaving.attempt(name, ways=[0]).wrong


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in misbehaving.CASES if name not in SAMPLE])
def test_every_misbehaviour_is_answered_in_one_message(name: str) -> None:
    assert not misbehaving.attempt(name).wrong


def world(case: str, **settings: object) -> Gym:
    return Gym(id="Odd-v0", import_="misbehaving", options={"case": case}, **settings)  # pyright: ignore[reportArgumentType]


def test_the_place_is_the_innermost_frame_of_a_users_file_and_the_rest_comes_from_workers_too() -> None:
    """HYDRA_FULL_ERROR=1 shows the causes of an error."""
    line = 1 + Path(misbehaving.__file__).read_text().splitlines().index("    return Path(name).read_text()")
    for workers in (0, 1):
        with pytest.raises(ValueError, match=rf"misbehaving\.py:{line}: gymnasium cannot make") as raised:
            make(world("constructor opens a missing file", workers=workers), 1)
        cause = raised.value.__cause__
        assert isinstance(cause, BrokenEnvError)
        assert isinstance(cause.__cause__, FileNotFoundError) or "in read_text" in str(cause.__cause__)


def test_a_worker_that_hangs_is_named_and_ended() -> None:
    with pytest.raises(ValueError, match=r"worker of environments 0 to 0 has not answered for 0\.2 s"):
        make(world("a constructor that hangs", workers=2, timeout=0.2), 2)


HANG = """
import misbehaving, torch
from pgsuite.envs import Gym, make
env = make(Gym(id="Odd-v0", import_="misbehaving", options={"case": "a step that hangs"}, workers=1), 1)
env.reset()
for _ in range(2):
    env.step(torch.zeros(1, dtype=torch.long))
print(env.vec.processes[0].pid, flush=True)
env.step(torch.zeros(1, dtype=torch.long))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at the state of a process")
def test_a_worker_that_hangs_ends_with_its_parent() -> None:
    path = os.pathsep.join([str(Path(misbehaving.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    parent = subprocess.Popen([sys.executable, "-c", HANG], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = Path("/proc", parent.stdout.readline().strip(), "stat")
    assert worker.exists()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    # In a container without an init process, what has ended may stay as a zombie.
    while worker.exists() and worker.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "an orphan is left"
        time.sleep(0.05)


@pytest.mark.long
def test_a_run_exits_though_its_workers_were_not_closed() -> None:
    code = HANG.replace("a step that hangs", "reward true")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60, capture_output=True)


def test_the_module_of_a_user_is_named_where_it_fails() -> None:
    from pgsuite.app.schema import locate

    with pytest.raises(UserError, match=r"broken_import\.py:1: NameError"):
        locate("broken_import.Mine")
