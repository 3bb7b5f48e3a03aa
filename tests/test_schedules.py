"""Each test is one claim about numbers that change in the course of a run."""

import copy
import math
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
import torch
from toys import ALL, PointMass, build, collector

from pgsuite import settings
from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, Reinforce
from pgsuite.algorithms.estimators import GAE
from pgsuite.nn.schedules import Adaptive, parse
from pgsuite.rollout import EpisodeCollector
from pgsuite.testing.reads import NothingRead
from pgsuite.training.trainer import Trainer


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"constant": 0.3}, lambda f: 0.3),
        ({"linear": [3e-4, 1e-5]}, lambda f: 3e-4 + f * (1e-5 - 3e-4)),
        ({"cosine": [2.0, 1.0]}, lambda f: 1.5 + 0.5 * math.cos(math.pi * f)),
        ({"piecewise": {0: 0.0, 0.25: 1.0, 0.75: 0.5}}, lambda f: 4 * f if f < 0.25 else max(0.5, 1.25 - f)),
    ],
)
def test_a_schedule_is_its_formula(given: Any, expected: Any) -> None:
    schedule = parse(given, "x")
    address = schedule.value.data_ptr()
    assert float(schedule.value) == pytest.approx(expected(0.0))
    for fraction in (0.0, 0.1, 0.25, 0.5, 0.7, 1.0):
        schedule.progress(fraction)
        assert float(schedule.value) == pytest.approx(expected(fraction))
    assert schedule.value.data_ptr() == address


