"""Settings that would be taken and do nothing are refused by name, and what changes nothing separates no runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from test_cli import Cli, command  # noqa: F401
from toys import mostly_long

from pgsuite import errors
from pgsuite.algorithms import PPO
from pgsuite.app.build import build, parse_run_config, to_dict
from pgsuite.app.cli import CONFIGS
from pgsuite.app.schema import locate, register, schema
from pgsuite.errors import UserError
from pgsuite.nn.normalize import ClipReward, RewardScale, WhitenReward
from pgsuite.reports import runs

SHORT = ["env=CartPole", "num_envs=4", "horizon=8", "total_steps=64"]


class Undecorated(PPO):
    nu: float = 1.0


@dataclass(kw_only=True, eq=False)
class Weighted(PPO):
    weights: Sequence[float] = (1.0, 2.0)
    table: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class Unshowable(PPO):
    shape: Callable[[float], float] = abs


def test_a_subclass_without_a_decorator_is_named_with_what_it_lacks() -> None:
    with pytest.raises(UserError, match=r"Undecorated declares nu but is no dataclass itself: write @dataclass"):
        locate(f"{__name__}.Undecorated")


def test_a_sequence_is_a_setting_and_a_type_that_none_can_have_is_named() -> None:
    assert {"weights", "table"} <= set(schema(Weighted).__dataclass_fields__)
    with pytest.raises(UserError, match=r"Unshowable.shape is of type .*Callable.*, which no setting can have"):
        schema(Unshowable)


def test_a_setting_that_a_method_inherits_and_does_not_use_is_none_of_its_own(command: Cli) -> None:  # noqa: F811
    code, _, err = command("train", "algo=ppo_penalty", *SHORT, "algo.dual_clip=3")
    assert code == 1 and "no setting 'dual_clip' in algo" in err


@pytest.mark.parametrize(
    ("given", "unused", "reason"),
    [
        (["critic.shared=true"], "critic.hidden=[8]", "critic.shared=true"),
        (["critic.shared=true"], "critic.body=my.Body", "critic.shared=true"),
        ([], "reference.penalty=loss", "reference.coef=null"),
        (["reference.coef=0.1"], "reference.horizon=5", "reference.target=null"),
        (["standardize_obs=false"], "clip_obs=5", "standardize_obs=false"),
        (["algo=reinforce", "horizon=null"], "critic.hidden=[8]", "algo.baseline=leave-one-out"),
        (["algo=reinforce", "horizon=null", "algo.baseline=none"], "algo.critic_lr=0.1", "algo.baseline=none"),
    ],
)
def test_settings_that_another_leaves_without_effect_are_refused(
    command: Cli,  # noqa: F811
    given: list[str],
    unused: str,
    reason: str,
) -> None:
    code, _, err = command("train", *SHORT, *given, unused, "hydra.run.dir=run")
    assert code == 1 and f"{unused.partition('=')[0]} would have no effect with {reason}: leave it out" in err
    assert not (command.folder / "run").exists()


def test_settings_that_take_effect_together_are_not_refused(command: Cli) -> None:  # noqa: F811
    together = ["algo=reinforce", "algo.baseline=critic", "algo.critic_lr=0.1", "critic.hidden=[8]", "horizon=null"]
    together += ["whiten_reward=true", "scale_reward=false", "clip_reward=5", "reference.coef=0.1"]
    code, _, err = command("train", *SHORT, *together, "reference.penalty=loss", "env.max_episode_steps=8")
    assert code == 0, err


@pytest.mark.parametrize(
    ("given", "kind", "clip"),
    [
        ([], RewardScale, 10.0),
        (["clip_reward=null"], RewardScale, None),
        (["whiten_reward=true", "scale_reward=false"], WhitenReward, 10.0),
        (["scale_reward=false"], None, None),
        (["scale_reward=false", "clip_reward=1"], ClipReward, 1.0),
    ],
    ids=str,
)
def test_rewards_are_clipped_as_the_settings_say(given: list[str], kind: Any, clip: float | None) -> None:
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["env=CartPole", "num_envs=2", "device=cpu", "~tuned", *given])
    scale = build(parse_run_config(to_dict(cfg))).algorithm.reward_scale
    assert (scale is None) == (kind is None)
    assert scale is None or (type(scale) is kind and scale.clip == clip)


def test_a_dictionary_can_be_given_on_the_command_line(command: Cli) -> None:  # noqa: F811
    (command.folder / "configs" / "algo").mkdir(parents=True)
    (command.folder / "configs" / "algo" / "mine.yaml").write_text(
        f"defaults:\n  - /schema/{__name__}.Weighted@algo\n  - /algo/estimator: gae\n".join(
            ["# @package _global_\n", ""]
        )
    )
    found = [f"hydra.searchpath=[file://{command.folder}/configs]", "algo=mine", "hydra.run.dir=run"]
    code, out, err = command("train", *found, *SHORT, "algo.table={a: 1}", "algo.weights=[3,4]")
    assert code == 0, err
    assert "table:\n    a: 1" in (command.folder / "run" / "config.yaml").read_text()
    assert "recipe none" in out
    code, _, err = command("train", *found, *SHORT, "algo.weights=[x]", "hydra.run.dir=other")
    assert code == 1 and "weights" in err


@pytest.mark.long
def test_runs_that_differ_in_what_does_not_matter_are_seeds_of_one_group(command: Cli) -> None:  # noqa: F811
    each = [
        [],
        ["env_threads=1"],
        ["profile=true"],
        ["evaluation.every=32", "evaluation.episodes=1"],
        ["recover.attempts=1"],
    ]
    for seed, given in enumerate(each):
        code, _, err = command("train", *SHORT, f"seed={seed}", *given, f"hydra.run.dir=runs/{seed}")
        assert code == 0, err
    found, _ = runs.find([str(command.folder / "runs")])
    groups, _ = runs.group(found)
    assert [len(group.runs) for group in groups] == [5]


def test_a_refused_run_leaves_no_directory(command: Cli, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    code, _, err = command("train", *SHORT, "logging.wandb.project=x", "hydra.run.dir=runs/refused")
    assert code == 1 and "logging.wandb needs wandb: pip install -e '.[wandb]'" in err
    assert not Path(command.folder, "runs").exists()


def test_a_sweep_without_its_launcher_says_what_to_install() -> None:
    from hydra.errors import MissingConfigException

    from pgsuite.app.cli import explain

    error: Any = MissingConfigException("no", "hydra/launcher/joblib", ["basic"])
    assert explain(error) == "hydra/launcher=joblib needs hydra-joblib-launcher: pip install -e '.[sweep]'"


def test_what_is_missing_is_installed_from_where_this_package_came(monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors.install("gpu") == "pip install -e '.[gpu]'"  # this is a checkout
    monkeypatch.setattr(errors, "__file__", "/site-packages/pgsuite/errors.py")
    assert errors.install("gpu") == "pip install 'pgsuite[gpu]'"


def test_a_resumed_run_tells_of_its_own_recipe(command: Cli) -> None:  # noqa: F811
    assert command("train", "algo=a2c", "env=CartPole", "num_envs=8", "total_steps=1000", "hydra.run.dir=run")[0] == 0
    code, out, _ = command("train", "resume=run", "total_steps=2000")
    assert code == 0 and "recipe a2c-CartPole" in out


@pytest.mark.parametrize("algo", mostly_long(["ppo", "a2c", "npg", "trpo", "reinforce"], "ppo", "reinforce"))
@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_advantages_within_groups_are_not_standardized_again(command: Cli, algo: str, estimator: str) -> None:  # noqa: F811
    arguments = [f"algo={algo}", f"algo/estimator={estimator}", "env=rlhf", "env.samples=8"]
    algo_of = yaml.safe_load(command("train", *arguments, "--cfg", "job")[1])["algo"]
    assert algo_of["normalize_advantage"] == "none"
    assert algo_of["estimator"]["_target_"].lower().endswith(f".{estimator}")
    again = yaml.safe_load(command("train", *arguments, "algo.normalize_advantage=batch", "--cfg", "job")[1])["algo"]
    assert again["normalize_advantage"] == "batch"
