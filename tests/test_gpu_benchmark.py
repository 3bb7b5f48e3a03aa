"""benchmarks/gpu.py proves on a GPU what cannot be proven here; but that no failure costs the rest can be."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GOOD, RAISES, HANGS, DIES, NOISY = (
    """print('{"steps/s": 1}')""",
    """from gpu_job import guarded; import json\nfor x in guarded((1 / 0 for _ in "a")): print(json.dumps(x))""",
    """import subprocess\nprint('{"begun": 1}', flush=True)\nsubprocess.run(["sleep", "60"])""",
    """import os\nprint('{"begun": 1}', flush=True)\nos.kill(os.getpid(), 11)""",
    """print('Warp 1.19 initialized')\nprint('3')\nprint('{"check": "it is so", "holds": false}')""",
)


@pytest.fixture
def gpu(benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS), prepend=os.pathsep)
    return benchmark("gpu")


def ran(gpu: Any, parts: list[Any], budget: float) -> list[dict[str, Any]]:
    """The lines of a schedule whose jobs are programs."""
    lines: list[dict[str, Any]] = []
    gpu.Schedule(lambda part, job, seconds: [sys.executable, "-c", job], lines.append).run(tuple(parts), budget)
    return lines


@pytest.mark.long
def test_a_job_that_hangs_dies_or_raises_costs_no_other(gpu: Any) -> None:
    """A time limit ends it with all that it started, and its lines until then are kept."""
    parts = [gpu.Part("first", 1, (HANGS, DIES, GOOD), at_once=3), gpu.Part("second", 5, (RAISES, NOISY, GOOD))]
    began = monotonic()
    lines = ran(gpu, parts, 24)
    assert monotonic() - began < 20
    ended = {(x["part"], x["job"]): x for x in lines if "ended" in x}
    assert ended["first", HANGS]["ended"] == "cut off" and ended["first", HANGS]["why"] == "its limit of 4 s"
    assert ended["first", DIES]["ended"] == "failed" and ended["first", DIES]["why"] == "exit code -11"
    assert ended["second", RAISES]["ended"] == "failed"
    assert all(ended[x]["ended"] == "ran" for x in (("first", GOOD), ("second", NOISY), ("second", GOOD)))
    assert [x["job"] for x in lines if "begun" in x] in ([HANGS, DIES], [DIES, HANGS])
    assert [x["failed"] for x in lines if "failed" in x] == ["ZeroDivisionError: division by zero"]
    found = gpu.summary(lines)
    assert found["do not hold"] == [{"part": "second", "job": NOISY, "check": "it is so", "holds": False}]


def test_time_that_a_part_leaves_goes_to_those_after_it(gpu: Any) -> None:
    limits: list[float] = []

    def command(part: str, job: str, seconds: float) -> list[str]:
        limits.append(seconds)
        return [sys.executable, "-c", GOOD]

    parts = (gpu.Part("first", 3, ("a", "b")), gpu.Part("second", 1, ("c",)), gpu.Part("third", 1, ("d",)))
    gpu.Schedule(command, lambda line: None).run(parts, 50)
    assert limits[0] == pytest.approx(15, abs=1) and limits[1] == pytest.approx(30, abs=2)
    assert limits[2] == pytest.approx(25, abs=2) and limits[3] == pytest.approx(50, abs=4)
    lines = ran(gpu, [gpu.Part("late", 1, (GOOD,))], 0)
    assert [(x["ended"], x["why"]) for x in lines] == [("cut off", "no time was left for it")]


def test_what_a_job_lacks_is_said_in_a_line(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = importlib.import_module("gpu_job")
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "jax_peer", raising=False)
    assert list(job.results("peer", "jax", "cuda", 1)) == [{"skipped": "jax is not installed"}]

    def lacking(what: Exception) -> Any:
        yield {"first": 1}
        raise what

    lines = list(job.guarded(lacking(job.Unavailable("torch sees no CUDA device")), worlds=4))
    assert lines == [{"worlds": 4, "first": 1}, {"worlds": 4, "skipped": "torch sees no CUDA device"}]
    assert list(job.guarded(lacking(ModuleNotFoundError("no hydra", name="hydra"))))[1] == {
        "failed": "ModuleNotFoundError: no hydra"
    }


def test_the_tables_are_made_of_whatever_was_measured(gpu: Any) -> None:
    tables = importlib.import_module("gpu_tables")
    rate = {"steps/s": 2e6, "from": 1e6, "to": 3e6}
    lines = [
        {"part": "versions", "job": "", "commit": "abc", "card": "GPU", "versions": {"torch": "2.11"}},
        {"part": "methods", "job": "ppo", "env": "CartPole", "check": "memory is flat", "holds": False},
        {"part": "methods", "job": "ppo", "env": "CartPole", "check": "replay equals eager", "holds": True},
        {"part": "speeds", "job": "Ant", "worlds": 4096, "what": "captured"} | rate,
        {"part": "speeds", "job": "Ant", "worlds": 4096, "what": "physics"} | rate,
        {"part": "target", "job": "HalfCheetah", "target": 5000, "reached": True, "steps": 9_000, "seconds": 9.5},
        {"part": "peer", "job": "jax", "seconds": 1, "ended": "skipped"},
    ]
    page = tables.tables(lines)
    assert (
        "| ppo | 1 of 2; not: memory is flat |" in page and "| Ant | 4096 | 2,000,000 |  | 2,000,000 | 1.00 |" in page
    )
    assert "HalfCheetah reached 5,000 in 9.5 s" in page and "Not measured: peer jax (skipped)." in page


def walk(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(x) for x in done.stdout.splitlines()]


def test_what_it_prints_is_what_it_writes(tmp_path: Path) -> None:
    code, lines = walk("--budget", "60", "--only", "versions", "--out", str(tmp_path / "there" / "some.jsonl"))
    assert code == 0 and lines[-1]["summary"] == {"versions": "ran"} and "torch" in lines[0]["versions"]
    assert [json.loads(x) for x in (tmp_path / "there" / "some.jsonl").read_text().splitlines()] == lines


@pytest.mark.long
def test_every_part_that_a_cpu_has_runs() -> None:
    """With more time than it needs, so that a busy machine does not cut it off."""
    code, lines = walk("--budget", "300")
    assert code == 0, lines[-1]
    assert set(lines[-1]["summary"].values()) <= {"ran", "skipped"} and lines[-1]["checks"] >= 7
    assert next(x["observation"]["worst"] for x in lines if x["part"] == "warp" and "check" in x) > 1e-6  # it moved
    assert {x["what"] for x in lines if "steps/s" in x} >= {"eager", "physics"}
