"""Several runs at once: each is what it would be alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from gymnasium import spaces
from torch import Tensor

import pgsuite
from pgsuite import envs, seeding
from pgsuite.algorithms import A2C, CPO, NPG, PPO, REPPO, TRPO, Algorithm, PPOLagrangian, Reinforce, TRPOLagrangian
from pgsuite.algorithms.estimators import MonteCarlo, NStep, TDLambda, VTrace
from pgsuite.algorithms.reference import Reference
from pgsuite.app.train import main
from pgsuite.envs.base import NotFiniteError
from pgsuite.functional.trust_region import tensors
from pgsuite.many.compile import CompiledJointValues, compile_many
from pgsuite.many.env import JointTaskEnv, RowDraws, SharedTask, SideBySide
from pgsuite.many.stack import Generators
from pgsuite.many.trainer import ManyTrainer
from pgsuite.training import checkpoint
from pgsuite.training.recovery import Recovery
from pgsuite.training.trainer import Callback, Report, Trainer

SEEDS = (3, 0, 7)
# What runs at once need, and few steps of conjugate gradient, each of which enlarges what is rounded.
AT_ONCE: dict[Any, Any] = {PPO: {"target_kl": 1e-3, "early_stop": "masked"}, NPG: {"cg_iters": 3}}
AT_ONCE[TRPO] = AT_ONCE[TRPOLagrangian] = AT_ONCE[CPO] = AT_ONCE[NPG] | {"backtracking": "batched"}
CASES = [
    (cls, recurrent, name, 20)
    for cls in toys.ALL
    for recurrent in ("none", "gru")
    for name in ("toy", "CartPole", "InvertedPendulum")
]
CASES += [(cls, "none", "Cruise", 20) for cls in (PPOLagrangian, TRPOLagrangian, CPO)]
SHORT = [
    (PPO, "none", "CartPole", 4),
    (CPO, "none", "Cruise", 3),
    (TRPO, "none", "toy", 3),
    (Reinforce, "none", "InvertedPendulum", 3),
]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trainer(
    cls: type[Algorithm],
    env: Any,
    seed: int,
    recurrent: str = "none",
    horizon: int = 16,
    look: dict[str, Any] | None = None,
    **fields: Any,
) -> Trainer:
    look = {"recurrent": recurrent, "recurrent_size": 8} | (look or {})
    fields = toys.BRIEF.get(cls, {}) | AT_ONCE.get(cls, {}) | fields
    algorithm = toys.build(cls, env, seed=seed, recurrent=recurrent, look=look, **fields)
    collector = toys.collector(algorithm, env, horizon, seed)
    vars(collector).update({"poll": 2} if collector.whole_episodes else {})  # so that runs end apart
    return Trainer(algorithm, collector, total_steps=10**6)


def environment(name: str, seed: int) -> Any:
    if name == "toy":
        return toys.PointMass(4, 10, seed=seed)
    limit = 40 if name == "InvertedPendulum" else 10  # which falls earlier, after a number of steps of its own
    return envs.make(name, 4, dtype=torch.float64, seed=seed, threads=1, max_episode_steps=limit)


def together(name: str, seeds: tuple[int, ...]) -> Any:
    if name == "toy":
        return SideBySide([environment(name, seed) for seed in seeds])
    task = environment(name, 0).task
    task.place(4 * len(seeds), torch.device("cpu"), task.backends[0], 1)
    return SharedTask(JointTaskEnv(task, seeds, device=torch.device("cpu"), dtype=torch.float64))


def both(cls: type[Algorithm], name: str, recurrent: str = "none", **fields: Any) -> tuple[list[Trainer], ManyTrainer]:
    alone = [trainer(cls, environment(name, seed), seed, recurrent, **fields) for seed in SEEDS]
    env = together(name, SEEDS)
    parts = [trainer(cls, each, seed, recurrent, **fields) for each, seed in zip(env.runs, SEEDS, strict=True)]
    return alone, ManyTrainer(parts, env)


def difference(one: Any, two: Any) -> float:
    found = zip(tensors(one), tensors(two), strict=True)
    return max(float((x.double() - y.double()).abs().max()) for x, y in found if x.numel())


def check_alike(alone: list[Trainer], many: ManyTrainer, iterations: int, bound: float) -> None:
    for _ in range(iterations):
        for one, two in zip([one.iterate() for one in alone], many.iterate(), strict=True):
            assert (one.steps, one.lengths) == (two.steps, two.lengths)
            assert two.returns == pytest.approx(one.returns, abs=1e-6)
            assert two.metrics == pytest.approx(one.metrics, rel=1e-6, abs=1e-6)
    for one, two in zip(alone, many.trainers, strict=True):
        one, two = one.training_state(), two.training_state()
        for state in (one, two) if alone[0].collector.whole_episodes else ():
            del state["algorithm"]["reward_scale"][
                "discounted_return"
            ]  # of masked cells, after which episodes begin anew
        assert difference(one["algorithm"], two["algorithm"]) < bound
        assert torch.equal(one["collector"]["generator"], two["collector"]["generator"])
        if not alone[0].collector.whole_episodes:  # whose environments start anew in any case
            assert difference(one["collector"], two["collector"]) < bound
            assert difference(one["tracker"], two["tracker"]) < bound


@pytest.mark.long
@pytest.mark.parametrize("recurrent", ["none", "gru"])
def test_a_run_with_a_critic_of_actions_is_the_run_alone_too(recurrent: str) -> None:
    given: Any = {"look": {"distribution": "squashed", "sigma": "state"}, "epochs": 2, "minibatches": 2}
    check_alike(*both(REPPO, "toy", recurrent, **given), 3, 1e-8)


@pytest.mark.long
@pytest.mark.parametrize("critic", [{"head": "categorical"}, {"normalize_values": True}, {"norm": "layer"}], ids=str)
@pytest.mark.parametrize("cls", [PPO, TRPO])
def test_a_run_with_other_networks_is_the_run_alone_too(cls: type[Algorithm], critic: dict[str, Any]) -> None:
    look = {"block": "residual", "norm": "layer"}
    check_alike(*both(cls, "toy", look=look, critic_look=critic), 5, 1e-10)


@pytest.mark.long
@pytest.mark.parametrize("cls", [PPO, TRPO, Reinforce])
def test_a_run_that_attends_is_the_run_alone_too(cls: type[Algorithm]) -> None:
    window: Any = {"_target_": "transformer", "window": 6, "layers": 2}
    check_alike(*both(cls, "toy", window, look={"recurrent_size": 8}), 5, 1e-10)


@pytest.mark.parametrize(("cls", "recurrent", "name", "iterations"), toys.mostly_long([*SHORT, *CASES], *SHORT))
def test_a_run_among_others_is_the_run_alone(cls: type[Algorithm], recurrent: str, name: str, iterations: int) -> None:
    check_alike(*both(cls, name, recurrent), iterations, 1e-10)


class Breaks(toys.PointMass):
    """Rewards that are not a number in one step of its first environment."""

    def __init__(self, *args: Any, at: int, tells: bool, **options: Any) -> None:
        """tells: whether it raises an error itself."""
        super().__init__(*args, **options)
        self.at, self.tells, self.steps = at, tells, 0

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        obs, reward, terminated = super().move(action)
        self.steps += 1
        if self.steps == self.at and self.tells:
            raise NotFiniteError("the reward is not a number")
        reward[0] = math.nan if self.steps == self.at else reward[0]
        return obs, reward, terminated


class Log(Callback):
    """What happened to a run."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        self.told.append(report.steps)

    def on_end(self, trainer: Trainer) -> None:
        self.told.append("end")


