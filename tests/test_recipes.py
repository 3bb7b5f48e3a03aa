"""What is said where a recipe and the user's other choices exclude each other."""

from pathlib import Path
from typing import Any

import pytest
import toys
import yaml
from test_cli import ROOT, Cli, command  # noqa: F401

import pgsuite

HEAD = "from pgsuite.nn.heads import BetaHead\n\n\nclass Own(BetaHead):\n    pass\n"
TINY = ["env=HalfCheetah", "total_steps=8", "num_envs=2", "horizon=4", "algo.minibatches=1", "hydra.run.dir=run"]
OURS = "policy.log_sigma is for Gaussian policies, and this one is"


@pytest.fixture
def own(command: Cli) -> Cli:  # noqa: F811
    (command.folder / "a_head.py").write_text(HEAD)
    command.monkeypatch.syspath_prepend(command.folder)
    return command


@pytest.mark.long
@pytest.mark.parametrize("head", ["a_head.Own", "beta"])
def test_a_head_that_a_recipe_does_not_fit_is_told_of_the_recipe(own: Cli, head: str) -> None:
    code, _, err = own("train", *TINY, f"policy.distribution={head}")
    gives = "; the recipe ppo-HalfCheetah gives policy.log_sigma=-1.0: policy.log_sigma=null leaves that out"
    assert code == 1 and f"{OURS} {head}" in err and gives in err and ": leave it out" not in err
    for folder, remedy in {"a": "policy.log_sigma=null", "b": "~tuned"}.items():
        code, _, err = own("train", *TINY, f"policy.distribution={head}", remedy, f"hydra.run.dir={folder}")
        assert code == 0, err


def test_what_the_user_gave_is_not_put_down_to_the_recipe(own: Cli) -> None:
    code, _, err = own("train", *TINY, "policy.distribution=beta", "policy.log_sigma=-2")
    assert code == 1 and err.rstrip().endswith(": leave it out") and "recipe" not in err
    code, _, err = own("train", *TINY, "policy.hidden=[0]")
    assert code == 1 and "recipe" not in err


def test_python_is_told_of_the_recipe_as_well(own: Cli) -> None:
    given: dict[str, Any] = {"policy.distribution": "beta"}
    with pytest.raises(pgsuite.UserError, match=r"the recipe ppo-HalfCheetah gives policy\.log_sigma=-1"):
        pgsuite.train("ppo", "HalfCheetah", **given)
    assert not [path for path in own.folder.glob("runs/*") if path.is_dir()]


def test_any_setting_that_a_message_names_is_put_down_to_the_recipe_that_gave_it(own: Cli) -> None:
    code, _, err = own("train", "env=Hopper", "policy.recurrent=gru", "num_envs=3")
    assert code == 1 and "4 minibatches do not divide a batch of 3" in err
    assert "the recipe ppo-Hopper gives algo.minibatches=4: algo.minibatches=16 leaves that out" in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["algo=trpo", "env=Pendulum", "algo/estimator=n_step"],
            "trpo-Pendulum does not go with the other choices: no",
        ),
        (["env=Pendulum", "tuned=trpo-Pendulum"], "no setting 'max_kl' in algo"),
    ],
)
def test_a_recipe_that_other_choices_have_no_room_for_is_named(own: Cli, given: list[str], said: str) -> None:
    code, _, err = own("train", *given)
    assert code == 1 and said in err and "~tuned leaves it out" in err and err.strip().count("\n") == 0


@pytest.mark.parametrize("given", toys.mostly_long([[], ["seeds=2"], ["sweep=search"], ["-m", "seed=0,1"]], []))
def test_a_recipe_that_does_not_exist_is_refused(own: Cli, given: list[str]) -> None:
    code, _, err = own("train", *given, *TINY[:-1], "tuned=ppo-Pendulm")
    assert code == 1 and "tuned=ppo-Pendulm: the name of one recipe belongs there; did you mean ppo-Pendulum" in err
    assert not [path for path in own.folder.glob("runs/*") if path.is_dir()]


@pytest.mark.parametrize("given", ["tuned=[]", "tuned=[ppo-Pendulum]"])
def test_a_list_of_recipes_is_refused(own: Cli, given: str) -> None:
    code, _, err = own("train", *TINY[:-1], given)
    assert code == 1 and f"{given}: the name of one recipe belongs there" in err


def test_python_refuses_a_recipe_that_does_not_exist(own: Cli) -> None:
    with pytest.raises(pgsuite.UserError, match="did you mean ppo-Pendulum"):
        pgsuite.train("ppo", "Pendulum", tuned="ppo-Pendulm", total_steps=8)


def test_a_configuration_of_the_users_own_is_named_with_its_mistake(own: Cli) -> None:
    path = Path("tuned/ppo_penalty-CartPole.yaml")
    path.parent.mkdir()
    path.write_text("# @package _global_\nalgo: {huber: 1}\n")
    code, _, err = own("train", "--config-dir", ".", "algo=ppo_penalty", "env=CartPole")
    assert code == 1 and "the recipe ppo_penalty-CartPole does not go with" in err
    assert "no setting 'huber' in algo; it is now called huber_delta" in err


def test_relatives_of_ppo_have_its_defaults() -> None:
    """Which stand in the files of each, and are chosen for PPO."""
    rows = []
    for algo in ("ppo", "ppo_penalty", "ppo_lagrangian", "spo"):
        config = yaml.safe_load((ROOT / f"configs/algo/{algo}.yaml").read_text())
        rows.append({name: config[name] for name in ("num_envs", "horizon", "algo")})
    assert all(row == rows[0] for row in rows)
