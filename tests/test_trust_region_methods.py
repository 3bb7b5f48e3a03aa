"""NPG and TRPO: both forms of the Fisher product and both line searches, against what is exact."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gymnasium import spaces
from test_algorithms import first_batch, flat
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from toys import PointMass, build, collector, mostly_long

from pgsuite.algorithms import NPG, TRPO
from pgsuite.envs import make
from pgsuite.functional import trust_region as tr
from pgsuite.nn.distributions import Categorical, Gaussian
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Policy
from pgsuite.nn.stateless import functional_in_parameters
from pgsuite.testing.reads import NothingRead
from pgsuite.types import ACTION_MASK, masked_mean

FISHER = pytest.mark.parametrize("fisher", ["double-backward", "gauss-newton"])
SEARCH = pytest.mark.parametrize("line_search", ["sequential", "batched"])
BOX, SEEN = spaces.Box(-1.0, 1.0, (2,)), spaces.Box(-9.0, 9.0, (4,))


def plain(actions: spaces.Space[Any], **options: Any) -> Policy:
    return Policy(Standardize(SEEN, enabled=False), actions, hidden=(3,), **options)


def choosy(actions: spaces.Space[Any], count: int) -> Policy:
    """Of whose actions some are not allowed."""
    seen = spaces.Dict({"obs": SEEN, ACTION_MASK: spaces.MultiBinary(count)})
    return Policy(Standardize(seen, enabled=False), actions, hidden=(3,))


POLICIES: dict[str, Callable[[], Policy]] = {
    "gaussian": lambda: plain(BOX),
    "gaussian, clamped": lambda: plain(BOX, log_sigma=-21.0),
    "gaussian, sigma of the state": lambda: plain(BOX, sigma="state"),
    "squashed": lambda: plain(BOX, distribution="squashed"),
    "squashed, sigma of the state": lambda: plain(BOX, distribution="squashed", sigma="state"),
    "beta": lambda: plain(BOX, distribution="beta"),
    "categorical": lambda: plain(spaces.Discrete(3)),
    "categorical, masked": lambda: choosy(spaces.Discrete(3), 3),
    "multicategorical": lambda: plain(spaces.MultiDiscrete([2, 3])),
    "multicategorical, masked": lambda: choosy(spaces.MultiDiscrete([2, 3]), 5),
    "bernoulli": lambda: plain(spaces.MultiBinary(2)),
    "bernoulli, masked": lambda: choosy(spaces.MultiBinary(2), 2),
    "gaussian, normalized": lambda: plain(BOX, norm="layer"),
    "gaussian, of residual blocks": lambda: plain(BOX, block="residual", norm="layer", activation="silu"),
    "gaussian, remembering": lambda: plain(BOX, recurrent="gru", recurrent_size=3),
    "gaussian, attending": lambda: plain(
        BOX, recurrent={"_target_": "transformer", "window": 2, "heads": 1}, recurrent_size=4
    ),
    "beta, remembering": lambda: plain(BOX, distribution="beta", recurrent="lstm", recurrent_size=2),
    "categorical, remembering": lambda: plain(spaces.Discrete(3), recurrent="lstm", recurrent_size=2),
}


def look(policy: Policy, steps: int = 5, envs: int = 4) -> Any:
    """Something for a policy in float64 to see, of which not all is real."""
    obs: Any = torch.randn(steps, envs, 4, dtype=torch.float64)
    if isinstance(policy.obs_norm.space, spaces.Dict):
        allowed = torch.rand(steps, envs, policy.head.inputs) < 0.6
        allowed[..., ::2] = True  # of every choice, something
        obs = {"obs": obs, ACTION_MASK: allowed}
    hidden_state = {
        name: torch.rand(steps, *x.shape, dtype=torch.float64) for name, x in policy.initial_state(envs).items()
    }
    start = torch.rand(steps, envs) < 0.3
    return SimpleNamespace(obs=obs, hidden_state=hidden_state, start=start, mask=torch.rand(steps, envs) < 0.8)


def kl_of(seen: Any) -> Callable[[Any, Any], Tensor]:
    return lambda p, q: masked_mean(p.kl(q), seen.mask)


def matrix(product: Callable[[Tensor], Tensor], size: int) -> Tensor:
    return torch.stack([product(e) for e in torch.eye(size, dtype=torch.float64)], -1)


@pytest.mark.parametrize("name", mostly_long(POLICIES, *(x for x in POLICIES if x != "gaussian, attending")))
def test_both_fisher_products_are_the_hessian_of_the_kl(name: str) -> None:
    policy = POLICIES[name]().double()
    seen, params = look(policy), list(policy.parameters())
    with torch.no_grad():
        for p in params:
            p.add_(0.3 * torch.randn_like(p))  # off the symmetric start
    start, old = tr.flatten(params).detach(), policy.dist(seen).detach()
    dist_at, kl = functional_in_parameters(policy, lambda: policy.dist(seen)), kl_of(seen)
    hessian: Any = torch.autograd.functional.hessian(lambda x: kl(old, dist_at(x)), start)
    twice = matrix(tr.fisher_product(kl(old, policy.dist(seen)), params, damping=0.3), len(start))
    once = matrix(tr.gauss_newton_product(dist_at, kl, start, damping=0.3), len(start))
    expected, scale = hessian + 0.3 * torch.eye(len(start), dtype=torch.float64), float(hessian.abs().max())
    assert scale > 1e-3
    for got in (twice, once):
        assert torch.allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, scale))


def test_the_fisher_matrix_is_the_mean_square_of_the_score() -> None:
    """By enumeration of the actions, and without any divergence."""
    policy = POLICIES["categorical, masked"]().double()
    seen, params = look(policy), list(policy.parameters())
    start, dist_at = tr.flatten(params).detach(), functional_in_parameters(policy, lambda: policy.dist(seen))
    logp: Any = dist_at(start)
    slopes = torch.autograd.functional.jacobian(lambda x: dist_at(x).logits, start)  # pyright: ignore
    squares = torch.einsum("tna,tnap,tnaq->tnpq", logp.logits.exp(), slopes, slopes)
    expected = squares[seen.mask].mean(0)
    got = matrix(tr.gauss_newton_product(dist_at, kl_of(seen), start, damping=0.0), len(start))
    assert float(expected.abs().max()) > 1e-3 and torch.allclose(got, expected, atol=1e-12)


class Cube(torch.autograd.Function):
    """x^3 as a fused kernel might be: both derivatives, and none of the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