@pytest.mark.parametrize(("attempts", "tells"), [(0, False), (1, False), (1, True)])
def test_a_run_that_diverges_recovers_or_ends_alone(attempts: int, tells: bool, tmp_path: Path) -> None:
    """The others go on as alone; the broken run is restored and makes its steps later, or ends where it was finite."""
    alone = trainer(A2C, toys.PointMass(4, 10, seed=0), 0, scale=False)
    worlds = [toys.PointMass(4, 10, seed=0), Breaks(4, 10, seed=1, at=20, tells=tells)]
    parts = [trainer(A2C, env, seed, scale=False) for seed, env in enumerate(worlds)]
    logs = [Log(), Log()]
    for s, part in enumerate(parts):
        part.callbacks, part.total_steps = [logs[s]], 4 * 64
        part.failure_handler = Recovery(tmp_path / str(s), {}, attempts, lambda line: None)
    many = ManyTrainer(parts, SideBySide(worlds), say=lambda line: None)
    many.fit()
    alone.total_steps = 4 * 64
    alone.fit()
    assert difference(alone.training_state()["algorithm"], parts[0].training_state()["algorithm"]) < 1e-12
    assert logs[0].told == [64, 128, 192, 256, "end"]
    assert logs[1].told == ([64, 128, 192, 256, "end"] if attempts else [64, "end"])
    assert (parts[1].recoveries, 1 in many.failures) == (attempts, not attempts)
    assert bool(parts[1].algorithm.finite())


