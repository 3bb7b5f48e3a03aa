"""Constrained methods: the step is that of the dense program, the multiplier follows the cost, and tasks cost what
Safety-Gymnasium's do."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from toys import build, collector, mostly_long

from pgsuite.algorithms import CPO, PPO, PPOLagrangian, TRPOLagrangian
from pgsuite.algorithms.constrained import EpisodeCost
from pgsuite.envs import make
from pgsuite.envs.tasks import Cruise
from pgsuite.functional.constrained import constrained_step
from pgsuite.functional.trust_region import flatten
from pgsuite.testing import check_algorithm
from pgsuite.testing.worlds import Point
from pgsuite.training.callbacks import Evaluate, Evaluation
from pgsuite.training.trainer import Report
from pgsuite.types import Rollout

METHODS = [PPOLagrangian, TRPOLagrangian, CPO]


@pytest.fixture
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_best_evaluation_holds_the_limit_and_where_none_does_costs_least() -> None:
    algorithm = build(PPOLagrangian, make(Cruise(), 4), cost_limit=10.0)
    returns, costs = (5.0, 90.0, 80.0, 70.0, 60.0), (40.0, 30.0, 9.0, 10.0, 0.0)
    evaluations = [{"return": x, "cost": y} for x, y in zip(returns, costs, strict=True)]
    assert max(evaluations, key=algorithm.rank) == {"return": 80.0, "cost": 9.0}
    trainer: Any = SimpleNamespace(algorithm=algorithm, total_steps=9, stop=0, seconds={"total": 0.0})
    kept: Any = SimpleNamespace(save=lambda trainer: None)
    callback = Evaluate(lambda policy, steps, *rest: evaluations[steps - 1], None, [], kept, Evaluation(every=1))
    for step in range(5):
        callback.on_iteration(trainer, Report(step, step + 1, {}, [], [], True))
    assert callback.best == {"steps": 3, "return": 80.0, "cost": 9.0}
    assert max(evaluations[:2], key=algorithm.rank) == {"return": 90.0, "cost": 30.0}
    assert max([{"return": 9.0, "cost": 20.0}, evaluations[1]], key=algorithm.rank)["cost"] == 20.0
    assert max(evaluations, key=build(PPO, make(Cruise(), 4)).rank)["return"] == 90.0


# The step


def program(generator: torch.Generator, size: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random Fisher matrix, the gradients of reward and cost, and a violation."""
    root = torch.randn(size, size, generator=generator)
    fisher = root @ root.T + 0.1 * torch.eye(size)
    reward, cost = torch.randn(2, size, generator=generator)
    return fisher, reward, cost, 0.3 * torch.randn((), generator=generator)


def solved(fisher: Tensor, reward: Tensor, cost: Tensor, violation: Tensor, max_kl: float) -> Any:
    x, y = torch.linalg.solve(fisher, reward), torch.linalg.solve(fisher, cost)
    return constrained_step(x, y, fisher @ x, fisher @ y, violation, max_kl)


@pytest.mark.usefixtures("double")
def test_a_step_is_optimal_by_its_dual_or_recovers_fastest_where_none_is_feasible() -> None:
    """Feasible in the dense program, and worth what its multipliers, feasible in the dual, bound every step by, so that
    no step is worth more.  Without a feasible step it is at the end of the trust region that costs least."""
    generator, max_kl, kinds = torch.Generator().manual_seed(0), 0.01, {"free": 0, "bound": 0, "recovers": 0}
    for _ in range(150):
        fisher, g, b, c = program(generator)
        x, feasible, nu, lam = solved(fisher, g, b, c, max_kl)
        least = -(2 * max_kl * (b @ torch.linalg.solve(fisher, b))).sqrt()  # of b'x in the trust region
        assert bool(feasible) == bool(least + c <= 0)
        assert x @ fisher @ x / 2 <= max_kl * (1 + 1e-9)
        if not feasible:
            kinds["recovers"] += 1
            assert torch.allclose(b @ x, least)
            continue
        kinds["free" if nu == 0 else "bound"] += 1
        assert b @ x + c <= 1e-9 and nu >= 0 and lam > 0
        slope = g - nu * b
        dual = slope @ torch.linalg.solve(fisher, slope) / (2 * lam) + lam * max_kl - nu * c
        assert torch.allclose(g @ x, dual)
    assert min(kinds.values()) > 15


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("violation", [-1.0, -1e-3, 0.0, 1e-3, 1.0])
def test_gradients_that_are_parallel_or_zero_have_a_step(violation: float) -> None:
    fisher, g, b, _ = program(torch.Generator().manual_seed(1))
    c = torch.tensor(violation)
    along = solved(fisher, g, 2 * g, c, 0.01).step
    assert along.isfinite().all() and along @ fisher @ along / 2 <= 0.01 * (1 + 1e-9)
    if violation < 0.2:  # feasible
        assert 2 * g @ along + c <= 1e-9
    free = solved(fisher, g, 0 * b, c, 0.01)
    assert bool(free.feasible) and torch.allclose(free.step @ fisher @ free.step / 2, torch.tensor(0.01))
    assert solved(fisher, 0 * g, b, c, 0.01).step.isfinite().all()


