"""Searches and populations: what they vary, propose, prune and adopt; and that they go on where they were killed."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_sweeps
from kills import differences, left_behind
from toys import mostly_long

import pgsuite
from pgsuite.app.api import composed
from pgsuite.app.build import to_dict
from pgsuite.errors import UserError
from pgsuite.reports import report, sweeps
from pgsuite.sweep import space, workers
from pgsuite.sweep.population import Population, Turn
from pgsuite.sweep.space import Dimension, parse
from pgsuite.sweep.workers import Plan
from pgsuite.training.trainer import Callback, Report, Trainer

sweep = test_sweeps.sweep  # a fixture
SCRIPT = str(Path(__file__).parents[1] / "scripts" / "train.py")
TINY = ["env=CartPole", "env.max_episode_steps=10", "num_envs=2", "horizon=16", "total_steps=160"]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    with composed(["algo=ppo", "env=CartPole", "~tuned"]) as (cfg, _):
        return to_dict(cfg)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "sweep.space names no setting to vary: give one, as sweep.space.algo.lr='{log: [1e-5, 1e-2]}'"),
        ({"algo": {"lr": 3}}, "sweep.space.algo.lr must be {uniform: [low, high]}, {log: [low, high]}, {int: "),
        ({"algo": {"lr": {"log": [0.1]}}}, "sweep.space.algo.lr must be {uniform: [low, high]}"),
        ({"algo": {"lr": {"log": [0.1, 0.2], "uniform": [0.1, 0.2]}}}, "sweep.space.algo.lr must be {uniform:"),
        ({"algo": {"lr": {"log": [0.2, 0.1]}}}, "the low end must be below the high end, got {log: [0.2, 0.1]}"),
        ({"algo": {"lr": {"log": [0, 0.1]}}}, "sweep.space.algo.lr: a logarithmic range begins above 0, got"),
        ({"algo": {"lr": {"uniform": [-1, 0.1]}}}, "sweep.space.algo.lr must be a number greater than 0, got -1.0"),
        (
            {"algo": {"epochs": {"uniform": [1, 3]}}},
            "sweep.space.algo.epochs must be a whole number at least 1, got 1.0",
        ),
        (
            {"algo": {"epochs": {"int": [1.5, 3]}}},
            "the ends of a range of whole numbers are whole, got {int: [1.5, 3]}",
        ),
        ({"algo": {"max_kl": {"log": [0.01, 0.1]}}}, "no setting 'algo.max_kl'"),
        ({"algo": {"clpi": {"log": [0.01, 0.1]}}}, "no setting 'algo.clpi'; did you mean algo.clip"),
        (
            {"algo": {"estimator": {"lam": {"uniform": [0.9, 1.1]}}}},
            "sweep.space.algo.estimator.lam must be a number from",
        ),
        ({"algo": {"epochs": {"choice": [1, 1]}}}, "sweep.space.algo.epochs has a choice twice: [1, 1]"),
        ({"num_envs": {"int": [0, 4]}}, "sweep.space.num_envs must be a whole number at least 1, got 0"),
    ],
)
def test_wrong_ranges_are_refused_in_one_line(config: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(given, config)
    assert message in str(refused.value) and "\n" not in str(refused.value)


SHIPPED = sorted(path.stem for path in Path(SCRIPT).parents[1].glob("configs/sweep/space/*.yaml"))


@pytest.mark.parametrize("algo", mostly_long(SHIPPED, "trpo"))
def test_ranges_shipped_for_each_method_fit_it(algo: str) -> None:
    with composed([f"algo={algo}", "env=CartPole", "sweep=search"]) as (cfg, _):
        whole = to_dict(cfg)
    assert len(parse(whole.pop("sweep")["space"], whole)) >= 3


def test_values_stay_in_their_ranges_and_move_by_the_factor() -> None:
    generator = random.Random(0)
    for dimension in (Dimension("log", [1e-4, 1e-2]), Dimension("uniform", [0.1, 0.4]), Dimension("int", [3, 15])):
        low, high = dimension.values
        drawn = [dimension.draw(generator) for _ in range(500)]
        assert all(low <= x <= high for x in drawn)
        moved = [dimension.perturbed(x, 1.25, generator) for x in drawn]
        assert all(low <= y <= high and (y != x or y in (low, high)) for x, y in zip(drawn, moved, strict=True))
        if dimension.kind != "int":
            free = [y / x for x, y in zip(drawn, moved, strict=True) if y not in (low, high)]
            assert {round(ratio, 9) for ratio in free} == {1.25, 0.8}
    logs = [math.log10(Dimension("log", [1e-4, 1e-2]).draw(generator)) for _ in range(2000)]
    assert abs(sum(logs) / len(logs) + 3) < 0.05  # the middle of the exponents
    choice = Dimension("choice", [0.9, 0.99, 0.999])
    assert {choice.perturbed(0.99, 1.25, generator) for _ in range(20)} == {0.9, 0.999}
    assert {choice.perturbed(0.9, 1.25, generator) for _ in range(20)} == {0.9, 0.99}


def test_a_schedule_begins_with_the_value_and_keeps_its_form() -> None:
    assert space.override("algo.lr", 0.5, {"linear": [2.0, 1.0]}) == "algo.lr={linear: [0.5, 0.25]}"
    assert space.override("algo.lr", 0.5, {"cosine": [2.0, 0]}) == "algo.lr={cosine: [0.5, 0.0]}"
    assert space.override("algo.lr", 0.5, 2.0) == "algo.lr=0.5"
    assert space.override("algo.lr", 0.5, {"adaptive": {"start": 2.0, "kl": 0.01}}) == "algo.lr=0.5"


class AtSteps(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_iteration(self, trainer: Trainer, report: Report) -> None:
        if report.steps >= self.steps:
            trainer.end_early("enough")


def test_a_callback_ends_a_run_which_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"total_steps": 160, "num_envs": 2, "horizon": 16}
    whole = pgsuite.train("a2c", "CartPole", folder=tmp_path / "whole", **settings)
    short = pgsuite.train("a2c", "CartPole", folder=tmp_path / "short", callbacks=[AtSteps(96)], **settings)
    assert short.summary["status"] == "interrupted" and short.summary["steps"] == 96
    pgsuite.train(resume=str(short.folder))
    assert differences(left_behind(whole.folder)["state"], left_behind(short.folder)["state"]) == []


def inline(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Have runs trained in this process; the overrides of each, those of runs at once one after the other."""
    trained: list[list[str]] = []

    class Executor:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def submit(self, work: Callable[..., Any], commands: list[Any], *rest: Any) -> Future[Any]:
            trained.extend(overrides for overrides, _ in commands)
            future: Future[Any] = Future()
            try:
                future.set_result(work(commands, *rest))
            except Exception as error:
                future.set_exception(error)
            return future

        def shutdown(self, **_: Any) -> None: ...

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Executor)
    return trained