@dataclass(kw_only=True)
class Enough(Callback):
    """Ends the run of a seed early."""

    at: int
    seed: int = 0
    of: int = 0  # the seed of its run

    def setup(self, run: Any) -> None:
        self.of = run.seed

    def on_start(self, trainer: Trainer) -> None:
        if self.of == self.seed and trainer.steps >= self.at:
            trainer.end_early("enough")

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        self.on_start(trainer)


@pytest.mark.parametrize("at", [0, 128])
def test_a_run_that_a_callback_ends_is_ended_alone(at: int) -> None:
    """It stays where it was, and the others make their steps."""
    envs_of_runs = [toys.PointMass(4, 10, seed=seed) for seed in (0, 1)]
    parts = [trainer(A2C, env, seed, scale=False) for seed, env in enumerate(envs_of_runs)]
    alone = trainer(A2C, toys.PointMass(4, 10, seed=1), 1, scale=False)
    logs, ends = [Log(), Log()], [[], [Enough(at=at)]]
    for part, log, more in zip(parts, logs, ends, strict=True):
        part.total_steps, part.callbacks = 4 * 64, [log, *more]
    alone.total_steps, alone.callbacks = 4 * 64, ends[1]
    many = ManyTrainer(parts, SideBySide(envs_of_runs))
    many.fit()
    alone.fit()
    assert [part.steps for part in parts] == [256, at] and alone.steps == at and many.stop == 0
    assert [log.told[-1] for log in logs] == ["end", "end"] and logs[1].told.count("end") == 1
    assert difference(alone.algorithm.state_dict(), parts[1].algorithm.state_dict()) < 1e-12


def test_runs_that_differ_in_numbers_are_those_alone() -> None:
    """Settings become one number for each run."""
    settings: list[dict[str, Any]] = [{"clip": 0.1, "lr": 1e-3}, {"clip": 0.4, "lr": 1e-2}]
    env = SideBySide([toys.PointMass(4, 10, seed=1) for _ in settings])
    alone = [trainer(PPO, toys.PointMass(4, 10, seed=1), 1, **x) for x in settings]
    many = ManyTrainer([trainer(PPO, each, 1, **x) for each, x in zip(env.runs, settings, strict=True)], env)
    check_alike(alone, many, 3, 1e-12)


def test_runs_that_differ_in_whole_numbers_are_refused() -> None:
    env = SideBySide([toys.PointMass(4, 10) for _ in range(2)])
    with pytest.raises(ValueError, match=r"algo\.epochs is 2 in one run and 3 in another"):
        ManyTrainer([trainer(PPO, each, 1, epochs=2 + s) for s, each in enumerate(env.runs)], env)


def test_what_is_drawn_ahead_is_what_would_be_drawn() -> None:
    """Also if fewer are used, and of distributions that cannot be drawn ahead."""
    kinds: list[Any]
    kinds = [
        (Tensor.uniform_, (-1, 2), {}),
        (Tensor.exponential_, (), {}),
        (Tensor.normal_, (), {}),
        (Tensor.normal_, (), {"std": 2.0}),
    ]
    for draw, args, options in kinds:
        for shape in ((4, 1), (4, 3), (4, 4)):
            one, two = ([seeding.generator(seed, "x") for seed in SEEDS] for _ in range(2))
            ahead = Generators.of(one)
            ahead.ahead = 5
            for _ in range(7):
                ahead.fill(found := torch.empty(len(SEEDS), *shape), draw, *args, **options)
                assert torch.equal(
                    found, torch.stack([draw(torch.empty(shape), *args, **options, generator=g) for g in two])
                )
            ahead.settle()
            assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(one, two, strict=True))


def with_reference(penalty: Any) -> Any:
    return lambda algorithm: setattr(
        algorithm, "reference", Reference(algorithm.policy, 0.1, penalty=penalty, target=0.5)
    )