def first_batch(algorithm: Any, env: Any) -> Any:
    rollout = algorithm.preprocess(collector(algorithm, env, 12).collect(algorithm.policy))
    return algorithm.compute_advantages(rollout)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("above", mostly_long([-0.5, 0.01, 5.0], 0.01, 5.0))
def test_cpo_steps_as_the_dense_program_says_and_asks_for_a_lower_cost_above_the_limit(above: float) -> None:
    """``above``: the mean cost of an episode, above the limit.  At the last of them no step is feasible."""
    env = make(Point(), 64, dtype=torch.float64, seed=0)
    algorithm = build(CPO, env, hidden=(4,), cg_iters=60, cg_tol=1e-24, damping=1e-3, scale=False)
    batch = first_batch(algorithm, env)
    algorithm.cost_limit = float(algorithm.episodes.cost) - above
    start = flatten(list(algorithm.policy.parameters())).detach()
    costly = replace(batch, advantage=batch.channels["cost"])
    models = [algorithm.linearize(start, x) for x in (batch, costly)]
    fisher = torch.stack([models[0].product(x) for x in torch.eye(len(start))])
    c = algorithm.cost.unit * above / algorithm.episodes.length
    wanted = solved(fisher, models[0].gradient, models[1].gradient, c, 0.01)
    step, _, metrics = algorithm.full_step(start, batch, models[0])
    assert torch.allclose(step, wanted.step, rtol=1e-4, atol=1e-6)
    assert bool(metrics["feasible"]) == (above < 1) and (above < 0 or float((step * models[1].gradient).sum()) < 0)
    found = algorithm.update_policy(batch)
    moved = flatten(list(algorithm.policy.parameters())).detach()
    with torch.no_grad():
        (improvement, kl), (increase, _) = (model.evaluate_step(moved) for model in models)
    assert found["accepted"] == 1 and kl <= 0.01 and increase <= max(-c, 0)
    assert improvement > 0 if above <= 0 else increase < 0


def test_a_margin_gathers_violations_and_is_a_lower_limit() -> None:
    env = make(Point(), 64, seed=0)
    algorithm = build(CPO, env, margin_lr=0.25, scale=False)
    start, batch = flatten(list(algorithm.policy.parameters())).detach(), first_batch(algorithm, env)
    assert algorithm.margin.value == 0  # the limit of 25 is not reached
    cost, margin = algorithm.episodes.cost.clone(), algorithm.margin
    for above, expected in ((1.0, 0.25), (2.0, 0.75), (-1.0, 0.5)):
        margin.follow(cost - (float(cost) - above), algorithm.margin_lr)
        assert margin.value == pytest.approx(expected)
    model = algorithm.linearize(start, batch)
    algorithm.cost_limit = float(cost)
    found = algorithm.full_step(start, batch, model)[0]
    margin.follow(torch.tensor(-9.0), 1.0)
    assert margin.value == 0 and not torch.allclose(algorithm.full_step(start, batch, model)[0], found)
    algorithm.cost_limit = float(cost) - 0.5
    assert torch.allclose(algorithm.full_step(start, batch, model)[0], found, rtol=1e-3, atol=1e-5)
    first_batch(algorithm, env)
    assert margin.value == pytest.approx(0.25 * (float(algorithm.episodes.cost) - algorithm.cost_limit))
    other = build(CPO, env, margin_lr=0.25, scale=False)
    other.load_state_dict(algorithm.state_dict())
    assert other.margin.value == margin.value > 0


