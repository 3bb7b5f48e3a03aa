"""Arithmetic where it is hard: two precisions, extremes, and the smallest rollouts that there are."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from toys import ALL, BRIEF, PointMass, Probe, Toy, build, collector

from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, PPOPenalty, Reinforce
from pgsuite.algorithms.estimators import GAE, MonteCarlo, NStep, TDLambda, VTrace
from pgsuite.functional import trust_region as tr
from pgsuite.nn.distributions import Bernoulli, Beta, Categorical, Gaussian, MultiCategorical, Squashed
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.testing.reads import NothingRead
from pgsuite.types import Rollout


def has(cls: type[Algorithm], name: str) -> bool:
    return name in {f.name for f in fields(cls)}


def flat(*modules: Any) -> Tensor:
    return tr.flatten([p for module in modules if module is not None for p in module.parameters()]).detach().clone()


# Precision


class Once:
    """A collector of what was collected before."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def collect(self, policy: Policy) -> Rollout:
        return self.rollout


@pytest.mark.parametrize("cls", ALL)
def test_single_precision_does_what_double_does(cls: type[Algorithm]) -> None:
    """A whole iteration on the same rollout: the change of the parameters agrees to one part in a thousand."""
    env = PointMass(16)
    source = build(PPO, env, seed=1)
    steps = env.max_episode_steps if cls.collector.whole_episodes else 20
    rollout = source.collector(env, steps, 1).collect(source.policy)
    moved = []
    for dtype in (torch.float32, torch.float64):
        norm = Standardize(env.observation_space, enabled=False)
        generator = torch.Generator().manual_seed(0)
        policy = Policy(norm, env.action_space, hidden=(16,), generator=generator).to(dtype)
        critic = Critic(norm, hidden=(16,), generator=generator).to(dtype)
        once: dict[str, Any] = {"epochs": 1, "minibatches": 1} if has(cls, "minibatches") else {}
        once |= {"critic_minibatches": 1, "critic_epochs": 1} if has(cls, "critic_minibatches") else {}
        once |= {"optim": "rmsprop"} if has(cls, "optim") else {}  # Adam's first step is the gradient's mere sign
        algorithm: Any = cls(policy=policy, critic=critic, **once)  # pyright: ignore[reportCallIssue]
        seen = rollout.map(lambda x, dtype=dtype: x.to(dtype) if x.is_floating_point() else x)
        with torch.no_grad():
            logp = policy.dist(seen).log_prob(seen.action)
        before = flat(policy)
        metrics = algorithm.iterate(Once(Rollout(**(vars(seen) | {"logp": logp}))))
        moved.append(((flat(policy) - before).double(), metrics))
    (single, low), (double, high) = moved
    assert double.norm() > 1e-4 and (single - double).norm() < 1e-3 * double.norm()
    for name, value in high.items():
        assert float(low[name]) == pytest.approx(float(value), rel=1e-2, abs=1e-4), name


# Densities


def line(low: float, high: float, count: int = 200_001) -> tuple[Tensor, float]:
    """Middles [count, 1] of equal parts, and their width."""
    step = (high - low) / count
    return (low + step * (torch.arange(count, dtype=torch.float64) + 0.5)).unsqueeze(-1), step