PARTS: dict[str, tuple[type[Algorithm], spaces.Space[Any] | None, dict[str, Any]]] = {
    "squashed": (PPO, None, {"distribution": "squashed"}),
    "beta": (PPO, None, {"distribution": "beta"}),
    "sigma of the state": (TRPO, None, {"sigma": "state"}),
    "categorical": (NPG, spaces.Discrete(3), {}),
    "several categoricals": (PPO, spaces.MultiDiscrete([3, 4]), {}),
    "bernoulli": (PPO, spaces.MultiBinary(3), {}),
    "lstm": (PPO, None, {"recurrent": "lstm"}),
    "shared body": (PPO, None, {"shared": True}),
    "v-trace": (PPO, None, {"estimator": VTrace(), "recompute_advantage": True}),
    "td(lambda)": (PPO, None, {"estimator": TDLambda()}),
    "n steps": (A2C, None, {"estimator": NStep()}),
    "monte carlo": (A2C, None, {"estimator": MonteCarlo()}),
    "baseline": (Reinforce, None, {"baseline": "critic"}),
    "whole returns": (Reinforce, None, {"returns": "total", "baseline": "none"}),
    "schedules": (PPO, None, {"lr": {"linear": [1e-3, 0]}, "clip": {"adaptive": {"start": 0.2, "kl": 0.01}}}),
    "all clips": (PPO, None, {"clip_high": 0.3, "dual_clip": 2.0, "value_clip": 0.2, "huber_delta": 1.0}),
    "reference in the reward": (PPO, None, {"after": with_reference("reward")}),
    "reference in the loss": (TRPO, None, {"after": with_reference("loss")}),
}


class Anything(toys.PointMass):
    """Takes the actions of any space."""

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().move(action.to(self.state).reshape(self.num_envs, -1)[:, :2].expand(-1, 2))


@pytest.mark.parametrize("part", toys.mostly_long(PARTS, "all clips"))
def test_every_part_of_a_method_may_be_that_of_many_runs(part: str) -> None:
    cls, space, given = PARTS[part]
    given = dict(given)
    look = {key: given.pop(key) for key in ("distribution", "sigma") if key in given}
    after = given.pop("after", lambda algorithm: None)

    def one(seed: int) -> Trainer:
        env = Anything(4, 10, seed=seed)
        env.action_space = space or env.action_space
        made = trainer(cls, env, seed, look=look, **given)
        after(made.algorithm)
        return made

    parts = [one(seed) for seed in SEEDS]
    check_alike(
        [one(seed) for seed in SEEDS], ManyTrainer(parts, SideBySide([x.collector.env for x in parts])), 2, 1e-9
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (PPO, {}),
        (TRPO, {}),
        (TRPO, {"critic_minibatches": 1}),
        (PPO, {"minibatches": 1}),
        (NPG, {"damping": {"linear": [0.1, 1.0]}}),
    ],
)
@pytest.mark.filterwarnings("error:.*torch cannot compile")  # and then runs as written
def test_compiled_runs_are_those_alone(cls: type[Algorithm], settings: dict[str, Any]) -> None:
    alone, many = both(cls, "CartPole", **settings)
    compile_many(many)
    check_alike(alone, many, 3, 1e-8)


@pytest.mark.parametrize("truncated", [0.0, 0.1, 1.0])
def test_values_of_all_runs_are_those_of_both_passes(truncated: float) -> None:
    """Whatever episodes are truncated; the values of terminal successors are arbitrary."""
    _, many = both(PPO, "CartPole")
    critic: Any = vars(many.algorithm)["critic"]
    rollout = many.collector.collect(many.algorithm.policy)
    cut = torch.rand(rollout.truncated.shape, generator=torch.Generator().manual_seed(0)) < truncated
    cut[0] = False  # one run has none
    after = torch.where((cut | rollout.truncated)[..., None], rollout.next_obs + 1, rollout.next_obs)
    rollout = replace(rollout, truncated=cut | rollout.truncated, next_obs=after)
    expected = many.stack(lambda seen: critic.read_both(seen, *critic.body.successors(seen)), rollout)
    by_need = CompiledJointValues(many.stack, critic)
    by_need.graph = by_need.graph.function  # pyright: ignore[reportAttributeAccessIssue]
    value, next_value = by_need(rollout)
    assert torch.allclose(value, expected[0])
    assert torch.allclose(next_value[~rollout.terminated], expected[1][~rollout.terminated])