def test_a_step_that_costs_more_than_is_left_is_not_taken() -> None:
    env = make(Point(), 64, seed=0)
    algorithm = build(CPO, env, cost_limit=0.0, margin_lr=0, backtrack_coef=0.5, max_backtracks=3)
    batch = first_batch(algorithm, env)
    algorithm.cost_limit = float(algorithm.episodes.cost)  # nothing is left, and everything costs more
    real, start = algorithm.linearize, flatten(list(algorithm.policy.parameters())).detach()

    def dearer(at: Tensor, seen: Any) -> Any:
        model = real(at, seen)
        if torch.equal(seen.advantage, batch.channels["cost"]):
            return model._replace(evaluate_step=lambda x: (1e-3 + 0 * x.sum(-1), 0 * x.sum(-1)))
        return model._replace(evaluate_step=lambda x: (1.0 + 0 * x.sum(-1), 0 * x.sum(-1)))

    algorithm.linearize = dearer
    assert algorithm.update_policy(batch)["accepted"] == 0
    assert torch.equal(start, flatten(list(algorithm.policy.parameters())).detach())


# The multiplier


def rollout_of(cost: Tensor, ends: Tensor, start: Tensor) -> Rollout:
    """A rollout [T, N] with these costs and ends of episodes."""
    zeros, never = torch.zeros_like(cost), torch.zeros_like(ends)
    first = torch.cat([start.unsqueeze(0), ends[:-1]])
    obs, always = zeros.unsqueeze(-1), torch.ones_like(ends)
    return Rollout(obs, {}, first, obs, zeros, zeros, obs, ends, never, always, channels={"cost": cost})


def test_the_cost_of_an_episode_is_that_of_a_step_times_the_length_of_those_which_ended_last() -> None:
    episodes, generator = EpisodeCost(2), torch.Generator().manual_seed(0)
    cost = torch.rand(12, 2, generator=generator)
    ends = torch.zeros(12, 2, dtype=torch.bool)
    ends[5, 0] = ends[6, 1] = True
    start = torch.ones(2, dtype=torch.bool)
    for t, length in ((0, 4), (4, 6.5), (8, 6.5)):
        part = cost[t : t + 4]
        episodes.update(part, rollout_of(part, ends[t : t + 4], start))
        start = ends[t + 3]
        assert float(episodes.length) == length
        assert float(episodes.cost) == pytest.approx(length * float(part.mean()))


def test_the_cost_of_whole_episodes_is_their_mean() -> None:
    episodes, generator = EpisodeCost(2), torch.Generator().manual_seed(0)
    cost, ends = torch.rand(8, 2, generator=generator), torch.zeros(8, 2, dtype=torch.bool)
    ends[2, 0] = ends[7] = True
    episodes.update(cost, rollout_of(cost, ends, torch.ones(2, dtype=torch.bool)))
    assert float(episodes.cost) == pytest.approx(float(cost.sum()) / 3)


def test_the_multiplier_follows_the_violation_by_adam_and_stays_above_zero() -> None:
    env = make(Cruise(), 8, seed=0)
    algorithm: Any = build(PPOLagrangian, env, multiplier=0.05, multiplier_lr=0.03, cost_limit=4.0)
    ends, mean, square, value, steps = torch.ones(1, 8, dtype=torch.bool), 0.0, 0.0, 0.05, 0
    for level in (9.0, 6.0, *[0.0] * 14):
        cost = torch.full((1, 8), level)
        algorithm.preprocess(rollout_of(cost, ends, torch.ones(8, dtype=torch.bool)))
        steps, slope = steps + 1, 4.0 - level
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        deviation = math.sqrt(square / (1 - 0.999**steps)) + 1e-5
        value = max(0.0, value - 0.03 * mean / (1 - 0.9**steps) / deviation)
        assert float(algorithm.price.value.detach()) == pytest.approx(value, rel=1e-4)
    assert value == 0


def test_a_lagrangian_gains_reward_less_the_price_of_the_cost() -> None:
    env = make(Point(), 16, seed=0)
    algorithm: Any = build(TRPOLagrangian, env, multiplier=0.5, multiplier_lr=1e-9, normalize_advantage="none")
    rollout = algorithm.preprocess(collector(algorithm, env, 12).collect(algorithm.policy))
    batch, cost = algorithm.compute_advantages(rollout), rollout.estimates["cost"]["advantage"]
    reward = batch.target - batch.value  # of GAE, before it is combined
    assert torch.allclose(batch.advantage, (reward - 0.5 * cost) / 1.5, atol=1e-6)