def values_of(overrides: list[str], name: str) -> str:
    return [x.partition("=")[2] for x in overrides if x.startswith(f"{name}=")][-1]


def test_a_search_goes_on_with_the_trial_that_it_was_in(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    optuna = pytest.importorskip("optuna", "4.0")
    trained = inline(monkeypatch)
    search = ["sweep=search", "algo=a2c", "~tuned", "~sweep/space", "sweep.space.algo.lr={log: [1e-4, 1e-2]}"]
    search += ["sweep.jobs=1", "env.max_episode_steps=10"]
    assert sweep(*search, "sweep.trials=1", steps=96) == 0
    folder = Path("runs/search/a2c-CartPole")
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{folder}/study.db")
    cut = study.ask({"algo.lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)})
    assert sweep(*search, "sweep.trials=2", steps=96) == 0
    assert values_of(trained[1], "algo.lr") == repr(cut.params["algo.lr"])
    found = json.loads((folder / "sweep.json").read_text())["trials"]
    for trial in found:
        run = pgsuite.Run(folder / f"trial-{trial['number']:03d}")
        assert run.summary["return_mean"] == trial["value"] and run.config["algo"]["lr"] == trial["values"]["algo.lr"]
    assert len(found) == len(trained) == 2
    assert "best of 2 trials" in capsys.readouterr().out
    assert "another sweep.space.algo.lr" in sweep(*search, "sweep.space.algo.lr={log: [1e-3, 1e-2]}", steps=96)
    assert "cannot be given" in sweep(*search, "algo.lr=0.5", steps=96)


def test_trials_at_once_have_their_own_settings_and_ends(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """In groups, the last of which is smaller, of runs that each end as they would alone."""
    pytest.importorskip("optuna", "4.0")
    trained, groups = inline(monkeypatch), []
    together = workers.train_together
    monkeypatch.setattr(workers, "train_together", lambda commands: groups.append(len(commands)) or together(commands))
    search = ["sweep=search", "algo=ppo", "~tuned", "~sweep/space", "sweep.space.algo.lr={log: [1e-4, 1e-2]}"]
    search += ["sweep.space.algo.clip={choice: [0.1, 0.2]}", "algo.minibatches=2", "algo.target_kl=0.1"]
    search += ["sweep.jobs=1", "sweep.at_once=2", "sweep.trials=3", "env.max_episode_steps=10"]
    assert sweep(*search, steps=96) == 0
    found = json.loads(Path("runs/search/ppo-CartPole/sweep.json").read_text())["trials"]
    for trial in found:
        run = pgsuite.Run(Path(f"runs/search/ppo-CartPole/trial-{trial['number']:03d}"))
        assert run.summary["return_mean"] == trial["value"] and run.summary["steps"] == 96
        assert run.config["algo"]["lr"] == trial["values"]["algo.lr"] and run.config["algo"]["early_stop"] == "masked"
    assert groups == [2] and len(trained) == len(found) == 3 and len({x["values"]["algo.lr"] for x in found}) == 3
    assert "best of 3 trials" in capsys.readouterr().out
    assert sweep(*search, "sweep.trials=3", steps=96) == 0 and len(trained) == 3


@pytest.mark.long
def test_a_grid_tries_every_combination_once(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna", "4.0")
    trained = inline(monkeypatch)
    grid = ["sweep=search", "sweep.sampler=grid", "algo=a2c", "~tuned", "~sweep/space", "sweep.jobs=1"]
    assert "is a range" in sweep(*grid, "sweep.space.algo.lr={log: [1e-3, 1e-2]}", steps=32)
    grid += ["sweep.space.algo.lr={choice: [0.01, 0.001]}", "sweep.space.policy.hidden={choice: [[4], [8]]}"]
    assert sweep(*grid, "env.max_episode_steps=10", steps=32) == 0
    tried = [(values_of(x, "algo.lr"), values_of(x, "policy.hidden")) for x in trained]
    assert sorted(tried) == [("0.001", "[4]"), ("0.001", "[8]"), ("0.01", "[4]"), ("0.01", "[8]")]


@pytest.mark.long
def test_a_search_all_of_whose_trials_fail_says_why(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna", "4.0")
    trained = inline(monkeypatch)
    message = sweep("sweep=search", "algo=ppo", "~tuned", "algo.minibatches=64", "sweep.jobs=1", steps=32)
    assert "the first 3 trials all failed, the last with" in message and "minibatches" in message
    assert len(trained) == 3


@pytest.mark.parametrize(("pruning", "enough"), mostly_long([("median", 2.5), ("halving", 3.5)], ("median", 2.5)))
def test_a_run_is_pruned_where_others_were_better_by_then(tmp_path: Path, pruning: Any, enough: float) -> None:
    pytest.importorskip("optuna", "4.0")
    from pgsuite.sweep.search import POINTS, Prune, open_study

    def course(number: int, height: float) -> list[int]:
        """The steps at which a run whose return is ``height`` times its steps is ended."""
        ended: list[int] = []
        trainer: Any = SimpleNamespace(
            total_steps=1000, callbacks=[], end_early=lambda why: ended.append(trainer.steps)
        )
        part = Prune(folder=tmp_path, number=number, pruning=pruning, warmup=0.2, startup=2)
        part.on_start(trainer)
        for steps in range(50, 1000, 50):
            trainer.steps, trainer.return_mean = steps, height * steps
            part.on_iteration(trainer, Report(steps - 50, steps, {}, [], [], True))
            if ended:
                break
        return ended

    study, _ = open_study(tmp_path)
    for number, height in enumerate([1.0, 2.0, 3.0]):
        assert study.ask().number == number and course(number, height) == []
        study.tell(number, height * 1000)
    assert study.ask().number == 3 and course(3, enough) == []
    assert study.ask().number == 4 and course(4, 0.5) == [1000 // POINTS * 4]
    points = study.trials[4].intermediate_values
    assert points == {k: 0.5 * k * 1000 / POINTS for k in (1, 2, 3, 4)}


@pytest.mark.long
@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_the_same_settings_are_proposed_by_a_process_that_goes_on(tmp_path: Path, sampler: Any) -> None:
    pytest.importorskip("optuna", "4.0")
    from pgsuite.sweep.search import Search, open_study

    dimensions = {"a": Dimension("log", [1e-4, 1.0]), "b": Dimension("int", [1, 9]), "c": Dimension("choice", ["x", 1])}
    plan: Any = SimpleNamespace(config={"seed": 0}, space=dimensions)
    proposed = []
    for name, goes_on_at in (("left alone", 99), ("cut off", 17)):
        (tmp_path / name).mkdir()
        study, _ = open_study(tmp_path / name)
        proposed.append([])
        for i in range(25):
            study = open_study(tmp_path / name)[0] if i == goes_on_at else study
            number = Search(sampler=sampler)._ask(study, plan)
            trial = study.trials[number]
            proposed[-1].append(trial.params)
            study.tell(trial.number, -((math.log10(trial.params["a"]) + 2) ** 2) - trial.params["b"])
    assert proposed[0] == proposed[1] and len({str(x) for x in proposed[0]}) == 25


def plan_of(tmp_path: Path, config: dict[str, Any]) -> Plan:
    ranges = {"algo.lr": Dimension("log", [1e-4, 1e-2]), "algo.epochs": Dimension("int", [3, 15])}
    return Plan(tmp_path, config, [], ranges, {"algo": "ppo", "env": "CartPole"}, [])


def test_the_worst_members_continue_from_the_best_and_change_their_settings(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    population, plan = Population(size=8, exploit=0.25, resample=0.0, factor=2.0), plan_of(tmp_path, config)
    first = population._members(0, [], plan)
    for i, x in enumerate([5.0, 1.0, 8.0, None, 7.0, 2.0, 3.0, 4.0]):
        first[i] |= {"return": x}
        first[i]["values"] = {"algo.lr": 1e-3, "algo.epochs": 6}
    second = population._members(1, [first], plan)
    kept = [0, 2, 4, 5, 6, 7]
    assert [second[i] for i in kept] == [{"from": i, "values": first[i]["values"]} for i in kept]
    for i in (1, 3):
        assert second[i]["from"] in (2, 4)
        assert second[i]["values"]["algo.lr"] in (5e-4, 2e-3) and second[i]["values"]["algo.epochs"] in (3, 12)
    assert population._members(1, [first], plan) == second
    with pytest.raises(UserError, match="no member"):
        population._members(1, [[member | {"return": None} for member in first]], plan)


def test_a_copied_member_draws_its_own_random_numbers_once() -> None:
    reseeded: list[int] = []
    trainer: Any = SimpleNamespace(steps=128, collector=SimpleNamespace(reseed=lambda: reseeded.append(1)))
    trainer.end_early = lambda why: None
    Turn(begin=128, end=256, apart=3).on_start(trainer)
    assert len(reseeded) == 3
    trainer.steps = 160  # resumed within the turn
    Turn(begin=128, end=256, apart=3).on_start(trainer)
    Turn(begin=160, end=256, apart=0).on_start(trainer)
    assert len(reseeded) == 3


def test_what_a_sweep_cannot_vary_is_refused(sweep: Any) -> None:
    message = sweep("sweep=population", "algo=ppo", "sweep.space.clip_obs={log: [1, 10]}", steps=32)
    assert "numbers of the method" in message and "sweep.space.clip_obs=null leaves it out" in message
    message = sweep("sweep=search", "algo=ppo", "sweep.at_once=2", steps=32)
    assert "differ in real numbers of the method alone, and sweep.space.algo.epochs is none" in message
    assert "goes without seeds=" in sweep("sweep=population", "algo=ppo", "seeds=3", steps=32)
    assert not Path("runs").exists()


def test_reports_show_the_history_of_a_search_and_the_lineage_of_a_population(tmp_path: Path) -> None:
    ranges = {"sweep.space.algo.lr": {"log": [1e-4, 1e-2]}, "sweep.space.algo.optim": {"choice": ["adam", "rmsprop"]}}
    facts = {"algo": "ppo", "env": "CartPole", "settings": ranges | {"seed": 0}}
    states = ["complete", "pruned", "complete", "fail"]
    trials = [
        {"number": i, "state": state, "value": 10.0 * i if state == "complete" else None, "points": [[0.5, 3.0]]}
        | {"values": {"algo.lr": 1e-3 * (i + 1), "algo.optim": "adam"}}
        for i, state in enumerate(states)
    ]
    record = facts | {"kind": "search", "trials": trials, "importances": {"algo.lr": 0.9, "algo.optim": 0.1}}
    turns = [
        [{"from": None, "return": 1.0 * i, "steps": 32, "values": {"algo.lr": 1e-3}} for i in range(3)],
        [
            {"from": x, "return": y, "steps": 64, "values": {"algo.lr": 1e-3}}
            for x, y in ((2, 9.0), (1, 2.0), (2, None))
        ],
        [{"from": 0, "values": {"algo.lr": 1e-3}} for _ in range(3)],  # which trains
    ]
    for name, content in (("search", record), ("population", facts | {"kind": "population", "turns": turns})):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "sweep.json").write_text(json.dumps(content))
        (tmp_path / name / "inner" / "config.yaml").write_text("neither: read\n")
    lines = report([str(tmp_path)], tmp_path / "out", "command")
    assert "Search with ppo on CartPole: 4 trials: 2 finished, 1 pruned, 1 failed." in lines
    assert "Population with ppo on CartPole: 3 members, 2 turns over." in lines and "skipped" not in " ".join(lines)
    drawn = {path.stem.split("-")[0] for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"history", "importance", "slices", "lineage", "courses"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| trial 2 | 20.0 | 0.003 | adam |" in table and "| member 0 | 9.0 | 0.001 |" in table
    assert sweeps._ancestors(turns[:2]) == [2, 0]
    (tmp_path / "search" / "sweep.json").write_text('{"kind": "search"}')
    assert "sweep.json cannot be read" in " ".join(report([str(tmp_path)], tmp_path / "out", "command"))


def start(folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, SCRIPT, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True)


def finish(folder: Path, arguments: list[str]) -> str:
    process = start(folder, arguments)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out


def kill_after(folder: Path, arguments: list[str], events: int, number: int = signal.SIGKILL) -> None:
    """Kill the process that began the workers once so many checkpoints and turns have been written since its start."""
    process, seen = start(folder, arguments), set[tuple[str, int]]()

    def present() -> set[tuple[str, int]]:
        found = set[tuple[str, int]]()
        for path in (*folder.glob("runs/**/checkpoints/[0-9]*.pt"), *folder.glob("runs/*/*/sweep.json")):
            with_time = path.stat().st_mtime_ns if path.exists() else 0
            found.add((str(path), with_time))
        return found

    before, deadline = present(), time.monotonic() + 300
    while len(seen) < events:
        assert process.poll() is None and time.monotonic() < deadline
        seen |= present() - before
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.communicate()


@pytest.mark.parametrize("at_once", mostly_long([1, 2, 3]))
def test_a_population_that_is_killed_ends_as_one_that_is_not(tmp_path: Path, at_once: int) -> None:
    """Also if its members are trained at once, in groups that are not all as large."""
    arguments = ["algo=a2c", "env=CartPole", "sweep=population", "sweep.size=3", "sweep.turns=3", "num_envs=4"]
    arguments += ["horizon=16", "total_steps=2400", "checkpoint.every=200", "evaluation.every=700"]
    arguments += ["evaluation.episodes=2"]
    arguments += [f"sweep.at_once={at_once}"]
    for name in ("left alone", "killed"):
        (tmp_path / name).mkdir()
    finish(tmp_path / "left alone", arguments)
    for events in (3, 8, 5):
        kill_after(tmp_path / "killed", arguments, events)
    assert "goes on in turn" in finish(tmp_path / "killed", arguments)
    alone, killed = ((tmp_path / name / "runs/population/a2c-CartPole") for name in ("left alone", "killed"))
    assert json.loads((alone / "sweep.json").read_text()) == json.loads((killed / "sweep.json").read_text())
    for member in range(3):
        last = f"turn-003/member-{member:02d}"
        assert differences(left_behind(alone / last), left_behind(killed / last)) == []
        for turn in ("turn-001", "turn-002"):  # of which the curves are left
            left = [path.name for path in (alone / turn / f"member-{member:02d}").rglob("*")]
            assert sorted(left) == ["evaluation.csv", "metrics.csv"]
    finish(tmp_path / "killed", arguments)  # which trains nothing


@pytest.mark.long
def test_a_search_that_is_killed_ends_as_one_that_is_not(tmp_path: Path) -> None:
    pytest.importorskip("optuna", "4.0")
    arguments = ["algo=a2c", "env=CartPole", "sweep=search", "sweep.trials=4", "sweep.jobs=1", "sweep.pruning=none"]
    arguments += ["num_envs=4", "horizon=16", "total_steps=2000", "checkpoint.every=200"]
    for name in ("left alone", "killed"):
        (tmp_path / name).mkdir()
    finish(tmp_path / "left alone", arguments)
    for events in (3, 9):
        kill_after(tmp_path / "killed", arguments, events)
    finish(tmp_path / "killed", arguments)
    alone, killed = ((tmp_path / name / "runs/search/a2c-CartPole/sweep.json") for name in ("left alone", "killed"))
    assert json.loads(alone.read_text()) == json.loads(killed.read_text())


@pytest.mark.long
def test_a_sweep_that_is_interrupted_saves_its_runs(tmp_path: Path) -> None:
    arguments = ["algo=a2c", "env=CartPole", "sweep=population", "sweep.size=2", "sweep.turns=2", "num_envs=4"]
    arguments += ["horizon=16", "total_steps=200_000", "checkpoint.every=500"]
    kill_after(tmp_path, arguments, 3, signal.SIGINT)
    found = [
        json.loads(path.read_text()) for path in tmp_path.glob("runs/population/a2c-CartPole/turn-001/*/summary.json")
    ]
    assert found and {summary["status"] for summary in found} == {"interrupted"}
