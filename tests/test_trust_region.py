"""Natural gradients, against dense linear algebra and the softmax bandit, where everything is known."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from pgsuite.functional import trust_region as tr
from pgsuite.nn.distributions import Categorical

THETA = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64)
REWARD = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
FORMS = pytest.mark.parametrize("form", ["double-backward", "gauss-newton"])
GRADIENT = torch.tensor([-0.27006445, 0.06121938, 0.20884507], dtype=torch.float64)


def bandit() -> tuple[Tensor, Tensor]:
    """Parameters, and the Fisher matrix there."""
    pi = THETA.softmax(0)
    return THETA.clone().requires_grad_(), torch.diag(pi) - torch.outer(pi, pi)


def bandit_product(form: str, damping: float):
    theta, fisher = bandit()
    old = Categorical(THETA.log_softmax(-1))
    if form == "double-backward":
        return tr.fisher_product(old.kl(Categorical(theta.log_softmax(-1))), [theta], damping), fisher
    product = tr.gauss_newton_product(lambda x: Categorical(x.log_softmax(-1)), lambda p, q: p.kl(q), THETA, damping)
    return product, fisher


def test_conjugate_gradient_solves_like_a_dense_solver() -> None:
    a = torch.randn(12, 12, dtype=torch.float64)
    a, b = a @ a.T + torch.eye(12), torch.randn(12, dtype=torch.float64)
    got = tr.conjugate_gradient(lambda v: a @ v, b, iters=40)
    assert torch.allclose(got, torch.linalg.solve(a, b), atol=1e-5)


def test_conjugate_gradient_needs_one_iteration_per_distinct_eigenvalue() -> None:
    a, b = torch.diag(torch.tensor([1.0, 1.0, 4.0, 4.0])), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.allclose(tr.conjugate_gradient(lambda v: a @ v, b, iters=2), b / a.diag(), atol=1e-6)
    assert not torch.allclose(tr.conjugate_gradient(lambda v: a @ v, b, iters=1), b / a.diag(), atol=1e-2)


def test_conjugate_gradient_past_convergence_changes_nothing() -> None:
    b = torch.ones(5)
    assert torch.equal(tr.conjugate_gradient(lambda v: 2 * v, b, 50), b / 2)
    assert torch.equal(tr.conjugate_gradient(lambda v: v, torch.zeros(5), 10), torch.zeros(5))


def spread(condition: float, size: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """A symmetric matrix with eigenvalues from 1 to condition, a right side, and the solution."""
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    a = q @ torch.diag(torch.logspace(0, math.log10(condition), size, dtype=torch.float64)) @ q.T
    b = torch.randn(size, dtype=torch.float64)
    return a, b, torch.linalg.solve(a, b)


@pytest.mark.parametrize("condition", [10.0, 1000.0])
def test_conjugate_gradient_nears_the_solution_as_fast_as_theory_says(condition: float) -> None:
    """In the norm of A, the error falls below 2 ((sqrt k - 1) / (sqrt k + 1))^n of the first, and never rises."""
    a, b, x = spread(condition)
    rate = (math.sqrt(condition) - 1) / (math.sqrt(condition) + 1)
    errors = [x - tr.conjugate_gradient(lambda v: a @ v, b, n, tol=0.0) if n else x for n in range(21)]
    norms = [math.sqrt(float(e @ a @ e)) for e in errors]
    assert all(norm <= 2 * rate**n * norms[0] for n, norm in enumerate(norms))
    assert all(later < sooner for sooner, later in itertools.pairwise(norms))


def test_a_tolerance_stops_conjugate_gradient_where_the_residual_has_fallen_to_it() -> None:
    a, b, x = spread(100.0)
    tol = 1e-3 * float(b @ b)
    all_steps = [tr.conjugate_gradient(lambda v: a @ v, b, n, tol=0.0) for n in range(1, 31)]
    residuals = [float((b - a @ y).square().sum()) for y in all_steps]
    arrival = next(n for n, rr in enumerate(residuals) if rr <= tol)
    got = tr.conjugate_gradient(lambda v: a @ v, b, 30, tol)
    assert 1 < arrival < 20 and torch.equal(got, all_steps[arrival])
    assert float((got - x).norm()) <= math.sqrt(tol)  # over the least eigenvalue, which is one


@FORMS
def test_fisher_product_of_the_bandit_is_its_fisher_matrix(form: str) -> None:
    product, fisher = bandit_product(form, damping=0.0)
    assert torch.allclose(torch.stack([product(e) for e in torch.eye(3, dtype=torch.float64)]), fisher)


@FORMS
def test_the_natural_gradient_of_the_bandit(form: str) -> None:
    product, _ = bandit_product(form, damping=0.0)
    natural = tr.conjugate_gradient(product, GRADIENT, iters=10, tol=1e-20)
    assert torch.allclose(natural, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), atol=1e-6)
    damped, _ = bandit_product(form, damping=0.1)
    expected = torch.tensor([-0.71950586, 0.03864646, 0.68085940], dtype=torch.float64)
    assert torch.allclose(tr.conjugate_gradient(damped, GRADIENT, iters=10, tol=1e-20), expected, atol=1e-6)


@FORMS
def test_the_full_step_of_the_bandit_overshoots_and_one_backtrack_mends_it(form: str) -> None:
    product, _ = bandit_product(form, damping=0.0)
    delta, direction = 0.01, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    step = direction * math.sqrt(2 * delta / float(direction @ product(direction)))
    old, tried = Categorical(THETA.log_softmax(-1)), []

    def accept(fraction: Tensor) -> Tensor:
        tried.append(old.kl(Categorical((THETA + fraction * step).log_softmax(-1))))
        return tried[-1] <= delta

    assert float(tr.backtrack(accept, 0.8 ** torch.arange(10.0))) == pytest.approx(0.8)
    assert tried[0] == pytest.approx(0.01006207, abs=1e-8) and len(tried) == 2


@pytest.mark.parametrize("accepted", [[0, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], ids=str)
def test_both_searches_take_the_first_that_is_acceptable_or_none(accepted: list[int]) -> None:
    fractions, tried = 0.5 ** torch.arange(5.0), []
    table = dict(zip(fractions.tolist(), accepted, strict=True))

    def accept(fraction: Tensor) -> Tensor:
        tried.append(fraction.tolist())
        return torch.tensor(table[tried[-1]] > 0)

    expected = next((f for f, good in table.items() if good), 0.0)
    assert float(tr.backtrack(accept, fractions)) == expected
    assert tried == [f for f in table if f >= expected]
    assert float(tr.backtrack_at_once(lambda f: torch.tensor(accepted) > 0, fractions)) == expected


def test_assigning_what_was_flattened_changes_no_bit_and_no_address() -> None:
    params = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(5))]
    addresses, before = [p.data_ptr() for p in params], [p.detach().clone() for p in params]
    flat = tr.flatten(params).detach()
    tr.assign(params, flat + 1)
    assert torch.equal(params[1], before[1] + 1)
    tr.assign(params, flat)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert [p.data_ptr() for p in params] == addresses
