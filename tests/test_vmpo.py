"""SPO and V-MPO against closed forms and numerical optima, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import BRIEF, PointMass, build, collector, compile_alike, resume_alike

from pgsuite.algorithms import SPO, VMPO, Algorithm
from pgsuite.functional.trust_region import flatten
from pgsuite.nn.policy import PastPolicy
from pgsuite.testing import check_algorithm
from pgsuite.types import Batch

BRIEF |= {SPO: {"epochs": 2, "minibatches": 2}, VMPO: {"epochs": 2, "minibatches": 2}}


def test_spo_leads_to_the_ratio_whose_distance_from_one_is_the_clip() -> None:
    algorithm = build(SPO, PointMass(4), clip=0.3)
    advantage = torch.tensor([2.0, 0.1, -1.0, -5.0], dtype=torch.float64)
    for start in (0.2, 1.0, 3.0):
        ratio = torch.full_like(advantage, start).requires_grad_()
        (slope,) = torch.autograd.grad(algorithm.surrogate(ratio, advantage).sum(), ratio)
        assert torch.allclose(slope, advantage - advantage.abs() * (start - 1) / 0.3, rtol=1e-12)
    best = (1 + 0.3 * advantage.sign()).requires_grad_()
    (slope,) = torch.autograd.grad(algorithm.surrogate(best, advantage).sum(), best)
    assert slope.abs().max() < 1e-12
    there = algorithm.surrogate(best.detach(), advantage)
    for step in (-1e-3, 1e-3):
        assert (algorithm.surrogate(best.detach() + step, advantage) < there).all()


def batch_of(advantage: Tensor, mask: Tensor) -> Batch:
    nothing = torch.zeros_like(advantage)
    return Batch(nothing, {}, mask, nothing, nothing, nothing, advantage, nothing, mask)


def best_temperature(better: Tensor, bound: float) -> float:
    """Where the dual is least: by bisection on its derivative, bound minus KL(psi || uniform)."""

    def slope(temperature: float) -> float:
        psi = (better / temperature).softmax(0)
        return bound - float((psi * (psi.log() + math.log(len(better)))).sum())

    low, high = 1e-3, 1e3
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return low


@pytest.mark.parametrize("bound", [0.02, 0.5])
def test_the_dual_of_the_temperature_is_least_at_its_numerical_optimum(bound: float) -> None:
    stream = torch.Generator().manual_seed(0)
    advantage = torch.empty(7, 30, dtype=torch.float64).normal_(generator=stream)
    mask = torch.empty_like(advantage).uniform_(generator=stream) < 0.8
    real = advantage[mask].sort(descending=True).values
    better = real[: (len(real) + 1) // 2]
    algorithm = build(VMPO, PointMass(4), temperature_bound=bound)
    batch = batch_of(advantage.where(mask, 1e6), mask)  # masked cells may hold anything

    def dual(log_temperature: Tensor) -> Tensor:
        temperature = log_temperature.exp()
        return temperature * (bound + algorithm.weights(batch, temperature)[1])

    best = torch.tensor(math.log(best_temperature(better, bound)), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(dual(best), best)
    assert abs(float(slope)) < 1e-9
    found = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        (slope,) = torch.autograd.grad(dual(found), found)
        found = (found - slope).detach().requires_grad_()
    assert float(found.detach()) == pytest.approx(float(best.detach()), abs=1e-6)
    weight = algorithm.weights(batch, best.exp())[0]
    psi = (better / best.detach().exp()).softmax(0)
    assert torch.allclose(weight[mask & (advantage >= better[-1])].sort(descending=True).values / mask.sum(), psi)
    assert float(weight.sum()) == pytest.approx(int(mask.sum())) and int((weight > 0).sum()) == len(better)


def test_vmpo_maximizes_the_weighted_likelihood_within_a_kl_that_its_multiplier_holds() -> None:
    env = PointMass(8)
    algorithm = build(VMPO, env, normalize_advantage="none", value_coef=0.0, max_kl=0.02)
    batch = algorithm.compute_advantages(collector(algorithm, env, 10).collect(algorithm.policy))
    batch = batch.map(lambda x: x.double() if x.is_floating_point() else x)
    algorithm.policy.double()
    params = list(algorithm.policy.parameters())
    algorithm.old = PastPolicy(algorithm.policy)

    def slope(y: Tensor, xs: Any) -> Tensor:
        return flatten(torch.autograd.grad(y, xs, materialize_grads=True))

    better = batch.advantage >= batch.advantage.flatten().sort(descending=True).values[39]
    psi = batch.advantage.where(better, -math.inf).flatten().softmax(0)
    expected = slope(-(psi @ algorithm.policy.dist(batch).log_prob(batch.action).flatten()), params)
    loss, metrics = algorithm.loss(batch)
    assert torch.allclose(slope(loss, params), expected, rtol=1e-6, atol=1e-9) and float(metrics["kl"]) == 0
    # Away from the old policy the KL pulls back, and its multiplier rises beyond the bound only.
    for size, rises in ((0.01, False), (1.0, True)):
        with torch.no_grad():
            params[-1].copy_(algorithm.old.flat[-len(params[-1]) :] + size)
        loss, metrics = algorithm.loss(batch)
        assert (float(metrics["kl"]) > 0.02) == rises
        (move,) = torch.autograd.grad(loss, algorithm.multipliers.log_kl_coef)
        assert (float(move) < 0) == rises and float(move) == pytest.approx(0.02 - float(metrics["kl"]), rel=1e-5)


@pytest.mark.parametrize("cls", [SPO, VMPO])
def test_they_resume_exactly(cls: type[Algorithm]) -> None:
    one, two = (
        (algorithm, collector(algorithm, env))
        for env, algorithm in ((env, build(cls, env, **BRIEF[cls])) for env in (PointMass(8), PointMass(8)))
    )
    one[0].iterate(one[1])
    resume_alike(one, two)


@pytest.mark.long
@pytest.mark.parametrize("cls", [SPO, VMPO])
def test_they_compile(cls: type[Algorithm], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_alike(lambda env: build(cls, env, **BRIEF[cls]), monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("cls", [SPO, VMPO])
def test_they_do_what_the_suite_relies_on(cls: type[Algorithm]) -> None:
    check_algorithm(cls)
