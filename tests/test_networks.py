"""Normalized and residual networks, and critics whose outputs are not values themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gymnasium import spaces
from test_algorithms import first_batch
from torch import Tensor
from torch.nn.functional import layer_norm
from toys import ALL, BRIEF, PointMass, TwoSteps, build, collector, mostly_long, value

from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, Reinforce
from pgsuite.functional import objectives
from pgsuite.nn.layers import perceptron, residual
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.nn.value_heads import Categorical

BOX = spaces.Box(-9.0, 9.0, (3,))
HEADS: list[Any] = [{"head": "categorical"}, {"normalize_values": True}]


def drawn(net: torch.nn.Module) -> list[Tensor]:
    """The parameters of a network, in order, drawn anew."""
    net.double()
    with torch.no_grad():
        return [p.normal_() for p in net.parameters()]


def test_normalization_comes_between_a_layer_and_its_activation() -> None:
    net, x = perceptron((3, 5, 4), "relu", norm="layer"), torch.randn(7, 3, dtype=torch.float64)
    w1, b1, g1, h1, w2, b2, g2, h2 = drawn(net)
    hidden = layer_norm(x @ w1.T + b1, (5,), g1, h1).relu()
    assert torch.allclose(net(x), layer_norm(hidden @ w2.T + b2, (4,), g2, h2).relu())


def test_residual_blocks_are_simbas() -> None:
    net, x = residual((3, 5, 5), "relu", norm="layer"), torch.randn(7, 3, dtype=torch.float64)
    parts = drawn(net)
    assert [tuple(p.shape) for p in parts[2:8]] == [(5,), (5,), (20, 5), (20,), (5, 20), (5,)]
    z = x @ parts[0].T + parts[1]
    for gain, shift, w1, b1, w2, b2 in (parts[2:8], parts[8:14]):
        z = z + (layer_norm(z, (5,), gain, shift) @ w1.T + b1).relu() @ w2.T + b2
    assert torch.allclose(net(x), layer_norm(z, (5,), parts[14], parts[15]))
    assert len(parts) == 16 and len(drawn(residual((3, 5, 5), "relu"))) == 10 and not drawn(residual((3,), "relu"))


def test_residual_blocks_are_of_one_width() -> None:
    with pytest.raises(ValueError, match=r"policy.hidden must be of one width for policy.block=residual, got \[8, 4\]"):
        Policy(Standardize(BOX), spaces.Discrete(2), hidden=(8, 4), block="residual")


def test_the_histogram_of_a_target_has_its_mean() -> None:
    """Within 1e-5 of a bin where its tails are inside, and within a bin everywhere."""
    edges = torch.linspace(-2, 3, 51, dtype=torch.float64)
    center, target = (edges[1:] + edges[:-1]) / 2, torch.linspace(-2.5, 3.5, 997, dtype=torch.float64)
    chance = objectives.gaussian_histogram(target, edges, 0.075)
    mean, held = chance @ center, target.clamp(-2, 3)
    assert (chance >= 0).all() and torch.allclose(chance.sum(-1), torch.ones_like(mean))
    inside = (held - 0.5).abs() < 2.5 - 6 * 0.075
    assert ((mean - held).abs() < 0.1)[~inside].all() and ((mean - held).abs() < 1e-6)[inside].all()
    normal = torch.distributions.Normal(0.33, 0.075)
    expected = normal.cdf(edges[1:]) - normal.cdf(edges[:-1])
    found = objectives.gaussian_histogram(torch.tensor(0.33, dtype=torch.float64), edges, 0.075)
    assert torch.allclose(found, expected, atol=1e-12)


def test_the_loss_of_a_histogram_is_cross_entropy() -> None:
    """Its gradient by logits is what they say minus the target's chances, and where that is zero, the value is the
    target."""
    head = Categorical(bins=21, limit=4.0).double()
    target = torch.tensor([-3.0, 0.2, 1.0], dtype=torch.float64)
    logits = torch.randn(3, 21, dtype=torch.float64, requires_grad=True)
    chance = objectives.gaussian_histogram(target, head.edges, 0.75 * 8 / 21)
    (slope,) = torch.autograd.grad(head.loss(logits, target).sum(), logits)
    assert torch.allclose(slope, logits.detach().softmax(-1) - chance)
    assert torch.allclose(head.value(chance.log()), target, atol=1e-3)


@pytest.mark.parametrize("look", HEADS, ids=str)
def test_normalized_targets_are_those_of_all_updates(look: dict[str, Any]) -> None:
    """In the loss, they have a mean of zero and a variance of one; masked ones do not count."""
    critic = Critic(Standardize(BOX, enabled=False), hidden=(4,), **look).double()
    parts = [100 + 7 * torch.randn(9, 5, dtype=torch.float64), 110 + 9 * torch.randn(9, 5, dtype=torch.float64)]
    mask = torch.rand(9, 5) < 0.7
    for part in parts:
        critic.observe_targets(part.where(mask, torch.nan), mask)
    every = torch.cat([part[mask] for part in parts])
    assert critic.moments is not None
    normal = critic.moments.standardize(every)
    assert float(normal.mean()) == pytest.approx(0, abs=1e-9) and float(normal.var(correction=0)) == pytest.approx(1)
    prediction = critic.prediction(torch.randn(*every.shape, 4, dtype=torch.float64))
    assert torch.allclose(critic.loss(prediction, every), critic.head.loss(prediction, normal))
    old = every + 1.0
    if critic.head.linear:
        expected = objectives.clipped_squared_error(
            critic.head.value(prediction), critic.moments.standardize(old), normal, 0.2, 0.5
        )
        assert torch.allclose(critic.loss(prediction, every, old_value=old, clip=0.2, huber=0.5), expected)


def test_values_do_not_move_with_the_statistics_of_their_targets() -> None:
    critic = Critic(Standardize(BOX, enabled=False), hidden=(4,), normalize_values=True).double()
    features, every = torch.randn(50, 4, dtype=torch.float64), torch.ones(200, dtype=torch.bool)
    for mean, deviation in ((3.0, 0.1), (-500.0, 40.0), (0.0, 1e-3)):
        before = critic.read(features)
        critic.observe_targets(mean + deviation * torch.randn(200, dtype=torch.float64), every)
        assert torch.allclose(critic.read(features), before, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("look", [{}, *HEADS], ids=str)
def test_initial_values_of_zero_stay_so_for_every_head(look: dict[str, Any]) -> None:
    critic = Critic(Standardize(BOX), zero_init=True, **look)
    assert torch.allclose(critic.read(torch.randn(5, critic.body.size)), torch.zeros(5), atol=1e-6)


class WellPaid(PointMass):
    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        obs, reward, over = super().move(action)
        return obs, 100 + reward, over


@pytest.mark.parametrize("look", HEADS, ids=str)
@pytest.mark.parametrize("cls", ALL)
def test_every_method_takes_every_critic(cls: type[Algorithm], look: dict[str, Any]) -> None:
    """Rewards of a hundred a step: what it says nears its targets, in their units."""
    env = WellPaid(16, max_episode_steps=15)
    options: dict[str, Any] = {"baseline": "critic"} if cls is Reinforce else {}
    algorithm = build(cls, env, critic_look=look, scale=False, **BRIEF[cls] | options)
    rollouts = collector(algorithm, env)
    for _ in range(2):
        metrics = algorithm.iterate(rollouts)
        assert all(x.isfinite() for x in metrics.values())
    assert algorithm.critic.moments.mean > 100
    seen = algorithm.preprocess(rollouts.collect(algorithm.policy))
    batch = algorithm.compute_advantages(seen)
    error = float((batch.value - batch.target)[batch.mask].abs().mean())
    assert error < float(batch.target[batch.mask].abs().mean()) and batch.value.shape == batch.target.shape


LEARNS: list[Any] = [(cls, look) for cls in (A2C, PPO, NPG) for look in HEADS]


@pytest.mark.parametrize(("cls", "look"), mostly_long(LEARNS, LEARNS[0]))
def test_values_of_every_head_are_learned(cls: type[Algorithm], look: dict[str, Any]) -> None:
    env = TwoSteps(16)
    rates: dict[Any, Any] = {
        A2C: {"lr": {"linear": [0.02, 0]}, "optim": "adam"},
        PPO: {"lr": {"linear": [0.01, 0]}, "epochs": 2},
        NPG: {"critic_lr": {"linear": [0.02, 0]}, "critic_epochs": 2},
    }
    algorithm = build(cls, env, critic_look=look, gamma=0.5, standardize=False, scale=False, **rates[cls])
    rollouts = collector(algorithm, env, 8)
    for i in range(150):
        algorithm.update_schedules(i / 150)
        algorithm.iterate(rollouts)
    values = value(algorithm.critic, torch.tensor([[0.0], [1.0]]))
    assert torch.allclose(values, torch.tensor([0.5, 1.0]), atol=0.05)


@pytest.mark.parametrize("look", HEADS, ids=str)
def test_a_critic_is_resumed_with_the_units_of_its_values(look: dict[str, Any]) -> None:
    env = PointMass(8, max_episode_steps=9)
    algorithm = build(PPO, env, critic_look=look, scale=False, **BRIEF[PPO])
    rollouts = collector(algorithm, env)
    algorithm.iterate(rollouts)
    other = build(PPO, env, critic_look=look, scale=False, seed=1, **BRIEF[PPO])
    other.load_state_dict(copy.deepcopy(algorithm.state_dict()))
    obs = torch.randn(20, 4)
    assert torch.equal(value(other.critic, obs), value(algorithm.critic, obs))


@pytest.mark.parametrize(
    ("cls", "shared"), mostly_long([(PPO, False), (PPO, True), (TRPO, False), (TRPO, True)], (PPO, True))
)
def test_normalized_networks_remember_and_share(cls: type[Algorithm], shared: bool) -> None:
    env = PointMass(8, max_episode_steps=13)
    look = {"block": "residual", "norm": "layer", "recurrent": "gru", "recurrent_size": 8}
    algorithm = build(cls, env, look=look, recurrent="gru", shared=shared, critic_look={"head": "categorical"})
    rollouts = collector(algorithm, env, 15)
    for _ in range(2):
        rollout = rollouts.collect(algorithm.policy)
        with torch.no_grad():
            ratio = (algorithm.policy.dist(rollout).log_prob(rollout.action) - rollout.logp).exp()
        assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-5)
        assert all(x.isfinite() for x in algorithm.iterate(rollouts).values())


@pytest.mark.parametrize("name", ["value_clip", "huber_delta"])
def test_what_is_for_squared_errors_is_refused_by_other_heads(name: str) -> None:
    env, options = PointMass(4), dict[str, Any]({name: 0.2})
    algorithm = build(PPO, env, critic_look={"head": "categorical"}, **options)
    with pytest.raises(ValueError, match=f"algo.{name} is for a squared error, and critic.head=categorical has none"):
        algorithm.validate(collector(algorithm, env))
    algorithm = build(PPO, env, critic_look={"normalize_values": True}, **options)
    algorithm.validate(collector(algorithm, env))
    assert algorithm.loss(first_batch(algorithm, env))[0].isfinite()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("categoricl", "no critic.head 'categoricl'; did you mean categorical, or a class by its dotted path"),
        ({"_target_": "categorical", "bin": 3}, "no setting 'bin' in critic.head; did you mean bins"),
        ({"_target_": "categorical", "limit": 0}, "critic.head.limit must be a number greater than 0, got 0"),
    ],
)
def test_mistakes_about_heads_are_named(head: Any, message: str) -> None:
    with pytest.raises(ValueError) as said:
        Critic(Standardize(BOX), head=head)
    assert message in str(said.value)