@pytest.mark.parametrize("cls", mostly_long(METHODS))
def test_constrained_methods_do_what_the_suite_relies_on(cls: Any) -> None:
    check_algorithm(cls, learns=False, cost_limit=6.0)


@pytest.mark.long
@pytest.mark.parametrize("cls", METHODS)
def test_the_cost_is_held_to_its_limit_and_the_return_comes_near_the_best(cls: Any) -> None:
    task = Cruise()
    env = make(task, 48, seed=0)
    algorithm = build(cls, env, cost_limit=4.0)
    rollouts, costs, returns = collector(algorithm, env, 16), [], []
    for _ in range(150):
        algorithm.iterate(rollouts)
        found = rollouts.buffer.read()
        costs.append(float(found.channels["cost"].sum(0).mean()))
        returns.append(float(found.reward.sum(0).mean()))
    assert np.mean(costs[:3]) > 4.5
    assert 3.2 < np.mean(costs[-50:]) < 4.3
    assert 0.85 * task.best(4.0) < np.mean(returns[-50:]) < task.best(4.3)


# Tasks


def test_the_best_policy_of_a_cruise_is_that_of_a_search() -> None:
    """Over the speeds at each drag, on a grid; the mean cost of all of them is within the limit."""
    task, steps = Cruise(), torch.linspace(0, 1, 81, dtype=torch.float64)
    speeds = torch.cartesian_prod(steps, steps, steps)
    cost = (speeds.square() * torch.tensor(task.DRAGS)).mean(-1) * task.max_episode_steps
    best = speeds.mean(-1).where(cost <= 4.0, 0.0).max() * task.max_episode_steps
    assert float(best) == pytest.approx(task.best(4.0), rel=5e-3) and best <= task.best(4.0)
    env = make(task, 4, seed=0)
    obs = env.reset()
    step = env.step(torch.full((4, 1), 0.5))
    assert step.channels is not None and torch.allclose(step.channels["cost"], 0.25 * 2 ** obs.squeeze(-1))


LIMITS = {"HalfCheetah": 3.2096, "Hopper": 0.7402, "Walker2d": 2.3415, "Ant": 2.6222, "Swimmer": 0.2282}
LIMITS["Humanoid"] = 1.4149


@pytest.mark.parametrize("name", LIMITS)
def test_velocity_tasks_cost_one_in_each_step_above_the_limit(name: str) -> None:
    """Of the velocities that gymnasium reports, along the track, and in the plane for robots that may turn."""
    settings = OmegaConf.load(f"configs/env/Safety{name}Velocity.yaml")
    assert settings.velocity_limit == LIMITS[name]
    limit = 0.2  # which random actions exceed now and then
    env: Any = make(name, 2, dtype=torch.float64, seed=1, velocity_limit=limit, threads=1)
    assert env.channels == ("cost",) and make(name, 1, threads=1).channels == ()  # pyright: ignore
    env.reset()
    other: Any = gymnasium.make(f"{name}-v5").unwrapped
    rng, costs = np.random.default_rng(0), []
    for _ in range(12):
        qpos, qvel = (x[0].numpy().copy() for x in (env.task.physics.qpos, env.task.physics.qvel))
        other.set_state(qpos, qvel)
        action = rng.uniform(-1, 1, (2, *env.action_space.shape)).astype(np.float32) * env.action_space.high
        step = env.step(torch.from_numpy(action))
        _, _, _, _, info = other.step(action[0])
        sideways = info["y_velocity"] if name in ("Ant", "Humanoid") else 0.0
        speed = math.hypot(info["x_velocity"], sideways) if sideways else info["x_velocity"]
        if abs(speed - limit) > 0.02:  # set_state loses the warm start of the solver
            assert float(step.channels["cost"][0]) == (speed > limit)
            costs.append(speed > limit)
        if bool(step.done.any()):
            break
        assert float(env.task.speed()[0]) == pytest.approx(speed, abs=0.02)
    assert costs


def test_a_method_whose_channel_is_missing_says_which_environments_have_one() -> None:
    env = make("CartPole", 4)
    algorithm = build(PPOLagrangian, env)
    with pytest.raises(ValueError, match=r"learns from the channel 'cost', and CartPole-v1 has none: take an env"):
        algorithm.validate(collector(algorithm, env))
