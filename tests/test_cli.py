"""Using it as a person would: commands, what they leave behind, and what they say when asked for the impossible."""

import csv
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from toys import PointMass, build, collector, mostly_long

import pgsuite
from pgsuite.algorithms import PPO
from pgsuite.app import cli
from pgsuite.app.evaluate import evaluate
from pgsuite.app.replay import replay
from pgsuite.app.train import train
from pgsuite.errors import UserError, counted
from pgsuite.export.command import export
from pgsuite.training import checkpoint, recovery
from pgsuite.training.recovery import Recovery
from pgsuite.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "configs/tuned").glob("*-[A-Z]*.yaml"))
TINY = ["num_envs=4", "horizon=16", "total_steps=1000", "algo.epochs=1"]  # PPO or a method of its kind


class Pole(gymnasium.Env[Any, Any]):
    """Pays one at every step, and ends by its time limit alone."""

    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), 1.0, False, False, {}


gymnasium.register("Pole-v0", Pole)  # pyright: ignore[reportArgumentType]


class Cli:
    """Runs a command in this process, in a directory of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def __call__(self, command: str, *arguments: str) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        task = {"train": train, "evaluate": evaluate, "export": export, "replay": replay}[command]
        self.monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        self.monkeypatch.setattr(sys, "argv", [f"{command}.py", *arguments])
        GlobalHydra.instance().clear()
        code: Any = 0
        try:
            cli.main(task, command)
        except SystemExit as stop:
            code = stop.code
        out = self.capsys.readouterr()
        return (code, out.out, out.err) if isinstance(code, int) else (1, out.out, f"{code}\n{out.err}")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(tmp_path, monkeypatch, capsys)


def trained_in(folder: Path, *arguments: str, run: str = "run") -> Path:
    """The directory of a run that these arguments make in a folder, once for many tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        patch.setattr(sys, "argv", ["train.py", *arguments, f"hydra.run.dir={run}"])
        GlobalHydra.instance().clear()
        cli.main(train, "train")
    return folder / run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on CartPole."""
    return trained_in(tmp_path_factory.mktemp("finished"), "env=CartPole", *TINY, "checkpoint.every=250")


@pytest.fixture
def own_run(finished: Path, command: Cli) -> Path:
    """A copy of that run, where the command is given."""
    return shutil.copytree(finished, command.folder / "run")


def events(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    return accumulator


ALGORITHM_SCALARS = {
    "reinforce": {"policy_loss", "entropy", "grad_norm", "explained_variance", "learning_rate"},
    "a2c": {"surrogate_improvement", "value_loss", "entropy", "kl", "grad_norm", "explained_variance", "learning_rate"},
    "ppo": {"policy_loss", "value_loss", "entropy", "kl", "clip_fraction", "grad_norm", "explained_variance"},
    "npg": {
        "surrogate_improvement",
        "kl",
        "step_fraction",
        "cg_residual",
        "value_loss",
        "entropy",
        "explained_variance",
        "critic_learning_rate",
    },
    "trpo": {"surrogate_improvement", "kl", "step_fraction", "cg_residual", "backtracks", "value_loss", "entropy"},
}


@pytest.mark.parametrize("algo", mostly_long(ALGORITHM_SCALARS, "ppo", "npg"))
def test_a_run_leaves_everything_that_is_promised(command: Cli, algo: str) -> None:
    size = [] if algo == "reinforce" else ["horizon=16"]
    task = ["env=Pendulum", "env.max_episode_steps=20", "num_envs=4", *size]
    code, out, err = command("train", f"algo={algo}", *task, "total_steps=1000", "seed=3")
    assert code == 0, err
    (run,) = (command.folder / "runs" / f"{algo}-Pendulum").iterdir()
    assert run.name.endswith("-s3")
    lines = out.strip().splitlines()
    assert "env Pendulum-v1 | torch float64 | 4 environments | equals gymnasium 1." in lines[0]
    assert lines[1].startswith("policy 3-64-64-1 ") and ", gaussian" in lines[1]
    assert "steps/s | return" in lines[4] and "s left" in lines[4]
    assert str(run.relative_to(command.folder)) in lines[-1] and "return -" in lines[-1]

    summary = json.loads((run / "summary.json").read_text())
    facts = "algo env seed backend device processes resume versions commit status steps total_steps seconds "
    facts += "steps_per_second return_mean return_std return_window episodes evaluation recoveries"
    assert " ".join(summary) == facts
    assert summary["status"] == "finished" and summary["resume"] == "exact"
    assert (summary["algo"], summary["env"], summary["seed"], summary["backend"]) == (algo, "Pendulum", 3, "torch")
    assert summary["steps"] >= 1000 and summary["episodes"] > 0
    assert f"max_episode_steps: 20\n" in (run / "config.yaml").read_text()  # noqa: F541
    assert "${" not in (run / "config.yaml").read_text()

    tags = set(events(run).Tags()["scalars"])
    assert {f"algorithm/{name}" for name in ALGORITHM_SCALARS[algo]} <= tags
    assert {"episode/return", "episode/length", "algorithm/sigma", "time/environment", "time/acting"} <= tags
    assert {"time/learning", "time/steps_per_second", "Result/return_mean"} <= tags
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[-1]) >= {"steps", "episode/return", *(f"algorithm/{n}" for n in ALGORITHM_SCALARS[algo])}
    assert int(rows[-1]["steps"]) == summary["steps"]
    shares = [float(rows[-1][f"time/{name}"]) for name in ("environment", "acting", "learning")]
    assert sum(shares) == pytest.approx(1, abs=0.02)

    state = torch.load(checkpoint.numbered(run)[-1], weights_only=True)
    assert state["steps"] == summary["steps"] and state["config"]["env"]["max_episode_steps"] == 20
    optimizer = "critic_optimizer" if algo in ("npg", "trpo") else "optimizer"
    assert {"policy", "reward_scale", optimizer, "generator"} <= set(state["algorithm"])
    assert "body.obs_norm.moments.mean" in state["algorithm"]["policy"]


def test_hyperparameters_and_results_reach_the_hparams_tab(command: Cli) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    assert command("train", "env=CartPole", "algo.clip=0.15", *TINY)[0] == 0
    (run,) = command.folder.glob("runs/*/*")
    content = events(run).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    message: Any = plugin_data_pb2
    started = message.HParamsPluginData.FromString(content).session_start_info.hparams
    assert started["algo.clip"].number_value == 0.15 and started["env"].string_value == "CartPole"


def test_return_mean_is_over_the_last_tenth(command: Cli) -> None:
    """Episodes of one fixed length whose return is the number of steps: CartPole cut after five."""
    code, _, err = command("train", "env=CartPole", "env.max_episode_steps=5", *TINY)
    assert code == 0, err
    (path,) = command.folder.glob("runs/*/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["return_mean"] == 5 and summary["return_std"] == 0
    assert summary["steps"] == 1024 and summary["episodes"] in range(20, 33)  # 4 environments, about 124 steps
    assert summary["return_window"] == "last tenth"


LAST = "the last 4 episodes, which ended before the last 16 steps"


@pytest.mark.parametrize(
    ("limit", "steps", "mean", "window", "words"),
    [
        (5, 160, 5.0, "last tenth", "{} episodes of the last 16 steps"),
        (25, 160, 25.0, "last episodes", LAST),
        (500, 64, 16.0, "unfinished episodes", "4 unfinished episodes, since none has ended"),
    ],
)
def test_one_return_is_shown_with_its_window(
    command: Cli, limit: int, steps: int, mean: float, window: str, words: str
) -> None:
    """Every step of Pole pays one, and nothing but the limit ends an episode."""
    task = ["env=gym", "env.import=test_cli", "env.id=Pole-v0", f"env.max_episode_steps={limit}", "num_envs=4"]
    code, out, err = command("train", "algo=a2c", *task, "horizon=4", f"total_steps={steps}", "hydra.run.dir=run")
    assert code == 0, err
    summary = json.loads((command.folder / "run" / "summary.json").read_text())
    assert (summary["return_mean"], summary["return_std"], summary["return_window"]) == (mean, 0, window)
    said = words.format(summary["episodes"])
    *_, progress, last = out.strip().splitlines()
    assert f"return {mean:.1f} over {said} | " in progress and f"return {mean:.1f} +- 0.0 over {said} | " in last
    assert f"return {mean:.1f} +- 0.0" in repr(pgsuite.Run("run"))


def test_a_seed_fixes_a_run_bit_for_bit(command: Cli) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(folder))
        assert command("train", "env=Hopper", f"seed={seed}", f"hydra.run.dir={folder}", *TINY)[0] == 0
    states = {f: checkpoint.load(checkpoint.numbered(command.folder / f)[-1])["algorithm"]["policy"] for f in "abc"}
    assert all(torch.equal(states["a"][k], states["b"][k]) for k in states["a"])
    assert not torch.equal(states["a"]["out.weight"], states["c"]["out.weight"])
    tables = [(command.folder / f / "metrics.csv").read_text() for f in "ab"]

    def untimed(table: str) -> list[list[str]]:
        rows = list(csv.DictReader(table.splitlines()))
        return [[v for k, v in row.items() if not k.startswith("time/")] for row in rows]

    assert untimed(tables[0]) == untimed(tables[1])


def test_recipes_are_picked_up_and_overridden(command: Cli) -> None:
    code, out, _ = command("train", "algo=ppo", "env=HalfCheetah", "--cfg", "job")
    recipe = (ROOT / "configs/tuned/ppo-mujoco.yaml").read_text()
    assert code == 0 and "lr: {linear: [6e-4, 0]}" in recipe and "- 0.0006" in out
    assert "lr: 0.5" in command("train", "algo=ppo", "env=HalfCheetah", "algo.lr=0.5", "--cfg", "job")[1]


@pytest.mark.parametrize(
    "recipe", mostly_long(RECIPES, *(x for x in RECIPES if x.endswith(("-HalfCheetah", "-CartPole"))))
)
def test_every_recipe_begins_a_run(command: Cli, recipe: str) -> None:
    algo, env = recipe.split("-")
    cheap = ["horizon=8", "algo.epochs=1"] if algo == "ppo" and env in ("atari", "Breakout", "Pong") else []
    code, out, err = command("train", f"algo={algo}", f"env={env}", "total_steps=1", *cheap)
    assert code == 0 and f"recipe {recipe}" in out, err


@pytest.mark.parametrize("algo", mostly_long(["reinforce", "ppo", "trpo"], "trpo"))
def test_what_remembers_is_trained_and_evaluated(command: Cli, algo: str) -> None:
    """The critic remembers as the policy does unless it is told otherwise, and may be on the same body."""
    shared = ["policy.recurrent=gru", "policy.recurrent_size=8"]
    memory = [*shared, "critic.recurrent_size=8"]
    episodes = "horizon=null" if algo == "reinforce" else "horizon=16"
    short = ["env=CartPole", "env.max_episode_steps=20", "num_envs=4", "total_steps=200", episodes]
    short += ["algo.minibatches=2", "algo.epochs=2"] if algo == "ppo" else ["algo.critic_epochs=2"]
    short += ["algo.baseline=critic"] if algo == "reinforce" else []
    code, out, err = command("train", f"algo={algo}", *memory, *short, "hydra.run.dir=run")
    assert code == 0 and "policy 4 > gru 8 > 8-64-64-2" in out, err
    assert "critic 4 > gru 8 > 8-64-64-1" in out
    code, out, err = command("evaluate", "run=run", "episodes=3")
    assert code == 0 and "return" in out, err
    code, out, err = command("train", f"algo={algo}", *shared, "critic.shared=true", *short, "hydra.run.dir=shared")
    assert code == 0 and "critic on the same body" in out, err
    code, out, err = command("train", f"algo={algo}", *memory, "critic.recurrent=none", *short, "hydra.run.dir=blind")
    assert code == 0 and "critic 4-64-64-1" in out, err


def test_schedules_are_written_replaced_and_logged(command: Cli) -> None:
    """In a recipe, over a recipe's, inside an estimator, and by a part of one."""
    schedules = ["algo.lr={cosine: [1e-3, 0]}", "algo.estimator.lam={linear: [0.8, 0.9]}", "algo.beta.adaptive.kl=0.02"]
    recipe = command.folder / "tuned" / "ppo_penalty-CartPole.yaml"
    recipe.parent.mkdir()
    recipe.write_text("# @package _global_\nalgo: {lr: {linear: [1e-2, 0]}, entropy_coef: {linear: [0.01, 0]}}\n")
    given = ["--config-dir", str(command.folder), "algo=ppo_penalty", "env=CartPole", *TINY, *schedules]
    code, _, err = command("train", *given, "hydra.run.dir=run")
    assert code == 0, err
    config = yaml.safe_load((command.folder / "run/config.yaml").read_text())["algo"]
    assert config["lr"] == {"cosine": [1e-3, 0]} and config["entropy_coef"] == {"linear": [0.01, 0]}
    assert config["beta"]["adaptive"] == {
        "start": 1.0,
        "kl": 0.02,
        "factor": 0.5,
        "band": 1.5,
        "low": 1e-6,
        "high": 1e6,
    }
    with (command.folder / "run/metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    fraction = 1 - 64 / 1000
    assert float(last["algorithm/entropy_coef"]) == pytest.approx(0.01 * (1 - fraction), abs=4e-4)
    assert float(last["algorithm/estimator_lam"]) == pytest.approx(0.8 + 0.1 * fraction, abs=4e-3)
    assert {"algorithm/lr", "algorithm/beta", "algorithm/learning_rate"} <= set(last)


def test_without_a_recipe_none_is_claimed(command: Cli) -> None:
    code, out, _ = command("train", "env=MountainCar", *TINY)
    assert code == 0 and "recipe none: the method's defaults" in out


CAMERA = """
import gymnasium
import numpy as np

class Camera(gymnasium.Env):
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, size=36):
        self.observation_space = gymnasium.spaces.Dict({
            "speed": gymnasium.spaces.Box(-1, 1, (2,)), "view": gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        })

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {key: np.zeros(x.shape, x.dtype) for key, x in self.observation_space.items()}, {}

    def step(self, action):
        return self.reset()[0], 1.0, False, False, {}

gymnasium.register("Camera-v0", Camera, max_episode_steps=4)
"""


def test_what_sees_a_screen_and_has_no_recipe_gets_that_for_images(command: Cli) -> None:
    (command.folder / "camera.py").write_text(CAMERA)
    camera = ["train", "env=gym", "env.import=camera", "env.id=Camera-v0", "total_steps=8", "num_envs=2", "horizon=4"]

    def trained(folder: str, *more: str) -> tuple[str, Any]:
        code, out, err = command(*camera, f"hydra.run.dir={folder}", *more)
        assert code == 0, err
        return out, yaml.safe_load((command.folder / folder / "config.yaml").read_text())

    out, config = trained("screen", "algo.minibatches=2")
    assert "recipe ppo-images\n" in out
    assert config["algo"]["clip"] == 0.1 and config["critic"]["shared"]
    assert config["algo"]["minibatches"] == 2 and config["num_envs"] == 2  # one's own settings go before it
    out, config = trained("bare", "~tuned", "algo.minibatches=2")
    assert "recipe none" in out and config["algo"]["clip"] == 0.2
    out, config = trained("codes", "+env.options.size=20", "algo.minibatches=2")
    assert "recipe none" in out and not config["critic"]["shared"]
    assert "recipe none" in trained("trpo", "algo=trpo", "algo.critic_minibatches=1")[0]
    out, _ = trained("screen", "algo.minibatches=2", "resume=auto")
    assert "has made all its 8 steps" in out


@pytest.mark.parametrize("estimator", ["gae", "n_step", "td_lambda", "monte_carlo", "vtrace"])
def test_the_estimator_is_a_choice(command: Cli, estimator: str) -> None:
    assert command("train", "env=CartPole", f"algo/estimator={estimator}", *TINY)[0] == 0
    (path,) = command.folder.glob("runs/*/*/config.yaml")
    assert estimator.replace("_", "") in path.read_text().lower()


def test_sweeps_give_every_job_a_directory(command: Cli) -> None:
    code, _, err = command("train", "-m", "algo=ppo", "seed=1", "env=CartPole", *TINY, "algo.gamma=0.9,0.99")
    assert code == 0, err
    found = [json.loads(p.read_text()) for p in command.folder.glob("runs/*/*/summary.json")]
    assert sorted((s["algo"], s["seed"]) for s in found) == [("ppo", 1), ("ppo", 1)]


def test_evaluation_plays_whole_episodes_and_writes_them_down(command: Cli, own_run: Path) -> None:
    code, out, err = command("evaluate", "run=run", "episodes=7")
    result = json.loads((own_run / "evaluation.json").read_text())
    assert code == 0 and len(result["returns"]) == 7 and result["returns"] == result["lengths"], err
    assert result["return_mean"] == pytest.approx(sum(result["returns"]) / 7) and result["deterministic"]
    assert "over 7 deterministic episodes" in out
    again = command("evaluate", "run=run", "episodes=7")
    assert again[1] == out
    code, out, _ = command("evaluate", "run=run", "episodes=7", "deterministic=false")
    assert code == 0 and "over 7 stochastic episodes" in out
    assert command("evaluate", f"run={checkpoint.numbered(own_run)[0]}", "episodes=2")[0] == 0


# Bad input


WRONG: list[tuple[list[str], str]] = [
    (["algo=pp"], "no algo 'pp'; did you mean ppo"),
    (["env=HalfCheeta"], "no env 'HalfCheeta'; did you mean HalfCheetah"),
    (["env=halfcheetah"], "no env 'halfcheetah'; did you mean HalfCheetah"),
    (["algo/estimator=gea"], "no algo/estimator 'gea'; did you mean gae"),
    (["sed=1"], "no setting 'sed'; did you mean seed"),
    (["+sed=1"], "no setting 'sed' in the configuration; did you mean seed"),
    (["algo.clpi=1"], "no setting 'clpi' in algo; did you mean clip"),
    (["+algo.clpi=1"], "no setting 'clpi' in algo; did you mean clip"),
    (["algo=trpo", "algo.clip=0.1"], "no setting 'clip' in algo; one of: backtrack_coef, backtracking, cg_iters"),
    (["algo.estimator.lambda=1"], "no setting 'lambda' in algo.estimator; did you mean lam"),
    (["env.frameskip=2"], "no setting 'frameskip' in env; did you mean frame_skip"),
    (["+env.frameskip=2"], "no setting 'frameskip' in env; did you mean frame_skip"),
    (["policy.hiden=[8]"], "no setting 'hiden' in policy; did you mean hidden"),
    (["algo=trpo", "algo.shrink=0.5"], "no setting 'shrink' in algo; it is now called backtrack_coef"),
    (["algo=trpo", "algo.tries=5"], "no setting 'tries' in algo; it is now called max_backtracks"),
    (["algo=trpo", "algo.line_search=batched"], "no setting 'line_search' in algo; it is now called backtracking"),
    (["algo=trpo", "+algo.shrink=0.5"], "no setting 'shrink' in algo; it is now called backtrack_coef"),
    (["algo=a2c", "algo.huber=1"], "no setting 'huber' in algo; it is now called huber_delta"),
    (["algo/estimator=n_step", "algo.estimator.n=3"], "no setting 'n' in algo.estimator; it is now called n_steps"),
    (["env=rlhf", "env.unfinished=1"], "no setting 'unfinished' in env; it is now called truncation_penalty"),
    (["algo.clip=abc"], "PPO.clip must be a number greater than 0, got 'abc'"),
    (["seed=abc"], "seed: Value 'abc' of type 'str' could not be converted to Integer"),
    (["num_envs=1.5"], "num_envs: Value '1.5' of type 'float' could not be converted to Integer"),
    (["algo.estimator={kl: 1}"], "PPO.estimator must be of class Estimator, got {'kl': 1}"),
    (["~algo"], "~algo: it cannot be left out, only chosen, as in algo=ppo"),
    (["~env"], "~env: it cannot be left out, only chosen, as in env=HalfCheetah"),
    (["~algo.lr"], "algo.lr: a setting cannot be taken away, only given another value"),
    (["seeds=0"], "seeds must be a whole number at least 1 or null, got 0"),
    (["tuned=null"], "tuned=null: a group takes the name of one of its choices, as in algo=ppo"),
    (["policy=[0]"], "policy=[0]: a group takes the name of one of its choices, as in algo=ppo: one of: language_mod"),
    (["algo=[ppo]"], "algo=[ppo]: a group takes the name of one of its choices"),
    (["algo/estimator=3"], "algo/estimator=3: a group takes the name of one of its choices, as in algo=ppo: one of: g"),
    (["-m", "seed=1,2", "policy=null"], "policy=null: a group takes the name of one of its choices"),
    (["hydra.run.dir=q[/y]"], "in quotes, within the shell's: 'hydra.run.dir=\"q[/y]\"'"),
    (["env=gym", "env.id=&x"], "in quotes, within the shell's: 'env.id=\"&x\"'"),
    (["seed=f(x)"], "Unknown function 'f' Available: bool,choice,"),
    (["algo.clip=1\n2"], "in quotes, within the shell's: 'algo.clip=\"...\"'"),
    (["env.id='x"], "in quotes, within the shell's: 'env.id=\"...\"'"),
    (["algo.lr[0]=1"], "'algo.lr[0]' is no name of a setting"),
    (["algo=cpo", "env=CartPole"], "CPO learns from the channel 'cost', and CartPole-v1 has none: take an env"),
    (["env=Cruise", "channels.cots.weight=1"], "the channel 'cots', and Cruise has others: did you mean cost"),
    (["algo=reinforce", "env=CartPole", "channels=rnd"], "critic of states, and Reinforce has none: leave"),
    (["channels.cost=3"], "channels.cost must be settings, such as channels.cost.weight=0.5, got 3"),
    (["channels.cost.wieght=3"], "no setting 'wieght' in channels.cost; did you mean weight"),
    (["algo.clip=0"], "PPO.clip must be a number greater than 0, got 0"),
    (["algo.clip=-1"], "PPO.clip must be a number greater than 0, got -1"),
    (["algo.gamma=1.5"], "PPO.gamma must be a number from 0 to 1, got 1.5"),
    (["algo.gamma=nan"], "PPO.gamma must be a number from 0 to 1, got nan"),
    (["algo.estimator.lam=-0.1"], "GAE.lam must be a number from 0 to 1, got -0.1"),
    (["algo.optim=sgd"], "no algo.optim 'sgd'; one of: adam, rmsprop, or a class by its dotted path"),
    (["seed=-1"], "seed must be a whole number at least 0, got -1"),
    (["torch_threads=20000"], "torch_threads must be a whole number from 1 to 256 or one of measure, got 20000"),
    (["env_threads=20000"], "env_threads must be a whole number from 0 to 256, got 20000"),
    (["horizon=0"], "horizon must be a whole number at least 1 or null, got 0"),
    (["num_envs=0"], "num_envs must be a whole number at least 1, got 0"),
    (["total_steps=0"], "total_steps must be a whole number at least 1, got 0"),
    (["algo.minibatches=7"], "7 minibatches do not divide a batch of 1024 (64 x 16 steps); near ones that do: 2, 4, 8"),
    (["algo.minibatches=4096"], "4096 minibatches do not divide a batch of 1024"),
    (["algo=npg", "algo.critic_minibatches=3"], "3 minibatches do not divide a batch of 1024 (16 x 64 steps)"),
    (["algo=reinforce", "algo.baseline=critic", "algo.critic_minibatches=7"], "7 minibatches do not divide a batch of"),
    (["policy.hidden=[0]"], "hidden must be a list, each a whole number at least 1, got [0]"),
    (["policy.activation=gelu"], "activation must be one of tanh, relu, elu, silu, got 'gelu'"),
    (["algo=reinforce", "horizon=100"], "whole episodes of HalfCheetah-v5 take up to 1000 steps, so horizon must be"),
    (["env=CartPole", "policy.log_sigma=-1"], "policy.log_sigma is for Gaussian policies, and this one is categorical"),
    (["device=gpu"], "no device 'gpu': auto, cpu, cuda or cuda:<number>"),
    (["backend=jax"], "HalfCheetah runs on backend mujoco or warp (or auto), not 'jax'"),
    (["env=gym"], "env.id must name an environment, such as env.id=LunarLander-v3"),
    (["env=gym", "env.id=CartPol-v1"], "gymnasium has no environment 'CartPol-v1'; did you mean CartPole-v1"),
    (["env=gym", "env.id=CartPole-v1", "env.improt=x"], "no setting 'improt' in env; did you mean import"),
    (["env=gym", "env.id=CartPole-v1", "env.import=x_y"], "env.import=x_y cannot be imported: No module named 'x_y'"),
    (["env=gym", "env.id=CartPole-v1", "env.import=.x"], "env.import=.x cannot be imported: '.x' is no full name of a"),
    (["evaluation=${seed}"], "evaluation must be settings by name, such as evaluation.<name>=..., got 0"),
    (["hydra.run.dir=/dev/null/run"], "cannot write /dev/null/run"),
    (["nonsense"], "missing EQUAL"),
    (["algo=ppo,trpo"], "--multirun"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), mostly_long(WRONG, *WRONG[::2]), ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_input_gets_one_message_and_leaves_nothing(command: Cli, arguments: list[str], message: str) -> None:
    code, out, err = command("train", *arguments)
    assert code == 1 and message in err and err.startswith("error: ")
    assert err.strip().count("\n") == 0 and "Traceback" not in err + out
    assert not [p for p in command.folder.rglob("*") if p.is_file()]


def test_a_warning_is_a_message_without_the_line_that_gives_it() -> None:
    given = UserWarning, "pgsuite/kernel.py", 31, "return self.run()"
    assert cli.format_warning(warnings.formatwarning, "mine.py:3: no graph", *given) == "warning: mine.py:3: no graph\n"
    assert "kernel.py:31" in cli.format_warning(warnings.formatwarning, "old", DeprecationWarning, *given[1:])


def test_a_broken_environment_stops_the_run_with_its_state_saved(command: Cli) -> None:
    faulty = ["env=gym", "env.id=Faulty-v0", "env.import=test_gym_env", "env.options={fault: raise, at: 40}"]
    code, _, err = command("train", *faulty, "num_envs=2", "horizon=16", "hydra.run.dir=run")
    assert code == 1 and err.strip().count("\n") == 0
    assert "Faulty-v0 (environment 0) at its step 40 raised KeyError: 'no such joint'" in err
    (path,) = command.folder.glob("run/checkpoints/*.pt")
    assert checkpoint.load(path)["steps"] == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(command: Cli) -> None:
    code, _, err = command("train", "device=cuda")
    assert code == 1 and "sees no CUDA device: use device=cpu or auto" in err


@pytest.mark.usefixtures("own_run")
def test_a_directory_that_holds_a_run_is_left_alone(command: Cli) -> None:
    before = {p: p.read_bytes() for p in command.folder.rglob("*") if p.is_file()}
    code, _, err = command("train", "env=CartPole", "hydra.run.dir=run", *TINY)
    assert code == 1 and "already holds a run" in err
    assert before == {p: p.read_bytes() for p in command.folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "how", ["truncated", "altered", "hostile", "foreign", "missing", "nowhere", "above", "path", "nothing"]
)
def test_a_bad_checkpoint_is_refused_by_name_and_runs_nothing(command: Cli, own_run: Path, how: str) -> None:
    *before, path = checkpoint.numbered(own_run)
    for other in before:
        other.unlink()  # or it would be taken in its place
    data, given = path.read_bytes(), "run=run"
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "altered":
        path.write_bytes(b"not a checkpoint")
    elif how == "hostile":

        class Hostile:
            def __reduce__(self):
                return os.system, (f"touch {command.folder}/broken_into",)

        torch.save({"format": 1, "algorithm": Hostile()}, path)
    elif how == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif how == "missing":
        path.unlink()
    elif how == "nowhere":
        given = "run=elsewhere"
    elif how == "above":
        given = "run=."
    elif how == "path":
        given = "run"
    else:
        given = "episodes=3"
    code, _, err = command("evaluate", given)
    expected = {"nowhere": "no run directory elsewhere", "missing": "no checkpoint in", "nothing": "run must be a run"}
    expected |= {"above": "the directory of 1 run: name one, such as run", "path": "a path, and settings are written"}
    assert code == 1 and expected.get(how, str(path.relative_to(command.folder))) in err
    assert "Traceback" not in err and not (command.folder / "broken_into").exists()
    assert not (own_run / "evaluation.json").exists()


def test_a_pickle_is_hostile_when_it_is_allowed_to_be(tmp_path: Path) -> None:
    """The test above proves nothing unless such a file does harm when loaded carelessly."""

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/broken_into",)

    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path / "broken_into").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "1.pt"
    checkpoint.save({"x": torch.ones(3)}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))  # as good as a full disk
    try:
        with pytest.raises(UserError, match=r"cannot write .*1\.pt .*saved before are intact"):
            checkpoint.save({"x": torch.ones(3_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_run_that_diverges_stops_says_where_and_can_be_replayed(command: Cli) -> None:
    wild = ["env=Pendulum", "algo.lr=1e30", "algo.max_grad_norm=null", "recover.attempts=2", "hydra.run.dir=run"]
    code, out, err = command("train", *wild, *TINY)
    assert code == 1 and "training diverged" in err and "not finite at 64 steps, after 2 recoveries" in err
    assert out.count("back at 0 steps with half the learning rate") == 2 and "policy_loss = nan" in err
    summary = json.loads((command.folder / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["recoveries"]) == ("failed", 0, 2)
    bundle = checkpoint.load(command.folder / "run" / "crash.pt")
    assert float(bundle["state"]["algorithm"]["optimizer"]["lr_scale"]) == 0.25
    assert bundle["config"]["algo"]["lr"] == 1e30 and bundle["versions"]["torch"] == torch.__version__
    code, out, err = command("replay", "crash=run")
    assert code == 0 and "before the update: everything is finite" in out and "nan values" in out, err
    assert "which is the gradient of " in out and "Traceback" not in out + err
    compiled = bundle | {"config": bundle["config"] | {"execution": "compile"}}
    checkpoint.save(compiled, command.folder / "compiled" / "crash.pt")
    assert "which is the gradient of " in command("replay", "crash=compiled")[1]
    assert command("replay", "crash=elsewhere.pt")[0] == 1


class Breaking(PointMass):
    """Gives what is no number in the second environment at one of its steps, or at all from it on."""

    def __init__(self, part: str, last: int) -> None:
        super().__init__(4)
        self.part, self.last, self.count = part, last, 0

    def step(self, action: torch.Tensor) -> Any:
        step = super().step(action)
        self.count += 1
        if 47 <= self.count <= self.last:
            getattr(step, self.part)[2] = math.inf
        return step


@pytest.mark.parametrize("part", ["reward", "next_obs"])
def test_an_environment_that_breaks_is_named_and_the_last_good_state_is_kept(part: str, tmp_path: Path) -> None:
    env = Breaking(part, last=10**9)
    algorithm, said = build(PPO, env), []
    trainer = Trainer(
        algorithm, collector(algorithm, env), 10_000, failure_handler=Recovery(tmp_path, {}, 1, said.append)
    )
    what = {"reward": r"the reward \[inf\]", "next_obs": r"the observation \[inf, inf, inf, inf\]"}[part]
    with pytest.raises(UserError, match=f"toy broke: environment 2 gave {what} at step 0, in the rollout .* 240 steps"):
        trainer.fit()
    assert trainer.steps == 160 and checkpoint.load(tmp_path / "crash.pt")["steps"] == 160
    assert len(said) == 1 and "at step 6, in the rollout that ended at 240 steps" in said[0]


def test_an_environment_that_breaks_once_does_not_change_the_learning_rate(tmp_path: Path) -> None:
    env = Breaking("reward", last=47)
    algorithm, said = build(PPO, env, lr=1e-3), []
    trainer = Trainer(algorithm, collector(algorithm, env), 800, failure_handler=Recovery(tmp_path, {}, 3, said.append))
    trainer.fit()
    assert trainer.steps == 800 and trainer.recoveries == 1 and bool(algorithm.finite())
    assert "gave the reward [inf]" in said[0] and "back at 160 steps with other actions (attempt 1 of 3)" in said[0]
    assert float(algorithm.optimizer.lr * algorithm.optimizer.lr_scale) == pytest.approx(1e-3)


@pytest.mark.long
def test_attempts_are_counted_anew_after_enough_finite_iterations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "ENOUGH", 3)

    class Rarely(PointMass):
        count, every = 0, 6 * 20  # six rollouts

        def step(self, action: torch.Tensor) -> Any:
            step, self.count = super().step(action), self.count + 1
            if self.count % self.every == 0:
                step.reward[1] = math.nan
            return step

    env, said = Rarely(4), []
    algorithm = build(PPO, env)
    handler = Recovery(tmp_path, {}, 1, said.append)
    trainer = Trainer(algorithm, collector(algorithm, env), 3000, failure_handler=handler)
    trainer.fit()
    assert trainer.recoveries == len(said) > 3 and all("attempt 1 of 1" in line for line in said)
    env.every = 20
    trainer.total_steps = 6000
    with pytest.raises(UserError, match=r"gave the reward \[nan\].*after 1 recoveries.*observations must be finite"):
        trainer.fit()


def test_a_large_observation_that_breaks_at_a_reset_is_named_in_few_words(tmp_path: Path) -> None:
    class Large(PointMass):
        obs_size = 400

        def fresh(self) -> torch.Tensor:
            state = torch.nn.functional.pad(super().fresh(), (0, 396))
            state[2, 7:9] = math.nan
            return state

        def move(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return self.state.nan_to_num(), torch.ones(4), torch.ones(4, dtype=torch.bool)

    env = Large(4)
    algorithm = build(PPO, env)
    trainer = Trainer(algorithm, collector(algorithm, env), 800, failure_handler=Recovery(tmp_path, {}, 0, print))
    with pytest.raises(UserError) as refused:
        trainer.fit()
    what = "environment 2 gave the first observation of 400 numbers, 2 of them not finite, the first nan at [7] at step"
    assert what in str(refused.value) and "learning rate" not in str(refused.value)


def test_an_interrupted_run_is_saved(command: Cli) -> None:
    from pgsuite.training.trainer import Trainer

    iterate, calls = Trainer.iterate, 0

    def interrupted(self: Trainer) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            signal.raise_signal(signal.SIGINT)
        return iterate(self)

    command.monkeypatch.setattr(Trainer, "iterate", interrupted)
    code, out, err = command("train", "env=CartPole", "hydra.run.dir=run", *TINY)
    assert code == 0 and "SIGINT at 256 steps, saved; go on with: python scripts/train.py resume=run" in out, err
    assert checkpoint.load(checkpoint.numbered(command.folder / "run")[-1])["steps"] == 256
    summary = json.loads((command.folder / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["status"]) == (256, "interrupted")
    assert command("evaluate", "run=run", "episodes=2")[0] == 0


# Other people's methods


PACKAGE = '''
from dataclasses import dataclass

from torch import Tensor

from pgsuite.algorithms import PPO
from pgsuite.functional.objectives import sampled_kl
from pgsuite.settings import NonNegative


@dataclass(kw_only=True, eq=False)
class KLPPO(PPO):
    """PPO that pays for straying instead of clipping (Schulman et al., 2017, equation 8)."""

    beta: NonNegative = 1.0

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return ratio * advantage - self.beta * sampled_kl(ratio.log())
'''
CONFIG = """# @package _global_
defaults: [/schema/my_methods.KLPPO@algo, /algo/estimator: gae]
horizon: 16
"""


def test_what_compiles_is_imported_where_it_is_used() -> None:
    """It takes a second, which an eager run would wait for."""
    heavy = {"sympy", "torch._dynamo", "torch._inductor"}
    code = f"import sys, pgsuite.app.train; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory outside the repository with a method and its configuration."""
    (tmp_path / "my_methods.py").write_text(PACKAGE)
    (tmp_path / "configs" / "algo").mkdir(parents=True)
    (tmp_path / "configs" / "algo" / "klppo.yaml").write_text(CONFIG)
    return tmp_path


def test_a_method_from_elsewhere_trains_through_the_script_with_no_edit_here(elsewhere: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config-dir", "configs"]
    own = ["algo=klppo", "env=CartPole", "algo.beta=0.5", "algo/estimator=n_step", "algo.estimator.n_steps=7", *TINY]
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | {"PYTHONPATH": str(elsewhere)}
    done = subprocess.run([*script, *own], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = elsewhere.glob("runs/klppo-CartPole/*/config.yaml")
    config = path.read_text()
    assert "beta: 0.5" in config and "my_methods.KLPPO" in config and "n_steps: 7" in config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algo=klppo", "algo.beat=0.5"], "no setting 'beat' in algo; did you mean beta"),
        (["algo=klppo", "algo.beta=-1"], "KLPPO.beta must be a number at least 0, got -1"),
        (["algo=broken"], "cannot import 'not_my_methods', which a configuration names"),
        (["algo=misspelt"], "my_methods has no dataclass 'KLPO'; did you mean KLPPO"),
    ],
)
def test_a_method_from_elsewhere_is_held_to_its_fields(
    elsewhere: Path, command: Cli, arguments: list[str], message: str
) -> None:
    command.monkeypatch.syspath_prepend(elsewhere)
    for name, path in (("broken", "not_my_methods.KLPPO"), ("misspelt", "my_methods.KLPO")):
        text = CONFIG.replace("my_methods.KLPPO", path)
        (elsewhere / "configs" / "algo" / f"{name}.yaml").write_text(text)
    code, _, err = command("train", "--config-dir", "configs", *arguments)
    assert code == 1 and message in err and "Traceback" not in err


def test_counts_agree_with_their_nouns() -> None:
    assert [counted(n, "run") for n in (0, 1, 2, 2048)] == ["0 runs", "1 run", "2 runs", "2,048 runs"]