def one(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


LOW, HIGH = one(-2.0), one(1.0)
DENSITIES: list[tuple[Any, float, float]] = [
    (Gaussian(one(0.3), one(-0.7)), -9, 9),
    (Gaussian(one(-4.0), one(1.0)), -40, 40),
    (Squashed(Gaussian(one(0.3), one(-0.7)), LOW, HIGH), -2, 1),
    (Squashed(Gaussian(one(-1.0), one(0.0)), LOW, HIGH), -2, 1),
    (Beta(one(1.0), one(1.0), LOW, HIGH), -2, 1),
    (Beta(one(1.7), one(5.0), LOW, HIGH), -2, 1),
]


@pytest.mark.parametrize(("dist", "low", "high"), DENSITIES, ids=lambda x: type(x).__name__)
def test_densities_integrate_to_one_and_entropies_are_their_integrals(dist: Any, low: float, high: float) -> None:
    """To 1e-4, as by the docstring of the squashed entropy; the mean of the score is zero, too."""
    x, step = line(low, high)
    logp = dist.log_prob(x)
    density = logp.exp() * step
    assert float(density.sum()) == pytest.approx(1, abs=1e-4)
    assert -float((density * logp).sum()) == pytest.approx(float(dist.entropy()), abs=1e-4)


def test_chances_add_to_one_and_entropies_are_their_sums() -> None:
    g = torch.Generator().manual_seed(0)
    draws = [3 * torch.randn(n, generator=g, dtype=torch.float64) for n in (3, 2, 4)]
    choices = torch.cartesian_prod(*(torch.arange(n) for n in (3, 2, 4)))
    bits = torch.cartesian_prod(*[torch.arange(2)] * 4)
    cases: list[tuple[Callable[[int], Any], Tensor]] = [
        (lambda n: Categorical(draws[2].log_softmax(-1).expand(n, 4)), torch.arange(4)),
        (lambda n: MultiCategorical(tuple(x.log_softmax(-1).expand(n, len(x)) for x in draws)), choices),
        (lambda n: Bernoulli(draws[2].expand(n, 4)), bits),
    ]
    for make, actions in cases:
        dist = make(len(actions))
        logp = dist.log_prob(actions)
        assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-12)
        assert -float((logp.exp() * logp).sum()) == pytest.approx(float(dist.entropy()[0]), abs=1e-12)


@pytest.mark.parametrize(("dist", "low", "high"), DENSITIES, ids=lambda x: type(x).__name__)
def test_samples_are_spread_as_the_density_says(dist: Any, low: float, high: float) -> None:
    """Kolmogorov's distance of 100,000 seeded samples to the integrated density, below 2.2 over their root: exceeded
    by chance once in 10,000."""
    count = 100_000
    many = type(dist)(**{k: v if k in ("low", "high", "quadrature") else wide(v, count) for k, v in vars(dist).items()})
    sample = many.sample(torch.Generator().manual_seed(0)).squeeze(-1).sort().values
    x, step = line(low, high)
    below = torch.searchsorted(sample.contiguous(), x.squeeze(-1) + step / 2).double() / count
    assert float((below - (dist.log_prob(x).exp() * step).cumsum(0)).abs().max()) < 2.2 / math.sqrt(count)


def wide(x: Any, count: int) -> Any:
    if isinstance(x, Tensor):
        return x.expand(count, 1)
    return Gaussian(wide(x.mean, count), x.log_sigma)


# Extremes


class Constant(PointMass):
    """Reward one whatever happens."""

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        obs, reward, terminated = super().move(action)
        return obs, torch.ones_like(reward), terminated


class Huge(PointMass):
    """Rewards of a million million."""

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        obs, reward, terminated = super().move(action)
        return obs, 1e12 * reward, terminated


class Choices(PointMass):
    """Forces of -1 or 1, chosen one by one, or both at once."""

    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        force = 2.0 * action - 1
        return super().move(torch.stack([force, -force], -1) if force.ndim == 1 else force)


class Bits(Choices):
    action_space: spaces.Space[Any] = spaces.MultiBinary(2)


class Pairs(Choices):
    action_space: spaces.Space[Any] = spaces.MultiDiscrete([2, 2])


def sound(algorithm: Any, metrics: dict[str, Tensor]) -> None:
    assert flat(algorithm.policy, algorithm.critic).isfinite().all()
    for name, value in metrics.items():
        assert value.isfinite(), name


def smallest(cls: type[Algorithm]) -> dict[str, Any]:
    return dict.fromkeys((name for name in ("minibatches", "critic_minibatches") if has(cls, name)), 1)


