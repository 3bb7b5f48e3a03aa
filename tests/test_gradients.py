"""The first gradient of every method against the exact one, with nothing sampled.

Where chances are fractions, all that can happen is listed, each course of events as often as it is likely.  The mean
over such a rollout is an expectation, so what is compared agrees to rounding and needs no error bars.  Gaussian noise
is listed too: four zeros and +-sqrt 3 have the moments of a standard normal up to the fifth, and no gradient on a
linear quadratic regulator asks for more than the fourth.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, PPOPenalty, Reinforce
from pgsuite.algorithms.estimators import GAE, MonteCarlo, NStep, TDLambda, VTrace
from pgsuite.functional import trust_region as tr
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.rollout.overlap import as_seen_by
from pgsuite.types import Batch, Rollout, map_obs

Case = tuple[type[Algorithm], dict[str, Any]]

REINFORCE: list[Case] = [(Reinforce, {"baseline": "none"}), (Reinforce, {"baseline": "critic"})]
WHOLE: Case = (Reinforce, {"baseline": "none", "returns": "total"})  # the same mean, if undiscounted
CRITICS: list[Case] = [
    *((A2C, {"estimator": estimator}) for estimator in (GAE(lam=0.0), GAE(), GAE(lam=1.0), TDLambda(), MonteCarlo())),
    *((A2C, {"estimator": estimator}) for estimator in (NStep(n_steps=1), NStep(n_steps=2), VTrace(), VTrace(lam=0.7))),
    (A2C, {"huber_delta": 0.1}),
    (PPO, {}),
    (PPO, {"clip": 1e-3, "clip_high": 0.5}),
    (PPO, {"dual_clip": 3.0}),
    (PPO, {"value_clip": 0.1}),
    (PPOPenalty, {}),
    (NPG, {}),
    (TRPO, {}),
]


def named(case: Any) -> str:
    """A name for pytest to print."""
    if isinstance(case, type):
        return case.__name__
    estimator = case.get("estimator")
    shown = [] if estimator is None else [f"{type(estimator).__name__}{list(vars(estimator).values())}"]
    return "-".join([*shown, *(f"{k}={v}" for k, v in case.items() if k != "estimator")])


def exact_algorithm(case: Case, space: spaces.Space[Any], actions: spaces.Space[Any], gamma: float) -> Any:
    """Linear actor and critic in double precision, one step per rollout; NPG's damping is so large that its step is
    the gradient's direction to one part in a million."""
    cls, options = case
    norm = Standardize(space, enabled=False)
    policy = Policy(norm, actions, hidden=()).double()
    critic = Critic(norm, hidden=()).double()
    once: dict[str, Any] = {"epochs": 1, "minibatches": 1} if issubclass(cls, PPO) else {}
    if issubclass(cls, NPG):
        once = {"damping": 1e6, "max_kl": 1.0, "critic_minibatches": 1}
    elif issubclass(cls, Reinforce):
        once = {"critic_minibatches": 1}
    else:
        once |= {"max_grad_norm": None, "normalize_advantage": "none"}
    if issubclass(cls, NPG):
        once |= {"normalize_advantage": "none"}
    return cls(policy=policy, critic=critic, gamma=gamma, **once, **options)  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def put(module: torch.nn.Module, *values: Tensor | float) -> None:
    for p, value in zip(module.parameters(), values, strict=True):
        p.copy_(torch.as_tensor(value).expand_as(p))


def first_gradient(algorithm: Any, rollout: Rollout) -> Tensor:
    """[P], what the method ascends on its first step."""
    with torch.no_grad():
        batch: Batch = algorithm._compute_advantages(rollout)
    params = list(algorithm.policy.parameters())
    if isinstance(algorithm, NPG):
        before = tr.flatten(params).detach().clone()
        norm = algorithm.update_policy(batch)["grad_norm"]
        step = tr.flatten(params).detach() - before
        return norm * step / step.norm()
    clip, taken = algorithm.optimizer.clip, []
    algorithm.optimizer.clip = lambda gradient: taken.append(gradient) or clip(gradient)
    algorithm.update(batch)
    return -taken[-1][: sum(p.numel() for p in params)]