def test_gradient_steps_through_time_are_not_compiled() -> None:
    """They would be unrolled, and take minutes."""
    _, many = both(PPO, "CartPole", "gru")
    steps = [x.gradient_step for x in many.algorithm.optimizers]
    before = [*(step.run for step in steps), many.algorithm.fit.run]
    compile_many(many)
    assert [*(step.run for step in steps), many.algorithm.fit.run] == before


def run(*arguments: str) -> list[Path]:
    """Train on the command line, in this process, and return the run directories."""
    before = sys.argv
    sys.argv = ["train", "algo=ppo", "env=CartPole", "num_envs=4", "horizon=16", "hydra.run.dir=here", *arguments]
    torch.set_default_dtype(torch.float32)
    try:
        main()
    finally:
        sys.argv = before
    return sorted(path for path in Path("here").iterdir() if path.is_dir())


def test_each_run_has_the_directory_of_a_single_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It is evaluated, loaded, resumed and reported as one, of its own settings and seed."""
    monkeypatch.chdir(tmp_path)
    batch = "algo.lr=batch(1e-3,3e-4)"
    folders = run("total_steps=64", "seed=3..4", batch, "evaluation.every=64", "evaluation.episodes=1")
    assert [folder.name for folder in folders] == ["s3-lr0.0003", "s3-lr0.001", "s4-lr0.0003", "s4-lr0.001"]
    parts = [pgsuite.Run(folder) for folder in folders[:2]]
    settings = [(x.config["seed"], x.config["algo"]["lr"], x.config["seeds"], x.config["batch"]) for x in parts]
    assert settings == [(3, 3e-4, None, {}), (3, 1e-3, None, {})]
    assert all(x.summary["status"] == "finished" and x.summary["steps"] == 64 for x in parts)
    setting: dict[str, Any] = {"algo.lr": 1e-3, "num_envs": 4, "horizon": 16}
    single = pgsuite.train("ppo", "CartPole", total_steps=64, seed=3, folder="single", **setting)
    np.testing.assert_array_equal(single.metrics["episode/return"], parts[1].metrics["episode/return"])
    saved = [next(folder.glob("checkpoints/0*64.pt")) for folder in (single.folder, folders[1])]
    assert saved[1].stat().st_size < 1.05 * saved[0].stat().st_size
    assert len(parts[1].evaluate(1)["returns"]) == 1
    assert pgsuite.train(resume=str(folders[1]), total_steps=128).summary["steps"] == 128
    with pytest.raises(SystemExit, match="already holds a run"):
        run("total_steps=64", "seed=3", batch)


def forget(folder: Path, steps: int) -> None:
    """Bring a run directory to where it would be had the run been killed some time after this many steps."""
    (folder / "summary.json").unlink()
    for path in folder.glob("checkpoints/*.pt"):
        if int(path.stem) > steps:
            path.unlink()


def test_runs_that_were_killed_go_on_each_from_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Their checkpoints may be of different iterations, or not be there yet, and other runs have ended."""
    monkeypatch.chdir(tmp_path)
    command = ("total_steps=320", "seeds=2", "algo.lr=batch(1e-3,3e-4)", "checkpoint.every=64", "checkpoint.keep=9")
    folders = run(*command)
    assert [folder.name for folder in folders] == ["s0-lr0.0003", "s0-lr0.001", "s1-lr0.0003", "s1-lr0.001"]

    def results() -> list[Any]:
        return [
            (checkpoint.newest(folder, print)[1], pgsuite.Run(folder).metrics["episode/return"]) for folder in folders
        ]

    before = results()
    capsys.readouterr()
    assert run(*command, "resume=auto") == folders
    assert "4 runs at once: all steps are made" in capsys.readouterr().out
    forget(folders[0], 64)
    forget(folders[1], 192)
    forget(folders[2], 0)
    assert run(*command, "resume=auto") == folders
    told = capsys.readouterr().out
    for line in (
        "s0-lr0.0003: resumed at 64 steps | exact",
        "s0-lr0.001: resumed at 192",
        "s1-lr0.001: has made its 320",
    ):
        assert line in told
    assert "s1-lr0.0003: " not in told
    for (state, returns), (other, again) in zip(before, results(), strict=True):
        assert state["steps"] == other["steps"] == 320
        torch.testing.assert_close(state["algorithm"], other["algorithm"], rtol=0, atol=0)
        torch.testing.assert_close(state["collector"], other["collector"], rtol=0, atol=0)
        np.testing.assert_array_equal(returns, again)
    assert all(pgsuite.Run(folder).summary["status"] == "finished" for folder in folders)


