"""Runs survive: whatever stops one, it goes on as if nothing had been, and says so where it cannot."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import kills
import pytest
import torch
from test_cli import TINY, Cli, command, finished, own_run  # noqa: F401
from toys import ALL, BRIEF, PointMass, build, collector, mostly_long, put_back_alike

from pgsuite.algorithms import PPO
from pgsuite.errors import UserError
from pgsuite.training import checkpoint
from pgsuite.training.recovery import Recovery, clone
from pgsuite.training.trainer import Trainer

RUN = ["env=CartPole", "hydra.run.dir=run", *TINY, "checkpoint.every=250"]


@pytest.mark.parametrize("case", mostly_long(kills.METHODS, "ppo"))
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path: Path, case: str) -> None:
    """A handful of the trials of kills.py."""
    assert not kills.survive(case, kills.METHODS.index(case), tmp_path)


@pytest.mark.parametrize("cls", ALL)
def test_a_trainer_put_back_does_what_it_would_have_done(cls: type, tmp_path: Path) -> None:
    def trainer(seed: int) -> Trainer:
        env = PointMass(4, seed=seed)
        algorithm = build(cls, env, seed=seed, recurrent="lstm", **BRIEF[cls])
        return Trainer(algorithm, collector(algorithm, env, seed=seed), 10_000)

    one, two = trainer(1), trainer(2)
    for _ in range(3):
        one.step()
    put_back_alike(one, two, tmp_path / "x.pt")


@pytest.mark.parametrize("written", ["\0[1, 2\x80", "[3, {4: [null, x]}]", "a: b: c"])
@pytest.mark.parametrize(
    "given", mostly_long([[], ["resume=auto"], ["resume=auto", "torch_threads=measure"]], ["resume=auto"])
)
def test_a_directory_whose_settings_cannot_be_read_is_left_alone(command: Cli, written: str, given: list[str]) -> None:  # noqa: F811
    config = command.folder / "run" / "config.yaml"
    config.parent.mkdir()
    config.write_text(written, encoding="latin-1")
    code, _, err = command("train", *RUN, *given)
    assert code == 1 and "already holds a run" in err and err.count("\n") == 1
    assert config.read_text(encoding="latin-1") == written


@pytest.mark.parametrize("cls", ALL)
def test_going_back_takes_everything_back_but_the_pace_and_the_actions_to_come(cls: type, tmp_path: Path) -> None:
    env = PointMass(4)
    algorithm, said = build(cls, env, recurrent="gru", **BRIEF[cls]), []
    failure_handler = Recovery(tmp_path, {}, 1, said.append)
    trainer = Trainer(algorithm, collector(algorithm, env), 10_000, failure_handler=failure_handler)
    failure_handler.on_start(trainer)
    trainer.step()
    trainer.step()
    before = clone(trainer.training_state())
    with torch.no_grad():
        next(iter(algorithm.policy.parameters())).flatten()[0] = torch.nan
    trainer.step()
    paces = {"/algorithm/optimizer/lr_scale", "/algorithm/critic_optimizer/lr_scale"}
    allowed = {f"{path} differs" for path in (*paces, "/collector/generator")} | {
        "/recoveries: 0 is not 1",
        "/attempts: 0 is not 1",
        "/finite_iterations: 2 is not 0",
    }
    changed = set(kills.differences(before, trainer.training_state()))
    assert changed <= allowed and len(changed) == 4 + len(algorithm.optimizers) and len(said) == 1
    assert not kills.differences(trainer.training_state(), failure_handler.good)
    trainer.step()
    assert trainer.steps > before["steps"] and bool(algorithm.finite())


def test_whole_numbers_among_the_statistics_are_finite_and_lost_ones_are_seen() -> None:
    algorithm = build(PPO, PointMass(4))
    algorithm.policy.register_buffer("count", torch.tensor(3))
    assert bool(algorithm.finite())
    algorithm.policy.obs_norm.moments.var[0] = torch.inf
    assert not bool(algorithm.finite())


def test_what_the_comparison_would_see() -> None:
    x = {"a": [torch.tensor([0.0, 1.0])], "b": 1}
    assert not kills.differences(x, {"a": [torch.tensor([0.0, 1.0])], "b": 1})
    assert kills.differences(x, {"a": [torch.tensor([-0.0, 1.0])], "b": 1}) == ["/a/0 differs"]
    assert kills.differences(x, {"a": [torch.tensor([0.0, 1.0])]}) == ["/b is in one alone"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_how_to_go_on_and_has_its_exit_code(tmp_path: Path, how: signal.Signals) -> None:
    long = ["env=CartPole", "num_envs=4", "horizon=16", "total_steps=10_000_000", "hydra.run.dir=run"]
    process = kills.start(tmp_path, [*long, "checkpoint.every=64"])
    try:
        while not list(tmp_path.glob("run/checkpoints/*.pt")):
            assert process.is_alive()
            time.sleep(0.05)
        os.kill(process.pid, how)
        process.join(60)
    finally:
        process.kill()
    said = (tmp_path / "output.txt").read_text()
    assert process.exitcode == {signal.SIGTERM: 143, signal.SIGINT: 0}[how], said
    last = said.splitlines()[-1]
    assert last.startswith(f"{how.name} at") and "saved; go on with: python scripts/train.py resume=run" in last
    assert "Traceback" not in said and "error" not in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    state = checkpoint.load(checkpoint.numbered(tmp_path / "run")[-1])
    assert summary["status"] == "interrupted" and summary["steps"] == state["steps"] > 0


@pytest.mark.usefixtures("own_run")
def test_what_may_not_change_where_a_run_goes_on_is_refused_by_name(command: Cli) -> None:  # noqa: F811
    for change, key in (
        ("algo.clip=0.1", "algo.clip"),
        ("seed=1", "seed"),
        ("algo=trpo", "algo"),
        ("algo/estimator=vtrace", "algo/estimator"),
        ("num_envs=8", "num"),
    ):
        code, _, err = command("train", "resume=run", change)
        assert code == 1 and f"error: {key}" in err and "only total_steps, checkpoint, recover" in err
    code, out, _ = command("train", "resume=run", "env=CartPole", "num_envs=4", "total_steps=1500", "logging.points=7")
    assert code == 0 and "resumed at 1,024 steps | exact" in out
    assert json.loads((command.folder / "run" / "summary.json").read_text())["steps"] == 1536
    assert "points: 7" in (command.folder / "run" / "config.yaml").read_text()
    code, out, _ = command("train", "resume=run")
    assert code == 0 and "has made all its 1,536 steps" in out
    assert not (command.folder / "runs").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("env.options.level=2", "env.options.level cannot change where a run goes on, only total_steps, checkpoint"),
        ("env.id=Pendulum-v1", "env.id cannot change where a run goes on"),
        ("algo/estimator=none", "algo/estimator cannot change where a run goes on"),
        ("evaluation.evry=3", "no setting 'evry' in evaluation; did you mean every"),
        ("policy=[0]", "policy=[0]: a group takes the name"),
    ],
)
def test_settings_of_a_resumed_run_are_not_held_to_another_environment(command: Cli, change: str, words: str) -> None:  # noqa: F811
    code, _, err = command("train", "resume=a_run_of_gym", change)  # composed with HalfCheetah, which has no options
    assert code == 1 and f"error: {words}" in err and "ctrl_cost_weight" not in err


def test_auto_goes_on_with_the_newest_run_of_the_same_settings_or_begins_one(command: Cli) -> None:  # noqa: F811
    plain = [*RUN[:1], *RUN[2:], "resume=auto"]
    assert "resumed" not in command("train", *plain)[1]
    (run,) = (command.folder / "runs" / "ppo-CartPole").iterdir()
    assert "has made all its 1,024 steps" in command("train", *plain, "logging.points=3")[1]
    assert list(run.parent.iterdir()) == [run]
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "running"}))  # killed at its very end
    (run / "checkpoints" / "000000001024.pt").unlink()
    assert "resumed at 768 steps | exact" in command("train", *plain)[1]
    assert json.loads((run / "summary.json").read_text())["return_mean"] == summary["return_mean"]
    assert "resumed" not in command("train", *plain, "seed=1")[1]
    assert len(list(run.parent.iterdir())) == 2


@pytest.mark.parametrize("harm", ["truncated", "altered", "hostile"])
def test_a_damaged_checkpoint_is_passed_over_by_name(command: Cli, own_run: Path, harm: str) -> None:  # noqa: F811
    *_, before, last = checkpoint.numbered(own_run)
    data = last.read_bytes()
    if harm == "truncated":
        last.write_bytes(data[:-100])
    elif harm == "altered":
        last.write_bytes(data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])
    else:

        class Hostile:
            def __reduce__(self) -> tuple[object, ...]:
                return os.system, (f"touch {command.folder}/broken_into",)

        checkpoint.save({"steps": Hostile()}, last)  # even with a checksum that is right
    code, out, err = command("train", "resume=run", "total_steps=1100")
    assert code == 0, err
    assert f"passed over: run/checkpoints/{last.name}" in out and f"resumed at {int(before.stem):,} steps" in out
    assert not (command.folder / "broken_into").exists()
    with pytest.raises(UserError, match=r"refused unopened|checksum"):
        checkpoint.load(last.with_suffix(".aside"))


def test_any_changed_bit_is_noticed(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.pt", {"x": torch.arange(5.0), "y": "word"}
    checkpoint.save(whole, path)
    assert torch.load(path, weights_only=True)["y"] == "word"
    data = path.read_bytes()
    for i in range(0, len(data), 37):
        path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
        with pytest.raises(UserError, match="checksum"):
            checkpoint.load(path)


def test_the_last_few_checkpoints_and_the_best_are_kept(command: Cli) -> None:  # noqa: F811
    scored = ["evaluation.every=250", "evaluation.episodes=2", "checkpoint.keep=2", "total_steps=3000"]
    assert command("train", *RUN[:2], *TINY, "checkpoint.every=250", *scored)[0] == 0
    run = command.folder / "run"
    best = json.loads((run / "summary.json").read_text())["evaluation"]["best"]
    assert [path.stem for path in checkpoint.numbered(run)] == ["000000002752", "000000003008"]
    assert checkpoint.load(run / "checkpoints" / "best.pt")["steps"] == best["steps"]
    assert command("evaluate", "run=run/checkpoints/best.pt", "episodes=2")[0] == 0


def test_evaluating_changes_nothing_in_the_run(command: Cli) -> None:  # noqa: F811
    """Not one bit, though it plays, films and saves."""
    cheetah = ["env=HalfCheetah", "env.max_episode_steps=30", *TINY, "checkpoint.every=250"]
    assert command("train", *cheetah, "hydra.run.dir=one")[0] == 0
    scored = ["evaluation.every=200", "evaluation.episodes=2"]
    assert command("train", *cheetah, *scored, "hydra.run.dir=two")[0] == 0
    one, two = (checkpoint.load(checkpoint.numbered(command.folder / x)[-1]) for x in ("one", "two"))
    for part in ("algorithm", "collector", "tracker", "finished"):
        assert not kills.differences(one[part], two[part])
    assert "evaluation/return" in (command.folder / "two" / "evaluation.csv").read_text()


def test_environments_that_cannot_be_saved_go_on_with_new_episodes(command: Cli) -> None:  # noqa: F811
    gym = ["env=gym", "env.id=CartPole-v1", "hydra.run.dir=run", *TINY]
    assert command("train", *gym, "total_steps=500")[0] == 0
    shutil.copytree(command.folder / "run", command.folder / "twin")
    for run in ("run", "twin"):
        out = command("train", f"resume={run}", "total_steps=1000")[1]
        assert "resumed at 512 steps | episode: its environments cannot be saved and begin new episodes" in out
    one, two = (kills.left_behind(command.folder / run) for run in ("run", "twin"))
    assert not kills.differences(one, two)  # and even so the same every time
    assert json.loads((command.folder / "run" / "summary.json").read_text())["resume"] == "episode"
