"""Evaluations end, whatever the environment and whenever they are asked to."""

import io
import json
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_cli import TINY, Cli, command  # noqa: F401
from toys import PointMass

from pgsuite.app.evaluate import Progress, play
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Policy
from pgsuite.training.callbacks import EvaluationStoppedError, ProgressBar
from pgsuite.training.trainer import RecentReturns, Report

ENDLESS = ["env=gym", "env.id=CliffWalking-v1", *TINY, "total_steps=128", "hydra.run.dir=run"]


@pytest.mark.usefixtures("command")
def test_episodes_without_an_end_are_cut_counted_and_said(command: Cli) -> None:  # noqa: F811
    code, out, err = command(
        "train", *ENDLESS, "evaluation.every=64", "evaluation.max_steps=30", "evaluation.episodes=3"
    )
    assert code == 0, err
    assert "evaluation at 64 steps: 3 of 3 episodes cut at 30 steps (max_steps)" in out
    found = json.loads((command.folder / "run" / "summary.json").read_text())["evaluation"]
    assert found["cut"] == found["stochastic_cut"] == 3 and found["length"] == 30
    code, out, err = command("evaluate", "run=run", "episodes=2", "max_steps=40")
    assert code == 0 and "2 of 2 episodes cut at 40 steps" in out, err
    found = json.loads((command.folder / "run" / "evaluation.json").read_text())
    assert found["cut"] == 2 and found["lengths"] == [40, 40]


def toy() -> tuple[Policy, PointMass]:
    env = PointMass(2, max_episode_steps=50)
    return Policy(Standardize(env.observation_space), env.action_space, hidden=(4,)), env


def test_what_ends_by_itself_is_not_cut() -> None:
    policy, env = toy()
    played = play(policy, env, torch.Generator(), deterministic=True)
    assert played.cut == 0 and not played.said() and np.all(played.lengths.numpy() == 50)
    env.max_episode_steps = None  # pyright: ignore[reportAttributeAccessIssue]
    assert play(policy, toy()[1], torch.Generator(), deterministic=True).limit == 50


def test_an_evaluation_stops_between_two_steps_when_asked() -> None:
    policy, env = toy()
    steps: list[int] = []
    with pytest.raises(EvaluationStoppedError):
        play(
            policy,
            env,
            torch.Generator(),
            deterministic=True,
            watch=lambda: steps.append(1),
            stop=lambda: len(steps) == 7,
        )
    assert len(steps) == 7


def test_a_signal_is_answered_during_an_evaluation(command: Cli) -> None:  # noqa: F811
    """It would take 30,000 steps, twice, at each evaluation; the run is saved at once."""
    from pgsuite.app import evaluate

    real, calls = evaluate.play, []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(1)
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **options)  # pyright: ignore[reportArgumentType]

    command.monkeypatch.setattr(evaluate, "play", interrupted)
    code, out, err = command("train", *ENDLESS, "total_steps=1280", "evaluation.every=64")
    assert code == 128 + signal.SIGTERM and "SIGTERM at 128 steps, saved" in out, err
    assert len(calls) == 1 and "cut at" not in out
    assert (command.folder / "run" / "checkpoints" / "000000000128.pt").is_file()


def test_wrappers_of_a_run_are_those_of_its_evaluation(command: Cli) -> None:  # noqa: F811
    wrappers = "env.wrappers=[{gymnasium.wrappers.FilterObservation: {filter_keys: [at]}},test_gym_env.Doubled]"
    own = ["env=gym", "env.id=Mission-v0", "env.import=test_gym_env", wrappers, *TINY, "hydra.run.dir=run"]
    code, _, err = command("train", *own, "env.max_episode_steps=9")
    assert code == 0, err
    code, out, err = command("evaluate", "run=run", "episodes=2")
    assert code == 0 and "return 18.0 +- 0.0" in out, err


def test_a_long_evaluation_says_how_far_it_is() -> None:
    policy, env = toy()
    said: list[str] = []
    play(policy, env, torch.Generator(), deterministic=True, progress=Progress("filming", said.append, seconds=0.0))
    assert said[0] == "filming: 0 steps, 2 of 2 episodes under way" and len(said) == 50


def test_the_speed_of_a_run_is_that_of_training() -> None:
    """Not of the evaluations and films between its iterations."""
    said: list[str] = []
    bar = ProgressBar(SimpleNamespace(is_terminal=False, is_jupyter=False, print=lambda x, **_: said.append(x)))  # pyright: ignore
    recent = RecentReturns([], "last tenth", 100)
    trainer: Any = SimpleNamespace(steps=0, total_steps=1000, seconds={"total": 5.0}, recent_returns=recent)
    bar.on_start(trainer)
    trainer.seconds["total"] += 2.0
    bar.on_iteration(trainer, Report(0, 500, {}, [], [], True))
    assert len(said) == 1 and said[0].startswith("500 steps | 250 steps/s | ") and said[0].endswith(" | 2 s left")


def test_a_bar_does_not_go_through_all_returns_in_each_iteration() -> None:
    """But at its refreshes and in the end."""
    counted = []

    class Counted:
        steps, total_steps, seconds, stop = 0, 1000, {"total": 5.0}, 0

        @property
        def recent_returns(self) -> RecentReturns:
            counted.append(1)
            return RecentReturns([1.0, 2.0], "last tenth", 100)

    trainer: Any = Counted()
    for refresh, expected in ((60.0, 2), (0.0, 10)):
        counted.clear()
        bar = ProgressBar(Console(file=io.StringIO(), force_terminal=True), refresh=refresh)
        bar.on_start(trainer)
        for steps in range(100, 1001, 100):
            bar.on_iteration(trainer, Report(steps - 100, steps, {}, [], [], True))
        assert bar.bar is not None and bar.bar.tasks[0].completed == 1000
        bar.on_end(trainer)
        assert len(counted) == expected
