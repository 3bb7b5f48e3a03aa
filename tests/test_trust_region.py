"""Natural gradients, against dense linear algebra and the softmax bandit, where everything is known."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from pgsuite.functional import trust_region as tr
from pgsuite.nn.distributions import Categorical
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Policy

THETA = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64)
REWARD = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
GRADIENT = torch.tensor([-0.27006445, 0.06121938, 0.20884507], dtype=torch.float64)


def bandit() -> tuple[Tensor, Tensor]:
    """Parameters, and the Fisher matrix there."""
    pi = THETA.softmax(0)
    return THETA.clone().requires_grad_(), torch.diag(pi) - torch.outer(pi, pi)


def bandit_product(damping: float):
    theta, fisher = bandit()
    old = Categorical(THETA.log_softmax(-1))
    return tr.fisher_product(old.kl(Categorical(theta.log_softmax(-1))), [theta], damping), fisher


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


def test_fisher_product_of_the_bandit_is_its_fisher_matrix() -> None:
    product, fisher = bandit_product(damping=0.0)
    assert torch.allclose(torch.stack([product(e) for e in torch.eye(3, dtype=torch.float64)]), fisher)


BOX = spaces.Box(-1.0, 1.0, (2,))


@pytest.mark.parametrize(
    ("actions", "options"),
    [
        (BOX, {}),
        (BOX, {"sigma": "state"}),
        (BOX, {"distribution": "squashed"}),
        (BOX, {"distribution": "squashed", "sigma": "state"}),
        (BOX, {"distribution": "beta"}),
        (spaces.Discrete(3), {}),
        (spaces.MultiDiscrete([2, 3]), {}),
        (spaces.MultiBinary(2), {}),
    ],
    ids=str,
)
def test_fisher_product_is_the_hessian_of_the_kl_of_a_network(
    actions: spaces.Space[Any], options: dict[str, Any]
) -> None:
    norm = Standardize(spaces.Box(-9.0, 9.0, (4,)), enabled=False)
    policy = Policy(norm, actions, hidden=(3,), **options).double()
    seen = SimpleNamespace(obs=torch.randn(16, 4, dtype=torch.float64))
    params, old = list(policy.parameters()), policy.dist(seen).detach()  # pyright: ignore[reportArgumentType]
    product = tr.fisher_product(old.kl(policy.dist(seen)).mean(), params, damping=0.3)  # pyright: ignore
    names = [name for name, _ in policy.named_parameters()]

    class Dist(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = policy

        def forward(self):
            return self.policy.dist(seen)  # pyright: ignore[reportArgumentType]

    def kl(flat: Tensor) -> Tensor:
        chunks = flat.split([p.numel() for p in params])
        state = {f"policy.{n}": c.view_as(p) for n, c, p in zip(names, chunks, params, strict=True)}
        return old.kl(torch.func.functional_call(Dist(), state, ())).mean()

    hessian = torch.autograd.functional.hessian(kl, tr.flatten(params).detach())
    v = torch.randn(len(hessian), dtype=torch.float64)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(product(v), hessian @ v + 0.3 * v, atol=1e-8)


def test_the_natural_gradient_of_the_bandit() -> None:
    product, _ = bandit_product(damping=0.0)
    natural = tr.conjugate_gradient(product, GRADIENT, iters=10, tol=1e-20)
    assert torch.allclose(natural, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), atol=1e-6)
    damped, _ = bandit_product(damping=0.1)
    expected = torch.tensor([-0.71950586, 0.03864646, 0.68085940], dtype=torch.float64)
    assert torch.allclose(tr.conjugate_gradient(damped, GRADIENT, iters=10, tol=1e-20), expected, atol=1e-6)


def test_the_full_step_of_the_bandit_overshoots_and_one_backtrack_mends_it() -> None:
    product, _ = bandit_product(damping=0.0)
    delta, direction = 0.01, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    step = direction * math.sqrt(2 * delta / float(direction @ product(direction)))
    old, tried = Categorical(THETA.log_softmax(-1)), []

    def accept(fraction: float) -> bool:
        tried.append(float(old.kl(Categorical((THETA + fraction * step).log_softmax(-1)))))
        return tried[-1] <= delta

    assert tr.backtrack(accept, shrink=0.8, tries=10) == 0.8
    assert tried[0] == pytest.approx(0.01006207, abs=1e-8) and len(tried) == 2


def test_backtracking_does_not_compound_and_gives_up() -> None:
    tried: list[float] = []
    assert tr.backtrack(lambda f: bool(tried.append(f)), shrink=0.5, tries=4) == 0.0
    assert tried == [1.0, 0.5, 0.25, 0.125]


def test_assigning_what_was_flattened_changes_no_bit_and_no_address() -> None:
    params = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(5))]
    addresses, before = [p.data_ptr() for p in params], [p.detach().clone() for p in params]
    flat = tr.flatten(params).detach()
    tr.assign(params, flat + 1)
    assert torch.equal(params[1], before[1] + 1)
    tr.assign(params, flat)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert [p.data_ptr() for p in params] == addresses