def per_episode(algorithm: Any, rollout: Rollout) -> float:
    """REINFORCE ascends a mean over episodes of sums over steps; the others, a mean over steps."""
    return 1.0 if isinstance(algorithm, Reinforce) else float(rollout.mask.sum()) / rollout.mask.shape[1]


def rollout_of(algorithm: Any, rows: list[dict[str, Any]], mask: Tensor) -> Rollout:
    """[T, N] from rows [N, ...], with what else a rollout holds."""
    joined: dict[str, Any] = {}
    for key, first in rows[0].items():
        joined[key] = (
            {part: torch.stack([row[key][part] for row in rows]) for part in first}
            if isinstance(first, dict)
            else torch.stack([row[key] for row in rows])
        )
    blank = map_obs(lambda x: x.expand(len(rows), *x.shape), algorithm.policy.initial_state(mask.shape[1]))
    whole = Rollout(hidden_state=blank, logp=joined["reward"], mask=mask, **joined)
    with torch.no_grad():
        logp = algorithm.policy.dist(whole).log_prob(whole.action)
    return Rollout(**(vars(whole) | {"logp": logp}))


# Finite worlds

STATES, CLOCK = 3, 3  # the third state is the end


class World:
    """Two states to act in, whose every action leads to one of two successors with equal chances, paid by all three.

    A policy sees state and clock, so that both it and the critic are tables.  Its chances are quarters and halves.
    """

    def __init__(self, kind: str, clock: int = CLOCK) -> None:
        self.kind, self.clock = kind, clock
        g = torch.Generator().manual_seed(3)
        self.cells = (clock + 1) * STATES
        choices = 2 if kind == "categorical" else 4
        self.successor = torch.randint(3, (2, choices, 2), generator=g)
        self.successor[0, 0], self.successor[1, 0] = torch.tensor([1, 2]), torch.tensor([0, 2])  # some episodes end
        self.reward = 4 * torch.randn(2, choices, 3, generator=g, dtype=torch.float64)
        self.tail = torch.randn(STATES, generator=g, dtype=torch.float64)  # what the clock cuts off
        favoured = torch.randint(2, (self.cells,), generator=g)
        quarters = torch.tensor([[0.25, 0.75], [0.75, 0.25]], dtype=torch.float64)[favoured]  # [cells, 2]
        if kind == "categorical":
            self.theta, self.actions = quarters.log().T, spaces.Discrete(2)
        elif kind == "multicategorical":
            halves = torch.full_like(quarters, 0.5)
            self.theta, self.actions = torch.cat([quarters.log(), halves.log()], -1).T, spaces.MultiDiscrete([2, 2])
        else:
            odds = torch.stack([(quarters[:, 1] / quarters[:, 0]).log(), torch.zeros(self.cells)], -1)
            self.theta, self.actions = odds.T, spaces.MultiBinary(2)
        self.theta = self.theta.contiguous()

    def chances(self, theta: Tensor) -> Tensor:
        """[cells, choices] of a table of parameters [inputs, cells], by definition."""
        if self.kind == "categorical":
            return theta.softmax(0).T
        if self.kind == "multicategorical":
            one, two = theta[:2].softmax(0), theta[2:].softmax(0)
        else:
            ones = theta.sigmoid()
            one, two = (torch.stack([1 - p, p]) for p in ones)
        return torch.stack([one[i] * two[j] for i, j in itertools.product(range(2), range(2))], -1)

    def cell(self, state: Tensor, clock: Tensor | int) -> Tensor:
        return clock * STATES + state

    def see(self, state: Tensor, clock: Tensor | int) -> Tensor:
        return torch.eye(self.cells, dtype=torch.float64)[self.cell(state, clock)]

    def native(self, choice: Tensor) -> Tensor:
        return choice if self.kind == "categorical" else torch.stack([choice // 2, choice % 2], -1)

    def backup(self, following: Tensor, gamma: float) -> Tensor:
        """Values [2, choices] of every action at a time, from those of the states [3] after it."""
        paid = self.reward + gamma * following
        return torch.stack(
            [paid[s, a, self.successor[s, a]].mean() for s, a in itertools.product(range(2), range(paid.shape[1]))]
        ).view(2, -1)

    def values(self, theta: Tensor, gamma: float, truncated: bool) -> tuple[Tensor, Tensor]:
        """Of states [clock + 1, 3] and of actions [clock, 2, choices], backwards from the last."""
        end = torch.zeros(1, dtype=torch.float64)
        last = torch.cat([self.tail[:2], end]) if truncated else torch.zeros(STATES, dtype=torch.float64)
        v, q = [last], []
        pi = self.chances(theta)
        for t in reversed(range(self.clock)):
            q.append(self.backup(v[-1], gamma))
            here = (pi[t * STATES : t * STATES + 2] * q[-1]).sum(-1)
            v.append(torch.cat([here, end]))
        return torch.stack(v[::-1]), torch.stack(q[::-1])

    def all(self, algorithm: Any, steps: int, truncated: bool, whole: bool) -> Rollout:
        """Every course of events from either state, equally often; ``whole`` masks what follows the first episode."""
        pi = self.chances(self.theta)
        counts = (pi * 8).round().long()
        assert torch.allclose(counts.double() / 8, pi)
        eighths = torch.stack([torch.arange(pi.shape[1]).repeat_interleave(n) for n in counts])  # [cells, 8]
        n = 2 * 16**steps
        index = torch.arange(n)
        state, index = index % 2, index // 2
        start, clock, live = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.long), torch.ones(n)
        rows, masks = [], []
        for _ in range(steps):
            digit, index = index % 16, index // 16
            choice = eighths[self.cell(state, clock), digit // 2]
            there = self.successor[state, choice, digit % 2]
            ended, late = there == 2, clock + 1 == self.clock
            done = ended | late
            masks.append(live.bool())
            rows.append(
                {
                    "obs": self.see(state, clock),
                    "start": start,
                    "action": self.native(choice),
                    "reward": self.reward[state, choice, there],
                    "next_obs": self.see(there, clock + 1),
                    "terminated": done & ~(late & ~ended & truncated),
                    "truncated": late & ~ended & truncated,
                }
            )
            live = live * ~done if whole else live
            state, clock, start = torch.where(done, 0, there), torch.where(done, 0, clock + 1), done
        return rollout_of(algorithm, rows, torch.stack(masks))


def in_world(world: World, case: Case, gamma: float, truncated: bool) -> Any:
    space = spaces.Box(0, 1, (world.cells,))
    algorithm = exact_algorithm(case, space, world.actions, gamma)
    put(algorithm.policy, world.theta, 0.0)
    if algorithm.critic is not None:
        values, _ = world.values(world.theta, gamma, truncated)
        put(algorithm.critic, values.view(1, -1), 0.0)
    return algorithm


WORLDS = [("categorical", 3), ("multicategorical", 2), ("bernoulli", 2)]


def check(algorithm: Any, found: Tensor, exact: Tensor) -> None:
    assert float(exact.norm()) > 0.1
    tolerance = 1e-5 if isinstance(algorithm, NPG) else 1e-6
    assert torch.allclose(found, exact, rtol=0, atol=tolerance * float(exact.norm()))


@pytest.mark.parametrize("world", WORLDS[:1], ids=lambda w: w[0])
@pytest.mark.parametrize(("cls", "options"), [*REINFORCE, WHOLE, *CRITICS], ids=named)
@pytest.mark.parametrize("truncated", [False, True], ids=["terminated", "truncated"])
def test_every_method_ascends_the_expected_return(
    cls: type[Algorithm], options: dict[str, Any], world: tuple[str, int], truncated: bool
) -> None:
    """Undiscounted whole episodes, against the derivative of their expected return by dynamic programming.  What a
    clock cut off is worth what the critic says; REINFORCE has none to ask, so it is paid nothing there."""
    place = World(*world)
    algorithm = in_world(place, (cls, options), 1.0, truncated)
    rollout = place.all(algorithm, world[1], truncated, whole=True)
    theta = place.theta.clone().requires_grad_()
    values, _ = place.values(theta, 1.0, truncated and cls is not Reinforce)
    exact = torch.autograd.grad(values[0, :2].mean(), theta)[0]
    found = first_gradient(algorithm, rollout) * per_episode(algorithm, rollout)
    check(algorithm, found[: exact.numel()], exact.flatten())


@pytest.mark.parametrize("world", WORLDS[1:], ids=lambda w: w[0])
@pytest.mark.parametrize("cls", [Reinforce, A2C, PPO, PPOPenalty, NPG, TRPO])
def test_so_it_does_over_several_choices_at_once(cls: type[Algorithm], world: tuple[str, int]) -> None:
    options: dict[str, Any] = {"baseline": "none"} if cls is Reinforce else {}
    test_every_method_ascends_the_expected_return(cls, options, world, truncated=False)


def weighed_as_visited(place: World, theta: Tensor, gamma: float, truncated: bool, steps: int) -> Tensor:
    """The mean, over the states of each step as often as the world's own policy comes to them, of the derivative of
    pi(a | s) times Q(s, a), both of the policy theta."""
    theta = theta.clone().requires_grad_()
    _, q = place.values(theta.detach(), gamma, truncated)
    pi, acting = place.chances(theta), place.chances(place.theta)
    here, objective = torch.zeros(2, 2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)  # [clock, state]
    here[0] = 0.5
    for _ in range(steps):
        following = torch.zeros_like(here)
        for t, s, a in itertools.product(range(2), range(2), range(2)):
            objective = objective + here[t, s] * pi[t * STATES + s, a] * q[t, s, a] / steps
            for there in place.successor[s, a].tolist():
                chance = 0.5 * here[t, s] * acting[t * STATES + s, a]
                stays = there != 2 and t == 0
                following[(1, there) if stays else (0, 0)] += chance
        here = following
    return torch.autograd.grad(objective, theta)[0].flatten()


@pytest.mark.parametrize(("cls", "options"), CRITICS, ids=named)
@pytest.mark.parametrize("truncated", [False, True], ids=["terminated", "truncated"])
def test_discounted_steps_are_weighed_as_they_are_visited(
    cls: type[Algorithm], options: dict[str, Any], truncated: bool
) -> None:
    """With gamma below one, on rollouts that run on into the next episode."""
    place, gamma, steps = World("categorical", clock=2), 0.8, 3
    algorithm = in_world(place, (cls, options), gamma, truncated)
    rollout = place.all(algorithm, steps, truncated, whole=False)
    exact = weighed_as_visited(place, place.theta, gamma, truncated, steps)
    check(algorithm, first_gradient(algorithm, rollout)[: exact.numel()], exact)


STALE: list[Case] = [
    *((A2C, {"estimator": estimator}) for estimator in (GAE(lam=0.0), GAE(), GAE(lam=1.0), TDLambda())),
    *(
        (A2C, {"estimator": estimator})
        for estimator in (VTrace(rho_clip=9.0), VTrace(lam=0.7, rho_clip=9.0, c_clip=9.0))
    ),
    (PPO, {}),
    (PPO, {"clip": 1e-3, "dual_clip": 3.0}),
    (PPOPenalty, {}),
    (NPG, {}),
    (TRPO, {}),
]


@pytest.mark.parametrize(("cls", "options"), STALE, ids=named)
@pytest.mark.parametrize("truncated", [False, True], ids=["terminated", "truncated"])
def test_where_another_policy_acted_the_gradient_is_of_the_one_that_learns(
    cls: type[Algorithm], options: dict[str, Any], truncated: bool
) -> None:
    """Over the states that the other one came to; the critic's targets mean what it says already, which is right."""
    place, gamma, steps = World("categorical", clock=2), 0.8, 3
    algorithm = in_world(place, (cls, options), gamma, truncated)
    rollout = place.all(algorithm, steps, truncated, whole=False)
    theta = place.theta + 0.5 * torch.randn(place.theta.shape, generator=torch.Generator().manual_seed(1)).double()
    put(algorithm.policy, theta, 0.0)
    put(algorithm.critic, place.values(theta, gamma, truncated)[0].view(1, -1), 0.0)
    rollout = as_seen_by(algorithm.policy, rollout)
    exact = weighed_as_visited(place, theta, gamma, truncated, steps)
    of_the_other = weighed_as_visited(place, place.theta, gamma, truncated, steps)
    assert float((exact - of_the_other).norm()) > 0.1 * float(exact.norm())
    batch = algorithm.compute_advantages(rollout)
    surprise = torch.einsum("tn,tnc->c", batch.target - batch.value, batch.obs) / batch.mask.sum()
    assert float(surprise.abs().max()) < 1e-9
    check(algorithm, first_gradient(algorithm, rollout)[: exact.numel()], exact)


@pytest.mark.parametrize(("cls", "options"), REINFORCE, ids=named)
def test_discounted_reinforce_pays_each_step_what_follows_it(cls: type[Algorithm], options: dict[str, Any]) -> None:
    """sum over t of grad log pi(a_t) times the discounted return from t on, with no further discount of step t."""
    place, gamma = World("categorical"), 0.6
    algorithm = in_world(place, (cls, options), gamma, truncated=False)
    rollout = place.all(algorithm, place.clock, truncated=False, whole=True)
    theta = place.theta.clone().requires_grad_()
    _, q = place.values(place.theta, gamma, truncated=False)
    pi = place.chances(theta)
    here, objective = torch.full((2,), 0.5, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t in range(place.clock):
        following = torch.zeros_like(here)
        for s, a in itertools.product(range(2), range(2)):
            objective = objective + here[s] * pi[t * STATES + s, a] * q[t, s, a]
            for there in place.successor[s, a].tolist():
                if there != 2:
                    following[there] += 0.5 * here[s] * pi[t * STATES + s, a].detach()
        here = following
    exact = torch.autograd.grad(objective, theta)[0]
    check(algorithm, first_gradient(algorithm, rollout)[: exact.numel()], exact.flatten())


def test_leaving_one_out_is_unbiased_over_every_pair_of_episodes() -> None:
    """All pairs that two environments can live through, each as often as it is likely: 262,144 of them, so only their
    distinct members are estimated, and weighed."""
    place = World("categorical", clock=2)
    algorithm = in_world(place, (Reinforce, {"baseline": "leave-one-out"}), 1.0, truncated=False)
    rollout = place.all(algorithm, 2, truncated=False, whole=True)
    seen = (rollout.obs.argmax(-1) * 2 + rollout.action).where(rollout.mask, -1).T
    reward = torch.round(rollout.reward.where(rollout.mask, 0.0), decimals=9).T
    both = torch.cat([seen.double(), reward], -1)
    _, kind, count = both.unique(dim=0, return_inverse=True, return_counts=True)
    first = torch.stack([(kind == k).nonzero()[0, 0] for k in range(len(count))])
    one, two = torch.cartesian_prod(torch.arange(len(first)), torch.arange(len(first))).T
    weight = (count[one] * count[two]).double() / count.sum() ** 2
    credit = torch.zeros(2, len(first), dtype=torch.float64)
    for i, j, w in zip(one.tolist(), two.tolist(), weight.tolist(), strict=True):
        advantage = algorithm._compute_advantages(rollout[:, first[[i, j]]]).advantage
        credit[:, i] += w * advantage[:, 0] / 2
        credit[:, j] += w * advantage[:, 1] / 2
    distinct = rollout[:, first]
    gain = (algorithm.policy.dist(distinct).log_prob(distinct.action) * credit).where(distinct.mask, 0.0).sum()
    found = tr.flat_grad(gain, list(algorithm.policy.parameters()))
    theta = place.theta.clone().requires_grad_()
    exact = torch.autograd.grad(place.values(theta, 1.0, truncated=False)[0][0, :2].mean(), theta)[0]
    check(algorithm, found[: exact.numel()], exact.flatten())


# Linear quadratic regulators

NOISE = torch.tensor([0.0, 0.0, 0.0, 0.0, math.sqrt(3), -math.sqrt(3)], dtype=torch.float64)


class Regulator:
    """x' = A x + B u, cost x'Q x + u'R u, three states and two controls; u = W x + b + sigma noise."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.a, self.b = 0.4 * draw(3, 3), draw(3, 2)
        q, r = draw(3, 3), draw(2, 2)
        self.q, self.r = q @ q.T + torch.eye(3), r @ r.T + torch.eye(2)
        self.x, self.bias, self.log_sigma = draw(4, 3), 0.3 * draw(2), 0.3 * draw(2)
        self.astray = 0.2 * draw(2, 3)

    def optimal(self, gamma: float) -> Tensor:
        """K of u = -K x, by iterating Riccati's equation."""
        p, k = self.q, torch.zeros(2, 3, dtype=torch.float64)
        for _ in range(500):
            k = torch.linalg.solve(self.r + gamma * self.b.T @ p @ self.b, gamma * self.b.T @ p @ self.a)
            p = self.q + gamma * self.a.T @ p @ (self.a - self.b @ k)
        return k

    def cost_to_go(self, k: Tensor, gamma: float) -> Tensor:
        """P of K, by Lyapunov's equation."""
        loop = self.a - self.b @ k
        kron = torch.eye(9, dtype=torch.float64) - gamma * torch.kron(loop.T.contiguous(), loop.T.contiguous())
        return torch.linalg.solve(kron, (self.q + k.T @ self.r @ k).flatten()).view(3, 3)

    def space(self) -> spaces.Dict:
        box = spaces.Box(-math.inf, math.inf, (3,))
        return spaces.Dict({"state": box, "critic_obs": spaces.Box(-math.inf, math.inf, (9,))})

    def see(self, x: Tensor) -> dict[str, Tensor]:
        """The critic is given all products of two states, of which the value is a sum."""
        return {"state": x, "critic_obs": (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)}

    def all(self, algorithm: Any, w: Tensor, bias: Tensor, steps: int, ends: bool) -> Rollout:
        pairs = torch.cartesian_prod(NOISE, NOISE)
        n = len(self.x) * len(pairs) ** steps
        index = torch.arange(n)
        x, index = self.x[index % len(self.x)], index // len(self.x)
        rows = []
        for t in range(steps):
            noise, index = pairs[index % len(pairs)], index // len(pairs)
            u = x @ w.T + bias + self.log_sigma.exp() * noise
            cost = ((x @ self.q) * x).sum(-1) + ((u @ self.r) * u).sum(-1)
            after = x @ self.a.T + u @ self.b.T
            last = torch.full((n,), ends and t == steps - 1)
            rows.append(
                {
                    "obs": self.see(x),
                    "start": torch.full((n,), t == 0),
                    "action": u,
                    "reward": -cost,
                    "next_obs": self.see(after),
                    "terminated": last,
                    "truncated": torch.zeros_like(last),
                }
            )
            x = after
        return rollout_of(algorithm, rows, torch.ones(steps, n, dtype=torch.bool))


def in_regulator(world: Regulator, case: Case, gamma: float, w: Tensor, bias: Tensor) -> tuple[Any, list[int]]:
    algorithm = exact_algorithm(case, world.space(), spaces.Box(-math.inf, math.inf, (2,)), gamma)
    values = {(2, 3): w, (2,): bias}
    named_parameters = list(algorithm.policy.named_parameters())
    with torch.no_grad():
        for name, p in named_parameters:
            p.copy_(world.log_sigma if name.endswith("log_sigma") else values[tuple(p.shape)])
    order = [2 if name.endswith("log_sigma") else int(p.ndim == 1) for name, p in named_parameters]
    return algorithm, order


@pytest.mark.parametrize("optimal", [False, True], ids=["astray", "optimal"])
@pytest.mark.parametrize(("cls", "options"), CRITICS, ids=named)
def test_the_gradient_on_a_regulator_is_riccatis(cls: type[Algorithm], options: dict[str, Any], optimal: bool) -> None:
    """With V = -x'P x - c exact and M = R + gamma B'P B, the derivative of J in W = -K is
    2 (M K - gamma B'P A) E[x x'], which Riccati's K brings to zero, in b the same with E[x], and in log
    sigma -2 diag(M) sigma^2."""
    world, gamma = Regulator(), 0.9
    k = world.optimal(gamma) + (0.0 if optimal else 1.0) * world.astray
    p = world.cost_to_go(k, gamma)
    m = world.r + gamma * world.b.T @ p @ world.b
    variance = (2 * world.log_sigma).exp()
    bias = torch.zeros(2, dtype=torch.float64)
    algorithm, order = in_regulator(world, (cls, options), gamma, -k, bias)
    put(algorithm.critic, -p.view(1, -1), -float((m.diagonal() * variance).sum()) / (1 - gamma))
    rollout = world.all(algorithm, -k, bias, 2, ends=False)
    x = rollout.obs["state"].flatten(0, 1)
    error = 2 * (m @ k - gamma * world.b.T @ p @ world.a)
    assert (float(error.norm()) < 1e-9) == optimal
    parts = [error @ (x.T @ x) / len(x), error @ x.mean(0), -2 * m.diagonal() * variance]
    exact = torch.cat([parts[i].flatten() for i in order])
    check(algorithm, first_gradient(algorithm, rollout), exact)


@pytest.mark.parametrize(("cls", "options"), [*REINFORCE, WHOLE, *CRITICS[1:3], *CRITICS[-7:]], ids=named)
def test_every_method_ascends_the_expected_cost_of_a_finite_regulator(
    cls: type[Algorithm], options: dict[str, Any]
) -> None:
    """Two steps, undiscounted, against the derivative of their cost through the moments of states and controls.  The
    critic knows nothing here, so it is asked for no bootstrap: the estimators are Monte Carlo ones."""
    world, steps = Regulator(), 2
    w, bias, log_sigma = (-world.optimal(0.9) + world.astray), world.bias, world.log_sigma
    options = options | ({} if issubclass(cls, Reinforce) else {"estimator": GAE(lam=1.0)})
    algorithm, order = in_regulator(world, (cls, options), 1.0, w, bias)
    rollout = world.all(algorithm, w, bias, steps, ends=True)
    inputs = [x.clone().requires_grad_() for x in (w, bias, log_sigma)]
    w, bias, log_sigma = inputs
    mean, second = world.x.mean(0), world.x.T @ world.x / len(world.x)
    gain = torch.zeros((), dtype=torch.float64)
    for _ in range(steps):
        cross = second @ w.T + mean.outer(bias)  # E[x u']
        control = w @ second @ w.T + (w @ mean).outer(bias) + bias.outer(w @ mean) + bias.outer(bias)
        control = control + (2 * log_sigma).exp().diag()
        gain = gain - (world.q * second).sum() - (world.r * control).sum()
        mixed = world.a @ cross @ world.b.T
        second = world.a @ second @ world.a.T + mixed + mixed.T + world.b @ control @ world.b.T
        mean = world.a @ mean + world.b @ (w @ mean + bias)
    gradients = torch.autograd.grad(gain, inputs)
    exact = torch.cat([gradients[i].flatten() for i in order])
    check(algorithm, first_gradient(algorithm, rollout) * per_episode(algorithm, rollout), exact)
