"""A run begins with what another learned, says what it took, and is evaluated in changed environments."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import TINY, Cli, command, trained_in  # noqa: F401

from pgsuite.app.build import build, parse_run_config
from pgsuite.app.initialize import initialize
from pgsuite.training import checkpoint


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_in(
        tmp_path_factory.mktemp("pendulum"),
        "env=Pendulum",
        "~tuned",
        *TINY,
        "policy.recurrent=gru",
        "algo.minibatches=2",
    )


def trainer_like(run: Path, **changes: object) -> tuple[dict[str, dict[str, torch.Tensor]], object]:
    state = checkpoint.newest(run, print)[1]
    return state["algorithm"], build(parse_run_config(state["config"] | {"seed": 5, "num_envs": 8} | changes))


def test_policy_critic_and_statistics_are_those_of_the_other_run(pendulum: Path) -> None:
    learned, trainer = trainer_like(pendulum, reference={"_target_": "pgsuite.app.schema.Reference", "coef": 0.1})
    lines: list[str] = []
    initialize(trainer, str(pendulum), lines.append)  # pyright: ignore[reportArgumentType]
    parts = trainer.algorithm.parts  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("policy", "critic", "reward_scale"):
        for key, x in parts[name].state_dict().items():
            if key in ("hidden_state", "discounted_return"):
                assert not x.any()  # of environments that have not begun
            else:
                assert torch.equal(x, learned[name][key]), key
    assert torch.equal(parts["reference"].policy.out.weight, learned["policy"]["out.weight"])
    assert lines[0].endswith("at 1,024 steps") and any("policy: took" in x and "out" in x for x in lines)
    assert not any("left" in x for x in lines)


def test_what_does_not_fit_is_left_and_said(pendulum: Path, command: Cli) -> None:  # noqa: F811
    """A statistic is taken whole or not at all: a count without its mean would be wrong."""
    shutil.copytree(pendulum, "first")
    code, out, err = command(
        "train", "env=MountainCarContinuous", "~tuned", *TINY, "init=first", "hydra.run.dir=second"
    )
    assert code == 0, err
    assert "begins from first/checkpoints/000000001024.pt at 1,024 steps" in out
    assert "policy: left body.obs_norm.moments as it is, whose mean is (3,) there and (2,) here" in out
    assert "policy: did not take body.recurrence" in out and "policy: took body.hidden.2, out, head" in out
    _, trainer = trainer_like(command.folder / "second", init=None)
    lines: list[str] = []
    initialize(trainer, "first", lines.append)  # pyright: ignore[reportArgumentType]
    moments = trainer.algorithm.policy.obs_norm.moments  # pyright: ignore[reportAttributeAccessIssue]
    assert moments.count < 1 and not moments.mean.any()


def test_a_run_that_is_not_there_or_does_not_fit_leaves_no_files(pendulum: Path, command: Cli) -> None:  # noqa: F811
    shutil.copytree(pendulum, "first")
    narrow = [
        "policy.hidden=[3]",
        "policy.activation=relu",
        "scale_reward=false",
        "algo=reinforce",
        "algo.baseline=none",
    ]
    cartpole = ["env=CartPole", "num_envs=2", "total_steps=1000", "~tuned", *narrow]
    for given, message in (("init=nowhere", "no run directory nowhere"), ("init=first", "nothing in first/")):
        code, _, err = command("train", *cartpole, given, "hydra.run.dir=second")
        assert code == 1 and message in err and err.strip().count("\n") == 0
        assert not (command.folder / "second").exists()


def test_evaluation_takes_settings_of_the_environment(pendulum: Path, command: Cli) -> None:  # noqa: F811
    shutil.copytree(pendulum, "run")
    code, _, err = command("evaluate", "run=run", "episodes=2", "env.max_episode_steps=20")
    assert code == 0, err
    found = json.loads(Path("run/evaluation.json").read_text())
    assert found["lengths"] == [20, 20] and found["env"] == {"max_episode_steps": 20}
    code, _, err = command("evaluate", "run=run", "env.max_episode_step=20")
    assert code == 1 and "no setting 'max_episode_step' in env; did you mean max_episode_steps" in err


def test_options_of_a_gymnasium_environment_change_in_an_evaluation(command: Cli) -> None:  # noqa: F811
    lake = ["env=gym", "env.id=FrozenLake-v1", "+env.options.map_name=4x4", *TINY, "hydra.run.dir=run"]
    code, _, err = command("train", *lake)
    assert code == 0, err
    code, _, err = command("evaluate", "run=run", "episodes=2", "env.options.is_slippery=false")
    assert code == 0, err
    assert json.loads(Path("run/evaluation.json").read_text())["env"] == {"options": {"is_slippery": False}}
    code, _, err = command("evaluate", "run=run", "episodes=2", "env.options.map_name=8x8")
    assert code == 1 and "has observations Box" in err and "and the policy was trained with Box" in err