def test_gauss_newton_differentiates_no_backward() -> None:
    x, theta = torch.randn(20, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def product(cube: Callable[[Tensor], Tensor], form: str) -> Tensor:
        def model(t: Tensor) -> Gaussian:
            return Gaussian(cube(x * t), torch.zeros(3, dtype=torch.float64))

        if form == "gauss-newton":
            return matrix(tr.gauss_newton_product(model, lambda p, q: p.kl(q).mean(), theta, 0.0), 3)
        at = theta.clone().requires_grad_()
        return matrix(tr.fisher_product(model(theta).kl(model(at)).mean(), [at], 0.0), 3)

    expected = product(lambda y: y**3, "double-backward")
    assert torch.allclose(product(Cube.apply, "gauss-newton"), expected)  # pyright: ignore[reportArgumentType]
    # torch cuts the graph at such a backward rather than say so: the matrix is zero, and damping alone is left.
    assert not product(Cube.apply, "double-backward").any()  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Twofold:
    """Somebody else's distribution, which keeps its numbers in two forms, one of which depends on the other."""

    parts: dict[str, tuple[Categorical, Tensor]]

    def kl(self, other: Any) -> Tensor:
        (p, chance), (q, _) = self.parts["a"], other.parts["a"]
        return (chance * (p.logits - q.logits)).sum(-1)


class Hidden:
    def __init__(self, logits: Tensor) -> None:
        self.inner = Categorical(logits)

    def kl(self, other: Any) -> Tensor:
        return self.inner.kl(other.inner)


def test_numbers_kept_twice_do_not_count_twice_and_hidden_ones_are_refused() -> None:
    theta = torch.randn(4, dtype=torch.float64)
    pi = theta.softmax(0)

    def model(x: Tensor) -> Twofold:
        dist = Categorical(x.log_softmax(-1))
        return Twofold({"a": (dist, dist.logits.exp())})

    product = tr.gauss_newton_product(model, lambda p, q: p.kl(q), theta, 0.0)
    assert torch.allclose(matrix(product, 4), torch.diag(pi) - torch.outer(pi, pi))
    for refused in (Hidden, lambda x: (Hidden(x), x)):
        first = (lambda y: y[0]) if refused is not Hidden else (lambda y: y)
        with pytest.raises(TypeError, match="needs a dataclass of tensors"):
            tr.gauss_newton_product(
                lambda x, make=refused: make(x.log_softmax(-1)),
                lambda p, q, first=first: first(p).kl(first(q)),
                theta,
                0.0,
            )


def test_a_policy_of_a_vector_is_the_policy_with_these_parameters() -> None:
    policy = POLICIES["gaussian, sigma of the state"]().double()
    seen, params = look(policy), list(policy.parameters())
    start, dist_at = tr.flatten(params).detach(), functional_in_parameters(policy, lambda: policy.dist(seen))
    elsewhere = start + torch.randn_like(start)
    there: Any = dist_at(elsewhere)
    assert torch.equal(tr.flatten(params), start) and all(isinstance(p, nn.Parameter) for p in policy.parameters())
    tr.assign(params, elsewhere)
    now: Any = policy.dist(seen)
    assert torch.equal(there.mean, now.mean) and torch.equal(there.log_sigma, now.log_sigma)


# The step


@FISHER
def test_the_step_spends_the_budget_to_second_order(fisher: Any) -> None:
    """KL(e step) = e^2 max_kl + O(e^3): halving e divides what is over by eight."""
    env = PointMass(32)
    algorithm = build(NPG, env, max_kl=1e-3, damping=0.0, fisher=fisher)
    batch = first_batch(algorithm, env, 25).map(lambda x: x.double() if x.is_floating_point() else x)
    algorithm.policy.double()
    kls = []

    def search(attempt: Any, whole: Tensor) -> Any:
        kls.extend(float(attempt(whole / 2**i)[1]) for i in range(5))
        return whole, {}

    algorithm.line_search = search
    algorithm.update_policy(batch)
    over = [abs(kl - 1e-3 / 4**i) for i, kl in enumerate(kls)]
    orders = [math.log2(one / half) for one, half in itertools.pairwise(over)]
    assert over[0] > 1e-6 and all(order > 2.7 for order in orders)


def test_a_loose_tolerance_leaves_a_residual_and_a_tight_one_none() -> None:
    env = PointMass(32)
    residuals = []
    for tol in (1e-2, 1e-10):
        algorithm = build(NPG, env, cg_tol=tol, cg_iters=30)
        batch = first_batch(algorithm, env, 25)
        residuals.append(float(algorithm.update_policy(batch)["cg_residual"]))
    assert residuals[0] > 0.01 > 10 * residuals[1]


def point_mass() -> Any:
    return PointMass(32)


def pendulum() -> Any:
    return make("Pendulum", 16, seed=0)


def cart_pole() -> Any:
    return make("CartPole", 16, seed=0)


@pytest.mark.parametrize("switches", [("double-backward", "sequential"), ("gauss-newton", "batched")], ids="-".join)
@pytest.mark.parametrize("world", [point_mass, pendulum, cart_pole])
def test_every_step_that_is_taken_improves_within_the_budget(world: Any, switches: tuple[str, str]) -> None:
    """And one that is refused changes no bit; over a run, at least nine in ten are taken."""
    env = world()
    algorithm = build(TRPO, env, fisher=switches[0], backtracking=switches[1])
    rollouts, taken = collector(algorithm, env, 32), []
    for _ in range(12):
        before = flat(algorithm)
        metrics = algorithm.iterate(rollouts)
        taken.append(float(metrics["accepted"]))
        if taken[-1]:
            # All at once, products are rounded differently from one at a time.
            assert 0 < metrics["kl"] <= algorithm.max_kl * (1 + 1e-5) and metrics["surrogate_improvement"] > 0
        assert bool(taken[-1]) == (metrics["step_fraction"] > 0) == (not torch.equal(before, flat(algorithm)))
    assert sum(taken) / len(taken) >= 0.9


# The search


@pytest.mark.parametrize("backtracking", ["sequential", "batched"])
@pytest.mark.parametrize(
    ("improves_below", "within_below", "taken"),
    [(2.0, 2.0, 1.0), (0.7, 2.0, 0.5), (2.0, 0.3, 0.25), (0.3, 0.7, 0.25), (0.0, 2.0, 0.0), (2.0, 0.0, 0.0)],
)
def test_a_step_is_taken_where_it_improves_within_the_budget_and_nowhere_else(
    backtracking: Any, improves_below: float, within_below: float, taken: float
) -> None:
    """As far as both are true of shorter steps only."""
    algorithm = build(TRPO, point_mass(), backtracking=backtracking, backtrack_coef=0.5, max_kl=0.01)

    def look(fraction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return improves_below - fraction, torch.where(fraction < within_below, 0.01, 0.0101)

    assert algorithm.line_search(look, torch.ones(()))[0] == taken
    poisoned = algorithm.line_search(lambda fraction: (fraction * torch.nan, 0 * fraction), torch.ones(()))
    assert poisoned[0] == 0


@pytest.mark.parametrize(
    ("world", "parts"),
    mostly_long(
        [(point_mass, {}), (cart_pole, {}), (cart_pole, {"recurrent": "gru"}), (point_mass, {"shared": True})],
        (point_mass, {}),
        (cart_pole, {"recurrent": "gru"}),
    ),
)
def test_the_batched_search_is_the_sequential_one(world: Any, parts: dict[str, Any]) -> None:
    """In every iteration of a run whose quadratic model often lies."""
    twins, backtracks = [], set()
    for line_search in ("sequential", "batched"):
        env = world()
        look = {"recurrent": "gru", "recurrent_size": 8} if "recurrent" in parts else {}
        options: dict[str, Any] = {"max_kl": 0.3, "damping": 1e-4, "backtracking": line_search}
        algorithm = build(TRPO, env, look=look, **parts, **options)
        twins.append((algorithm, collector(algorithm, env, 8 if look else 25)))
    for _ in range(8):
        one, other = (algorithm.iterate(rollouts) for algorithm, rollouts in twins)
        assert torch.equal(flat(twins[0][0]), flat(twins[1][0]))
        assert all(torch.equal(one[name], other[name]) for name in one)
        backtracks.add(int(one["backtracks"]))
    assert len(backtracks) > 1


@FISHER
@pytest.mark.parametrize("world", [point_mass, cart_pole])
def test_the_batched_search_reads_nothing_back(world: Any, fisher: Any) -> None:
    env = world()
    algorithm = build(TRPO, env, fisher=fisher, backtracking="batched")
    rollouts = collector(algorithm, env, 10)
    algorithm.iterate(rollouts)
    batch = first_batch(algorithm, env)
    with NothingRead():
        algorithm.update(batch)


class Timid(TRPO):
    """Whose objective has the right slope, and falls in every direction."""

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return super().surrogate(ratio, advantage) - 1e6 * (ratio - 1) ** 2


def bits(algorithm: Any) -> list[Tensor]:
    return [p.detach().clone().view(torch.int32) for p in algorithm.policy.parameters()]


@SEARCH
@FISHER
@pytest.mark.parametrize("poison", [None, math.nan, math.inf, 0.0])
def test_a_failed_search_and_a_poisoned_batch_change_no_bit(
    poison: float | None, fisher: Any, line_search: Any
) -> None:
    env = PointMass(16)
    algorithm = build(Timid if poison is None else TRPO, env, fisher=fisher, backtracking=line_search)
    with torch.no_grad():
        algorithm.policy.out.bias.fill_(-0.0)  # which 0 * step, added, would make 0.0
    batch = first_batch(algorithm, env)
    if poison is not None:
        batch.advantage.fill_(poison)
    before, addresses = bits(algorithm), [p.data_ptr() for p in algorithm.policy.parameters()]
    metrics = algorithm.update_policy(batch)
    assert all(map(torch.equal, before, bits(algorithm)))
    assert addresses == [p.data_ptr() for p in algorithm.policy.parameters()]
    assert float(metrics["accepted"]) == 0 and float(metrics["backtracks"]) == 10


@SEARCH
@FISHER
def test_hyperparameters_may_be_tensors(fisher: Any, line_search: Any) -> None:
    """As a schedule makes them."""
    env, ends = PointMass(16), []
    algorithm = build(TRPO, env, fisher=fisher, backtracking=line_search, max_kl=0.3, damping=1e-3)
    batch = first_batch(algorithm, env)
    twin = copy.deepcopy(algorithm)
    for name in ("max_kl", "damping", "cg_tol", "backtrack_coef"):
        setattr(twin, name, torch.tensor(getattr(algorithm, name)))
    for each in (algorithm, twin):
        each.update_policy(batch)
        ends.append(flat(each))
    assert torch.allclose(ends[0], ends[1], atol=1e-6)