@pytest.mark.parametrize("scale", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("world", [Constant, Huge])
@pytest.mark.parametrize("cls", ALL)
def test_rewards_of_no_variance_or_of_any_size_leave_all_finite(cls: Any, world: type[Toy], scale: bool) -> None:
    env = world(4, max_episode_steps=6)
    algorithm = build(cls, env, scale=scale, **smallest(cls))
    rollouts = collector(algorithm, env, 8)
    for _ in range(3):
        sound(algorithm, algorithm.iterate(rollouts))


@pytest.mark.parametrize(("steps", "envs"), [(1, 1), (1, 4), (5, 1)])
@pytest.mark.parametrize("cls", ALL)
def test_one_environment_and_one_step_are_enough(cls: Any, steps: int, envs: int) -> None:
    """Even one cell, of which there is no spread to divide by: the step may be nothing, but it is finite."""
    env = PointMass(envs, max_episode_steps=steps)
    algorithm = build(cls, env, **smallest(cls))
    rollouts = collector(algorithm, env, steps)
    algorithm.validate(rollouts)
    for _ in range(3):
        sound(algorithm, algorithm.iterate(rollouts))


@pytest.mark.parametrize("cls", [PPO, PPOPenalty, NPG, TRPO])
def test_one_cell_is_not_four_minibatches_and_says_so(cls: Any) -> None:
    env = PointMass(1)
    algorithm = build(cls, env)
    with pytest.raises(ValueError, match=r"4 minibatches do not divide a batch of 1 \(1 x 1 steps\)"):
        algorithm.validate(collector(algorithm, env, 1))


LOOKS: list[tuple[type[PointMass], dict[str, Any]]] = [
    (PointMass, {}),
    (PointMass, {"sigma": "state"}),
    (PointMass, {"distribution": "squashed"}),
    (PointMass, {"distribution": "beta"}),
    (Choices, {}),
    (Pairs, {}),
    (Bits, {}),
]
LOOK_IDS = ["gaussian", "sigma of state", "squashed", "beta", "categorical", "multicategorical", "bernoulli"]


@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize(("world", "look"), LOOKS, ids=LOOK_IDS)
@pytest.mark.parametrize("cls", ALL)
def test_a_policy_that_is_sure_of_itself_learns_on_without_a_nan(
    cls: Any, world: type[PointMass], look: dict[str, Any], size: float
) -> None:
    """Every number that makes the distribution is in the hundreds, or in the ten thousands: logits that leave one
    action all the chance, means far outside of the bounds, where rounding alone is worth more than an exponential can
    hold, and sigmas at the ends of their range."""
    env = world(4, max_episode_steps=6)
    algorithm = build(cls, env, look=look, **smallest(cls))
    with torch.no_grad():
        for name, p in algorithm.policy.named_parameters():
            if not name.endswith("log_sigma") and p.ndim == 1:
                p.copy_(size * torch.linspace(-1, 1, len(p)))
    rollouts = collector(algorithm, env, 8)
    for _ in range(2):
        sound(algorithm, algorithm.iterate(rollouts))


# Nothing is read back


READS: list[Callable[[Tensor], Any]] = [
    lambda x: x[0].item(),
    lambda x: float(x[0]),
    lambda x: bool(x[0] > 0),
    lambda x: 1 if x[0] > 0 else 2,
    lambda x: x.tolist(),
    lambda x: x.numpy(),
    lambda x: np.asarray(x),
    lambda x: x.cpu(),
    lambda x: [1, 2, 3][x[0].long()],
    lambda x: x[x > 0],
    lambda x: x.nonzero(),
    lambda x: x.masked_select(x > 0),
    lambda x: x.unique(),
    lambda x: torch.equal(x, x + 1),
    lambda x: torch.where(x > 0),
    lambda x: torch.arange(int(x[0])),
    lambda x: x.clone().index_put_((x > 0,), torch.ones(())),
]


@pytest.mark.parametrize("read", range(len(READS)))
def test_the_guard_catches_every_kind_of_read(read: int) -> None:
    x = torch.tensor([1.0, 2.0])
    with pytest.raises(AssertionError), NothingRead():
        READS[read](x)


class Taxi(Probe):
    """A dictionary of observations, one part for the critic alone, and a mask of what may be done."""

    action_space: spaces.Space[Any] = spaces.Discrete(3)

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs, lambda obs, action: obs * action)
        box = spaces.Box(-math.inf, math.inf, (1,))
        parts = {"vector": box, "critic_obs": box, "action_mask": spaces.MultiBinary(3)}
        self.observation_space = spaces.Dict(parts)

    def dress(self, x: Tensor) -> dict[str, Tensor]:
        mask = torch.cat([torch.ones_like(x), x > 0, x <= 0], -1).bool()
        return {"vector": x, "critic_obs": 2 * x, "action_mask": mask}

    def reset(self) -> Any:
        return self.dress(super().reset())

    def step(self, action: Tensor) -> Any:
        step = super().step(action)
        return step._replace(obs=self.dress(step.obs), next_obs=self.dress(step.next_obs))


