"""How actions are drawn: every kind of head, and actions that are not allowed."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from toys import ALL, PointMass, build, collector, mostly_long

from pgsuite.algorithms import PPO, TRPO
from pgsuite.envs import Gym, make
from pgsuite.nn.distributions import Categorical, Gaussian
from pgsuite.nn.heads import GaussianHead, Head, make_head
from pgsuite.rollout import EpisodeTracker, StepCollector
from pgsuite.testing import check_vector_env

BOX, OPEN = spaces.Box(-1.0, 1.0, (2,)), spaces.Box(-np.inf, np.inf, (2,))


class Shifted(GaussianHead):
    """Somebody else's head."""

    def forward(self, numbers: torch.Tensor, allowed: torch.Tensor | None = None) -> Gaussian:
        return self.gaussian(numbers + 5)


def test_a_head_from_elsewhere_needs_no_edit_here() -> None:
    head = make_head(BOX, "test_heads.Shifted", log_sigma=-3.0)
    dist: Any = head(torch.zeros(1, 2))
    assert dist.mean.tolist() == [[5.0, 5.0]] and dist.log_sigma.tolist() == [-3.0, -3.0]


@pytest.mark.parametrize(
    ("space", "distribution", "options", "message"),
    [
        (OPEN, "squashed", {}, r"policy.distribution=squashed is for a bounded Box, and actions are Box\(-inf"),
        (OPEN, "beta", {}, "policy.distribution=beta is for a bounded Box"),
        (
            spaces.Discrete(2),
            "gaussian",
            {},
            "distribution=gaussian is for a Box of floats, and actions are Disc",
        ),
        (BOX, "categorical", {}, "policy.distribution=categorical is for Discrete, and actions are Box"),
        (BOX, "gausian", {}, "no policy.distribution 'gausian'; did you mean gaussian"),
        (BOX, "no_such.Head", {}, "policy.distribution=no_such.Head cannot be imported: No module named 'no_such'"),
        (BOX, "..", {}, "policy.distribution=.. cannot be imported: '.' is no full name of a module"),
        (BOX, "test_heads.BOX", {}, "is no subclass of pgsuite.nn.heads.Head"),
        (
            spaces.Discrete(2),
            "auto",
            {"log_sigma": 0.0},
            "policy.log_sigma is for Gaussian policies, .* categorical",
        ),
        (BOX, "beta", {"sigma": "state"}, "policy.sigma is for Gaussian policies, and this one is beta"),
        (
            BOX,
            "squashed",
            {"normalize_actions": False, "log_sigma": 0.0},
            "policy.normalize_actions is for Gaussian policies, and this one is squashed",
        ),
    ],
)
def test_what_does_not_fit_is_said(space: Any, distribution: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_head(space, distribution, **options)


def test_a_sigma_that_depends_on_the_state_begins_as_a_free_one_and_moves_with_the_numbers() -> None:
    free, state = (make_head(BOX, log_sigma=-1.0, sigma=sigma) for sigma in ("free", "state"))
    assert (free.inputs, state.inputs) == (2, 4)
    dist: Any = state(torch.tensor([[0.3, 0.4, 0.0, 2.0]]))
    assert torch.allclose(dist.log_sigma, torch.tensor([[-1.0, 1.0]]))
    assert torch.allclose(dist.mean, torch.tensor([[0.3, 0.4]]))


@pytest.mark.parametrize("cls", mostly_long([PPO, TRPO], PPO))
@pytest.mark.parametrize(
    "look", [{"sigma": "state"}, {"distribution": "squashed"}, {"distribution": "beta"}], ids=lambda x: str(*x.values())
)
def test_bounded_and_state_dependent_policies_learn(cls: Any, look: dict[str, Any]) -> None:
    """To stay at the origin: standing still is paid 17 on average, a policy before learning less than that, the best
    some 45."""
    env = PointMass(32)
    options: dict[str, Any] = {"lr": 1e-2, "epochs": 4} if cls is PPO else {"critic_epochs": 4}
    algorithm = build(cls, env, look=look, **options)
    rollouts, tracker, returns = StepCollector(env, 50), EpisodeTracker(32, env.device), []
    for _ in range(15):
        algorithm.iterate(rollouts)
        rollout = rollouts.buffer.read()
        returns.append(tracker.finished_episodes(rollout)[0].mean().item())
        assert look.get("distribution") is None or float(rollout.action.abs().max()) <= 1
    assert returns[-1] > 25 > returns[0]


MASK = torch.tensor([[True, False, True, False, True], [False, False, True, True, True]])


@pytest.mark.parametrize(
    "space", [spaces.Discrete(5), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(5)], ids=lambda x: type(x).__name__
)
def test_what_is_not_allowed_is_never_done(space: Any) -> None:
    """Nor is its logit moved; where nothing of a choice is allowed, nothing is ruled out."""
    logits = torch.randn(4_000, 2, 5, requires_grad=True)
    allowed = MASK.expand(4_000, 2, 5)
    dist: Any = make_head(space)(logits, allowed)
    action = dist.sample(torch.Generator().manual_seed(0))
    if isinstance(space, spaces.Discrete):
        taken = torch.nn.functional.one_hot(action, 5).bool()
    elif isinstance(space, spaces.MultiBinary):
        taken = action.bool()
    else:
        taken = torch.cat([torch.nn.functional.one_hot(action[..., i], n) for i, n in enumerate((2, 3))], -1).bool()
        allowed = allowed | ~torch.stack([allowed[..., :2].any(-1), allowed[..., 2:].any(-1)], -1)[..., [0, 0, 1, 1, 1]]
    assert not (taken & ~allowed).any() and (taken.flatten(0, -2).any(0)).sum() >= 4
    found = (dist.log_prob(action), dist.entropy(), dist.kl(dist.detach()))
    assert all(x.isfinite().all() for x in found)
    (slope,) = torch.autograd.grad(torch.stack(found).sum(), logits)
    assert slope.isfinite().all() and not slope[~MASK.expand_as(slope)].any()


def test_a_masked_categorical_is_the_categorical_of_what_is_allowed() -> None:
    logits = torch.randn(7, 5)
    masked: Any = make_head(spaces.Discrete(5))(logits, MASK[0].expand(7, 5))
    smaller = Categorical(logits[:, MASK[0]].log_softmax(-1))
    assert torch.allclose(masked.logits[:, MASK[0]], smaller.logits, atol=1e-6)
    assert torch.allclose(masked.entropy(), smaller.entropy(), atol=1e-6)


TAXI = Gym(id="Taxi-v4", action_mask=True, max_episode_steps=50)


def test_masks_in_the_info_keep_the_contract() -> None:
    check_vector_env(lambda seed: make(TAXI, 3, seed=seed), steps=120)


@pytest.mark.parametrize("cls", ALL)
def test_no_method_does_what_is_not_allowed(cls: Any) -> None:
    env = make(TAXI, 4)
    algorithm = build(cls, env)
    rollouts = collector(algorithm, env)
    for _ in range(2):
        algorithm.iterate(rollouts)
        rollout = rollouts.buffer.read()
        allowed = rollout.obs["action_mask"].gather(-1, rollout.action.unsqueeze(-1)).squeeze(-1)
        assert allowed[rollout.mask].all() and not rollout.obs["action_mask"].all()
    assert isinstance(algorithm.policy.head, Head)


# Boxes that are not [-1, 1]


class Elsewhere(PointMass):
    """The same task with its forces in another Box."""

    def __init__(self, num_envs: int, low: float, high: float) -> None:
        super().__init__(num_envs)
        self.action_space, self.low, self.high = spaces.Box(low, high, (2,)), low, high

    def move(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return super().move((action - (self.low + self.high) / 2) / ((self.high - self.low) / 2))


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(("low", "high"), mostly_long([(4.0, 12.0), (-0.25, 0.25), (0.0, 256.0)], (4.0, 12.0)))
def test_every_method_learns_the_same_in_any_box(cls: Any, low: float, high: float) -> None:
    found = []
    for env in (PointMass(4), Elsewhere(4, low, high)):
        algorithm = build(cls, env)
        rollouts = collector(algorithm, env)
        metrics = [algorithm.iterate(rollouts) for _ in range(3)][-1]
        found.append((torch.cat([x.flatten() for x in algorithm.policy.parameters()]), metrics))
    assert torch.allclose(found[0][0], found[1][0], atol=2e-4)
    for name in ("sigma", "action_clip_fraction"):
        assert torch.allclose(found[0][1][name], found[1][1][name], atol=1e-3), name


def test_a_gaussian_acts_in_units_of_half_the_width_from_the_middle_of_its_box() -> None:
    low, high = np.array([5.0, -0.4], np.float32), np.array([35.0, 0.4], np.float32)
    head, unit = make_head(spaces.Box(low, high)), make_head(BOX)
    off: Any = make_head(spaces.Box(low, high), normalize_actions=False)
    numbers, noise = torch.randn(50, 2), torch.randn(50, 2)
    dist, plain = head(numbers), unit(numbers)
    assert torch.allclose(
        dist.from_noise(noise), torch.tensor([20.0, 0.0]) + torch.tensor([15.0, 0.4]) * plain.from_noise(noise)
    )
    assert torch.allclose(
        dist.log_prob(dist.from_noise(noise)), plain.log_prob(plain.from_noise(noise)) - np.log(15 * 0.4), atol=1e-4
    )
    assert torch.equal(off(numbers).mean, numbers)
    action = torch.tensor([[20.0, 0.5], [36.0, -0.5], [4.0, 0.0], [9e9, 9e9]])
    share = head.metrics(action, torch.tensor([True, True, True, False]))["action_clip_fraction"]
    assert float(share) == pytest.approx((0.5 + 1 + 0.5) / 3)


@pytest.mark.parametrize(
    ("low", "high", "middle", "half_width"),
    [
        (0.0, np.inf, 1.0, 1.0),
        (-np.inf, 3.0, 2.0, 1.0),
        (-np.inf, np.inf, 0.0, 1.0),
        (2.0, 2.0, 2.0, 1.0),
        (np.finfo(np.float32).min, np.finfo(np.float32).max, 0.0, 1.0),
        (0.0, 255.0, 127.5, 127.5),
    ],
)
def test_boxes_that_are_open_or_of_one_value(low: float, high: float, middle: float, half_width: float) -> None:
    dist: Any = make_head(spaces.Box(low, high, (1,)), log_sigma=0.0)(torch.zeros(1, 1))
    assert float(dist.mean.detach()) == middle and float(dist.log_sigma.detach().exp()) == pytest.approx(half_width)


@pytest.mark.parametrize("distribution", ["squashed", "beta"])
def test_a_dimension_of_one_value_is_refused_by_name_where_a_distribution_needs_a_width(distribution: str) -> None:
    space = spaces.Box(np.array([-1.0, 2.0], np.float32), np.array([1.0, 2.0], np.float32))
    with pytest.raises(ValueError, match=r"dimension 1 of actions .* has the single value 2, .* low < high"):
        make_head(space, distribution)


class Price(PointMass):
    """Name a price: ten steps, each of which pays minus its distance from 21."""

    obs_size, action_space = 1, spaces.Box(5.0, 35.0, (1,))

    def fresh(self) -> torch.Tensor:
        return torch.ones(self.num_envs, 1)

    def move(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.state, -(action.clamp(5, 35) - 21).abs().squeeze(-1), torch.zeros(self.num_envs, dtype=torch.bool)


@pytest.mark.parametrize("cls", [pytest.param(PPO, marks=pytest.mark.long), TRPO])
def test_a_box_away_from_zero_is_explored(cls: Any) -> None:
    """A policy that begins at zero stays at the lower bound, at -160."""
    env = Price(16, max_episode_steps=10)
    algorithm = build(cls, env, lr=1e-2) if cls is PPO else build(cls, env)
    rollouts = collector(algorithm, env, 32)
    for _ in range(40):
        algorithm.iterate(rollouts)
    assert 10 * float(rollouts.collect(algorithm.policy).reward.mean()) > -60
