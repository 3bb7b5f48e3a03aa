"""Numbers of threads that are measured before a run, and are then as if they had been given."""

from dataclasses import replace
from types import SimpleNamespace

import kills
import pytest
import torch
import yaml
from test_cli import TINY, Cli, command  # noqa: F401

from pgsuite.app import threads
from pgsuite.app.schema import Run
from pgsuite.envs.physics import mujoco_batch

CHEETAH = ["env=HalfCheetah", "env.max_episode_steps=30", *TINY, "total_steps=200"]


def test_a_run_of_measured_threads_is_the_run_of_those_numbers(
    command: Cli,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "WARM", 0)
    monkeypatch.setattr(threads, "ROUNDS", 1)
    monkeypatch.setattr(mujoco_batch, "usable_cores", lambda: 2)
    code, out, _ = command("train", *CHEETAH, "torch_threads=measure", "hydra.run.dir=one")
    config = yaml.safe_load((command.folder / "one" / "config.yaml").read_text())
    numbers = config["torch_threads"], config["env_threads"]
    assert code == 0 and f"takes {numbers[0]} + {numbers[1]}\n" in out
    assert out.index("an iteration with torch + physics threads") < out.index("env HalfCheetah")
    given = [f"torch_threads={numbers[0]}", f"env_threads={numbers[1]}"]
    assert command("train", *CHEETAH, *given, "hydra.run.dir=two")[0] == 0
    one, two = (kills.left_behind(command.folder / run) for run in ("one", "two"))
    assert not kills.differences(one, two)


def test_a_run_goes_on_with_the_threads_that_were_measured_for_it(command: Cli) -> None:  # noqa: F811
    """Whatever would be measured now."""
    arguments = ["env=CartPole", *TINY, "hydra.run.dir=run", "resume=auto", "checkpoint.every=250"]
    assert command("train", *arguments, "env_threads=3")[0] == 0
    (command.folder / "run" / "summary.json").unlink()
    (command.folder / "run" / "checkpoints" / "000000001024.pt").unlink()
    code, out, _ = command("train", *arguments, "torch_threads=measure")
    assert code == 0 and "resumed at 768 steps | exact" in out and "an iteration with" not in out
    config = yaml.safe_load((command.folder / "run" / "config.yaml").read_text())
    assert (config["torch_threads"], config["env_threads"]) == (1, 3)
    code, _, err = command("train", "resume=run", "torch_threads=measure", "total_steps=2000")
    assert code == 1 and "torch_threads cannot change where a run goes on" in err


@pytest.mark.parametrize("backend", ["mujoco", "torch"])
def test_the_fastest_pair_is_taken_whatever_disturbs_a_single_iteration(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, order, given = [0.0], [], torch.get_num_threads()

    class Copy:
        def __init__(self, run: Run) -> None:
            self.env_threads = run.env_threads
            self.collector = SimpleNamespace(env=SimpleNamespace(backend=backend), wait=lambda: None)

        def iterate(self) -> None:
            order.append(pair := (torch.get_num_threads(), self.env_threads))
            disturbed = len(order) in (3, 30) or order.count(pair) <= threads.WARM
            clock[0] += 100.0 if disturbed else abs(pair[0] - 2) + abs(pair[1] - 4) + 1

    run, said = Run(torch_threads="measure", seed=7), []
    monkeypatch.setattr(threads, "build", Copy)
    monkeypatch.setattr(threads, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(mujoco_batch, "usable_cores", lambda: 6)
    try:
        found = threads.measured(run, said.append)
    finally:
        torch.set_num_threads(given)
    pairs = [(t, e) for t in (1, 2, 4, 6) for e in ((1, 2, 4, 6) if backend == "mujoco" else (0,))]
    assert order == pairs * (threads.WARM + threads.ROUNDS)
    assert found == replace(run, torch_threads=2, env_threads=4 if backend == "mujoco" else 0)
    assert len(said) == 1 and said[0].endswith("takes 2 + 4" if backend == "mujoco" else "takes 2")
    assert threads.measured(found, said.append) is found and len(said) == 1