def test_python_trains_runs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shape: dict[str, Any] = {"num_envs": 4, "horizon": 16, "total_steps": 128}
    runs = pgsuite.train_many("ppo", "CartPole", seeds=2, seed=3, batch={"algo.lr": [1e-3, 3e-4]}, **shape)
    settings = [(x.config["seed"], x.config["algo"]["lr"]) for x in runs]
    assert settings == [(3, 1e-3), (3, 3e-4), (4, 1e-3), (4, 3e-4)]
    alone: dict[str, Any] = shape | {"algo.lr": 1e-3}
    single = pgsuite.train("ppo", "CartPole", seed=4, **alone)
    np.testing.assert_array_equal(single.metrics["episode/return"], runs[2].metrics["episode/return"])
    with pytest.raises(pgsuite.UserError, match=r"for several: pgsuite\.train_many"):
        pgsuite.train("ppo", "CartPole", seeds=2, **shape)
    with pytest.raises(pgsuite.UserError, match="seeds must be a whole number at least 1"):
        pgsuite.train_many("ppo", "CartPole", seeds=0, **shape)


@pytest.mark.long
def test_a_command_whose_run_a_callback_ends_tells_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    ends = ["+callbacks.enough={_target_: test_many.Enough, at: 64, seed: 1}", "seeds=2", "total_steps=192"]
    folders = run(*ends)
    told = capsys.readouterr().out
    assert "enough at 64 steps, saved; go on with: " in told and "over 1 run |" in told
    assert [pgsuite.Run(folder).summary["steps"] for folder in folders] == [192, 64]


REFUSED: list[tuple[list[str], str]] = [
    (["seeds=2", "overlap=true"], "overlap=true"),
    (["seeds=2", "algo.optim=torch.optim.SGD"], "takes its learning rate from the host"),
    (["seed=4..3"], "seed: Value '4..3'"),
    (["algo.lr=batch(a,b)"], "batch\\(...\\) takes numbers"),
    (["algo.epochs=batch(1,2)"], "algo.epochs is 1 in one run and 2 in another"),
    (["seeds=2", "resume=x"], "resume=<directory> goes on with one run: give resume=auto"),
]


@pytest.mark.parametrize(("arguments", "reason"), toys.mostly_long(REFUSED, REFUSED[0]))
def test_what_runs_at_once_cannot_have_is_refused_by_name(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=reason):
        run("total_steps=64", *arguments)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


DRAWS: dict[str, Callable[[int, Any], torch.Tensor]] = {
    "sizes": lambda n, g: torch.rand(n, 2, generator=g),
    "size": lambda n, g: torch.randn((n, 2), generator=g),
    "one size": lambda n, g: torch.rand(n, generator=g),
    "high": lambda n, g: torch.randint(5, (n,), generator=g),
    "low and high": lambda n, g: torch.randint(3, 9, (n, 2), generator=g),
    "named": lambda n, g: torch.randint(low=3, high=9, size=(n,), generator=g),
    "tensor": lambda n, g: torch.bernoulli(torch.full((n, 2), 0.5), generator=g),
    "tensors": lambda n, g: torch.normal(torch.zeros(n), torch.full((n,), 2.0), generator=g),
    "mean": lambda n, g: torch.normal(0.0, torch.full((n,), 2.0), generator=g),
    "mean and size": lambda n, g: torch.normal(1.0, 2.0, (n, 3), generator=g),
    "in place": lambda n, g: torch.empty(n, 2).uniform_(3.0, 4.0, generator=g),
}


@pytest.mark.parametrize("name", DRAWS)
def test_each_run_draws_its_rows_as_it_would_alone(name: str) -> None:
    draw, streams = DRAWS[name], [seeding.generator(seed, "environment") for seed in (3, 4)]
    with RowDraws(2, 5):
        found = draw(10, Generators.of([seeding.generator(seed, "environment") for seed in (3, 4)]))
    assert torch.equal(found, torch.cat([draw(5, stream) for stream in streams]))


@pytest.mark.parametrize("name", DRAWS)
def test_numbers_that_are_not_of_single_worlds_are_refused(name: str) -> None:
    generators = Generators.of([seeding.generator(seed, "environment") for seed in (3, 4)])
    with RowDraws(2, 5), pytest.raises(ValueError, match="draws numbers that are not of single worlds"):
        DRAWS[name](5, generators)