SWITCHES: list[tuple[type[Algorithm], dict[str, Any]]] = [
    *((A2C, {"estimator": e}) for e in (GAE(), NStep(), TDLambda(), MonteCarlo(), VTrace(lam=0.9, c_clip=0.8))),
    *((A2C, {"normalize_advantage": "none", "optim": optim, "max_grad_norm": None}) for optim in ("adam", "rmsprop")),
    (A2C, {"huber_delta": 0.5, "entropy_coef": 0.01}),
    *((PPO, {"normalize_advantage": where}) for where in ("none", "batch", "minibatch")),
    (PPO, {"value_clip": 0.2, "huber_delta": 0.5, "clip_high": 0.3, "dual_clip": 3.0, "estimator": VTrace()}),
    (PPO, {"recompute_advantage": True}),
    (PPOPenalty, {"value_clip": 0.2}),
    (NPG, {"estimator": VTrace()}),
    *((Reinforce, {"baseline": b, "normalize_advantage": "batch"}) for b in ("none", "leave-one-out", "critic")),
]


def reads_nothing(algorithm: Any, env: Any) -> None:
    rollouts = collector(algorithm, env, 8)
    if cls_polls := getattr(rollouts, "poll", None):
        rollouts.poll = max(cls_polls, rollouts.horizon)  # pyright: ignore[reportAttributeAccessIssue]
    algorithm.iterate(rollouts)
    with NothingRead():
        algorithm.update_schedules(0.5)
        algorithm.iterate(rollouts)


@pytest.mark.parametrize("scale", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize(("cls", "options"), SWITCHES, ids=lambda x: getattr(x, "__name__", None))
def test_no_switch_reads_anything_back(cls: type[Algorithm], options: dict[str, Any], scale: bool) -> None:
    env = PointMass(8, max_episode_steps=10)
    reads_nothing(build(cls, env, scale=scale, **BRIEF[cls] | options), env)


@pytest.mark.parametrize(("world", "look"), LOOKS, ids=LOOK_IDS)
@pytest.mark.parametrize("cls", [Reinforce, A2C, PPO, PPOPenalty, NPG])
def test_no_distribution_reads_anything_back(cls: Any, world: type[PointMass], look: dict[str, Any]) -> None:
    env = world(8, max_episode_steps=10)
    reads_nothing(build(cls, env, look=look, **BRIEF[cls]), env)


@pytest.mark.parametrize("cls", [Reinforce, A2C, PPO, PPOPenalty, NPG])
def test_dictionaries_and_masks_are_not_read_either(cls: Any) -> None:
    env = Taxi(8)
    reads_nothing(build(cls, env, **smallest(cls)), env)