@pytest.mark.parametrize(
    ("kl", "factor", "expected"),
    [
        (0.021, 1.5, 1 / 1.5),
        (0.019, 1.5, 1.0),
        (0.006, 1.5, 1.0),
        (0.004, 1.5, 1.5),
        (0.021, 0.5, 2.0),
        (1.0, 50.0, 0.1),
    ],
)
def test_an_adaptive_number_follows_the_kl_within_its_bounds(kl: float, factor: float, expected: float) -> None:
    schedule = Adaptive(1e-3, 0.01, factor, low=1e-4, high=1e-2)
    schedule.react(torch.tensor(kl))
    assert float(schedule.value) == pytest.approx(1e-3 * expected)
    schedule.progress(0.5)
    assert float(schedule.value) == pytest.approx(1e-3 * expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": {"lienar": [1, 0]}}, r"PPO.lr: no schedule 'lienar'; did you mean linear\?"),
        ({"lr": {"linear": 1.0}}, r"PPO.lr: this schedule is written \{linear: \[start, end\]\}"),
        ({"lr": {"linear": [1.0, -1.0]}}, "PPO.lr must be a number at least 0, got -1.0"),
        ({"lr": {"linear": [1.0, "x"]}}, "PPO.lr must be|this schedule is written"),
        ({"target_kl": {"linear": [1.0, None]}}, "this schedule is written"),
        ({"lr": {"linear": [1, 0], "cosine": [1, 0]}}, "must be a number or one schedule"),
        ({"lr": {}}, "must be a number or one schedule"),
        ({"clip": {"piecewise": {0.5: 1, 1: 0}}}, "with fractions of the run in rising order"),
        ({"clip": {"piecewise": {0: 1, 2: 0}}}, "with fractions of the run in rising order"),
        ({"clip": {"piecewise": {}}}, "with fractions of the run in rising order"),
        ({"lr": {"adaptive": {"start": 1e-3}}}, "this schedule is written {adaptive"),
        ({"lr": {"adaptive": {"start": 1e-3, "kl": -1}}}, "this schedule is written {adaptive"),
        ({"lr": {"adaptive": {"start": 1e-3, "kl": 0.01, "speed": 2}}}, "this schedule is written {adaptive"),
        ({"epochs": {"adaptive": {"start": 4, "kl": 0.01}}}, "whole number, which no adaptive schedule can move"),
        ({"epochs": {"linear": [4.5, 1]}}, "PPO.epochs must be a whole number at least 1, got 4.5"),
        ({"normalize_advantage": {"linear": [1, 0]}}, "PPO.normalize_advantage must be one of"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_in_one_message(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(PPO, PointMass(4), **options)


def test_minibatches_that_cannot_be_later_on_are_refused_before_the_run() -> None:
    env = PointMass(8)
    algorithm = build(PPO, env, minibatches={"linear": [4, 8]})
    with pytest.raises(ValueError, match="7 minibatches do not divide"):
        Trainer(algorithm, collector(algorithm, env), 1000)


def numbers(cls: type[Algorithm]) -> dict[str, Any]:
    """Every number of a method, at a value that is in force."""
    given = {
        "max_grad_norm": 0.5,
        "huber_delta": 1.0,
        "clip_high": 0.3,
        "dual_clip": 3.0,
        "value_clip": 0.2,
        "beta": 1.0,
    }
    hints = get_type_hints(cls, include_extras=True)
    return {
        f.name: given.get(f.name, f.default)
        for f in fields(cls)
        if settings.number(hints[f.name]) and f.name != "target_kl"
    }


@pytest.mark.parametrize("cls", ALL)
def test_any_number_of_any_method_may_be_scheduled(cls: type[Algorithm]) -> None:
    """Held constant by its schedule it is the number; the schedule is in the metrics; only TRPO's search reads back."""
    ends = []
    baseline: dict[str, Any] = {"baseline": "critic"} if cls is Reinforce else {}
    for scheduled in (False, True):
        env = PointMass(8)
        options = {name: {"constant": x} if scheduled else x for name, x in numbers(cls).items()}
        if cls is not Reinforce:
            options["estimator"] = GAE(lam={"constant": 0.9} if scheduled else 0.9)  # pyright: ignore
        algorithm = build(cls, env, **options, **baseline)
        rollouts = collector(algorithm, env)
        if isinstance(rollouts, EpisodeCollector):
            rollouts.poll = rollouts.horizon
        metrics = algorithm.iterate(rollouts)
        if scheduled and cls is not TRPO:
            with NothingRead():
                algorithm.update_schedules(0.3)
                metrics = algorithm.iterate(rollouts)
        else:
            algorithm.update_schedules(0.3)
            metrics = algorithm.iterate(rollouts)
        ends.append(torch.cat([p.flatten() for p in algorithm.policy.parameters()]).detach())
        for name, x in numbers(cls).items() if scheduled else ():
            assert float(metrics[name]) == pytest.approx(x, rel=1e-6), name
    assert torch.allclose(ends[0], ends[1], atol=1e-4)


@pytest.mark.parametrize("optim", ["adam", "rmsprop"])
def test_the_learning_rate_of_a_step_is_that_of_the_schedule(optim: str) -> None:
    """A fresh optimizer's first step is proportional to its rate, and one at rate zero goes nowhere."""
    moved = {}
    for fraction in (0.0, 0.75, 1.0):
        env = PointMass(8)
        algorithm = build(A2C, env, optim=optim, lr={"linear": [1e-2, 0]})
        before = algorithm.optimizer.flat.detach().clone()
        algorithm.update_schedules(fraction)
        metrics = algorithm.iterate(collector(algorithm, env))
        moved[fraction] = algorithm.optimizer.flat.detach() - before
        assert float(metrics["lr"]) == float(metrics["learning_rate"]) == pytest.approx(1e-2 * (1 - fraction))
    assert torch.allclose(moved[0.75], 0.25 * moved[0.0], rtol=1e-3, atol=1e-6)
    assert not moved[1.0].any() and moved[0.0].any()


@pytest.mark.parametrize("cls", [Reinforce, A2C, PPO])
def test_a_rate_that_follows_the_kl_brings_it_to_its_target(cls: type[Algorithm]) -> None:
    """From a rate a hundred times too small and from one thirty times too large."""
    for start in (3e-5, 3e-1):
        env = PointMass(32, max_episode_steps=20)
        rate = {"adaptive": {"start": start, "kl": 0.01, "low": 1e-6, "high": 1.0}}
        short: dict[str, Any] = {"epochs": 3} if cls is PPO else {}
        algorithm = build(cls, env, lr=rate, optim="adam", **short)
        rollouts = collector(algorithm, env)
        seen = [float(algorithm.iterate(rollouts)["kl"]) for _ in range(40)]
        assert not 0.002 < seen[0] < 0.05
        assert 0.003 < sorted(seen[-9:])[4] < 0.03, seen


def test_whole_numbers_are_rounded() -> None:
    algorithm = build(PPO, PointMass(8), epochs={"linear": [10, 1]})
    seen = []
    for fraction in (0.0, 0.05, 0.06, 0.5, 1.0):
        algorithm.update_schedules(fraction)
        seen.append(algorithm.epochs)
    assert seen == [10, 10, 9, 6, 1] and all(type(x) is int for x in seen)


@pytest.mark.parametrize("cls", ALL)
def test_what_schedules_have_come_to_is_restored(cls: type[Algorithm]) -> None:
    env = PointMass(8)
    rate = "critic_lr" if issubclass(cls, NPG) else "lr"
    options: dict[str, Any] = {rate: {"adaptive": {"start": 1e-6, "kl": 0.5}}}
    algorithm, twin = build(cls, env, **options), build(cls, env, **options)
    rollouts = collector(algorithm, env)
    for _ in range(3):
        algorithm.iterate(rollouts)
    assert float(getattr(algorithm, rate)) == pytest.approx(1e-6 * 1.5**3)
    twin.load_state_dict(copy.deepcopy(algorithm.state_dict()))
    optimizer = getattr(twin, "critic_optimizer" if issubclass(cls, NPG) else "optimizer")
    assert float(getattr(twin, rate)) == float(optimizer.lr) == float(getattr(algorithm, rate))
    twin.schedules[rate].react(torch.tensor(0.0))
    assert float(optimizer.lr) == pytest.approx(1e-6 * 1.5**4)  # the optimizer still follows


def test_a_number_that_moves_does_not_compile_anew() -> None:
    env = PointMass(8)
    algorithm = build(PPO, env, entropy_coef={"linear": [0.01, 0]}, clip={"linear": [0.2, 0]})
    with torch.no_grad():
        batch = algorithm._compute_advantages(collector(algorithm, env).collect(algorithm.policy))
    torch.compiler.reset()
    loss = torch.compile(algorithm.loss, backend="eager", fullgraph=True, dynamic=False)
    first = loss(batch)[0]
    with torch._dynamo.config.patch(error_on_recompile=True):  # pyright: ignore[reportAttributeAccessIssue]
        algorithm.update_schedules(0.9)
        assert float(loss(batch)[0]) == pytest.approx(float(algorithm.loss(batch)[0]))
    assert float(first) != float(loss(batch)[0])
