"""REPPO and its critic of actions, against closed forms, slow loops and finite differences, in float64."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from toys import BRIEF, PointMass, build, collector, compile_alike, resume_alike

from pgsuite.algorithms import REPPO
from pgsuite.functional import estimators
from pgsuite.functional.trust_region import flatten
from pgsuite.nn.action_critic import NEXT_ACTION, ActionCritic
from pgsuite.nn.heads import make_head
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Policy
from pgsuite.testing import check_algorithm
from pgsuite.types import Rollout

BRIEF |= {REPPO: {"epochs": 2, "minibatches": 2}}
SQUASHED = {"distribution": "squashed", "sigma": "state"}


def made(env: Any, **given: Any) -> Any:
    return build(REPPO, env, **{"look": SQUASHED, "scale": False} | given)


def rollout_of(algorithm: Any, env: Any, horizon: int = 10) -> Rollout:
    """A rollout in float64, of a policy and a critic that are so from then on."""
    rollout = algorithm.preprocess(collector(algorithm, env, horizon).collect(algorithm.policy))
    for part in algorithm.parts.values():
        part.double()
    return rollout.map(lambda x: x.double() if x.is_floating_point() else x)


def test_soft_lambda_returns_are_those_of_a_loop_over_all_lengths() -> None:
    """The weighted mean of the n-step returns, each with the bonuses of the states that it passes through."""
    stream = torch.Generator().manual_seed(0)
    reward, next_value, bonus = (torch.empty(3, 9, 4, dtype=torch.float64).normal_(generator=stream)).unbind()
    terminated, truncated = torch.empty(2, 9, 4).uniform_(generator=stream) < 0.15
    done, gamma, lam = terminated | truncated, 0.9, 0.7
    found = estimators.soft_td_lambda(reward, next_value, bonus, terminated, done, gamma=gamma, lam=lam)
    assert terminated.any() and (truncated & ~terminated).any()
    for n in range(4):
        for t in range(9):
            last = next(k for k in range(t, 9) if done[k, n] or k == 8)
            paid, expected, weight = 0.0, 0.0, 1.0
            for k in range(t, last + 1):
                live = not terminated[k, n]
                paid += gamma ** (k - t) * float(reward[k, n] + gamma * bonus[k, n] * live)
                whole = paid + gamma ** (k - t + 1) * float(next_value[k, n]) * live
                expected += weight * (whole if k == last else (1 - lam) * whole)
                weight *= lam
            assert float(found[t, n]) == pytest.approx(expected, rel=1e-12)


def test_targets_are_of_the_successors_that_were_reached_and_of_actions_drawn_there() -> None:
    """With the discount and lambda at 0 they are rewards; at lambda 0, reward and soft value of the next state."""
    env = PointMass(8, max_episode_steps=7)
    algorithm = made(env, lam=0.0, gamma=0.9, multiplier=0.3)
    rollout = rollout_of(algorithm, env)
    assert bool(rollout.truncated.any())
    state = algorithm.generator.get_state()
    batch = algorithm.compute_advantages(rollout)
    algorithm.generator.set_state(state)
    there = replace(rollout, obs=rollout.next_obs)
    dist = algorithm.policy.dist(there)
    action = dist.sample(algorithm.generator)
    q = algorithm.critic(replace(there, action=action))
    expected = rollout.reward + 0.9 * (q + 0.3 * dist.entropy()).where(~rollout.terminated, 0.0)
    assert torch.allclose(batch.target, expected.detach(), rtol=1e-9)
    assert torch.allclose(batch.value, algorithm.critic(rollout).detach(), rtol=1e-9)


def test_a_memory_remembers_observations_and_is_not_moved_by_the_actions_that_are_tried() -> None:
    env = PointMass(4, max_episode_steps=7)
    critic = ActionCritic(
        Standardize(env.observation_space), env.action_space, num_envs=4, recurrent="gru", recurrent_size=8
    ).double()
    algorithm = made(env, recurrent="gru", look=SQUASHED | {"recurrent": "gru", "recurrent_size": 16})
    algorithm.critic = critic
    rollout = rollout_of(algorithm, env)
    action = torch.randn(*rollout.action.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rollout = replace(rollout, extra={NEXT_ACTION: action})
    value, next_value = critic.values_and_next_values(rollout)
    state = {critic.body.name: critic.hidden_state}
    for t in range(len(rollout.reward)):
        features, state = critic.body.step(rollout.obs[t], state, rollout.start[t])
        following, _ = critic.body.step(rollout.next_obs[t], state, torch.zeros(4, dtype=torch.bool))
        for found, x, a in ((value, features, rollout.action[t]), (next_value, following, action[t])):
            assert torch.allclose(found[t], critic.value(critic.joint_prediction(x, a)), rtol=1e-9)


def test_the_gradient_through_q_is_that_of_finite_differences() -> None:
    env = PointMass(8)
    algorithm = made(env, multiplier=0.2)
    batch = algorithm.compute_advantages(rollout_of(algorithm, env))
    noise = torch.randn(*batch.action.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = replace(batch, extra={"noise": noise})
    algorithm.old = type(algorithm.old)(algorithm.policy)
    last = algorithm.policy.out.weight

    def policy_loss() -> Tensor:
        return algorithm.loss(batch)[1]["policy_loss"]

    (slope,) = torch.autograd.grad(algorithm.loss(batch)[0], last)
    for at in ((0, 3), (1, 7), (2, 0), (3, 11)):
        with torch.no_grad():
            last[at] += 1e-6
            above = policy_loss()
            last[at] -= 2e-6
            below = policy_loss()
            last[at] += 1e-6
        assert float(slope[at]) == pytest.approx(float(above - below) / 2e-6, rel=1e-5, abs=1e-9)


def test_beyond_the_bound_the_policy_is_led_back_alone_and_multipliers_follow_their_constraints() -> None:
    env = PointMass(8)
    algorithm = made(env, multiplier=0.2, max_kl=0.05, entropy_target=-0.5)
    batch = algorithm.compute_advantages(rollout_of(algorithm, env))
    batch = replace(batch, extra={"noise": torch.zeros_like(batch.action)})
    algorithm.old = type(algorithm.old)(algorithm.policy)
    params, duals = list(algorithm.policy.parameters()), list(algorithm.multipliers.parameters())
    for size, beyond in ((1e-3, False), (2.0, True)):
        with torch.no_grad():
            algorithm.policy.out.bias[:2] += size  # the means
        dist = algorithm.policy.dist(batch)
        kl = algorithm.old.dist(batch).kl(dist)
        mean = kl.mean().detach()
        assert bool(((kl > 0.05) == beyond).all())
        loss = algorithm.loss(batch)[0]
        slope = flatten(torch.autograd.grad(loss, params, retain_graph=True))
        back = flatten(torch.autograd.grad(0.2 * kl.mean(), params, retain_graph=True, materialize_grads=True))
        assert torch.allclose(slope, back, rtol=1e-6) == beyond
        temperature, kl_coef = torch.autograd.grad(loss, duals)
        assert float(temperature) == pytest.approx(0.2 * float(dist.entropy().mean().detach() + 0.5 * 2))
        assert float(kl_coef) == pytest.approx(0.2 * float(0.05 - mean)) and (float(kl_coef) < 0) == beyond


class Parabola(ActionCritic):
    """Q(s, a) = -curvature (a - peak)^2, and nothing to learn."""

    curvature, peak = 2.0, 0.3

    def forward(self, seen: Any) -> Tensor:
        return -self.curvature * (seen.action - self.peak).square().sum(-1)


class Slope(ActionCritic):
    def forward(self, seen: Any) -> Tensor:
        return seen.action.sum(-1)


def on_known_values(kind: type[ActionCritic], **given: Any) -> tuple[Any, Any]:
    """An algorithm without a clip of gradients whose critic is known, and a batch of one state."""
    env = PointMass(16)
    env.action_space = spaces.Box(-1.0, 1.0, (1,))
    norm = Standardize(env.observation_space)
    policy = Policy(norm, env.action_space, hidden=(), generator=torch.Generator().manual_seed(0))
    given |= {"critic": kind(norm, env.action_space, num_envs=16), "generator": torch.Generator().manual_seed(0)}
    algorithm = REPPO(policy=policy, max_grad_norm=None, **given)
    cells = torch.zeros(16, 16)
    nothing, states = torch.zeros(16, 16, 1), torch.zeros(16, 16, 4)
    mask = torch.ones(16, 16, dtype=torch.bool)
    rollout = Rollout(states, {}, ~mask, nothing, cells, cells, states, ~mask, ~mask, mask)
    return algorithm, algorithm.compute_advantages(rollout)


def steps(algorithm: Any, batch: Any, count: int) -> None:
    for _ in range(count):
        noise = torch.empty_like(batch.action).normal_(generator=algorithm.generator)
        algorithm.gradient_step(algorithm.optimizer, algorithm.loss, replace(batch, extra={"noise": noise}))


def test_at_a_temperature_the_policy_is_the_soft_optimal_one() -> None:
    """exp(Q / temperature) is a Gaussian around the peak, of variance temperature / (2 curvature)."""
    algorithm, batch = on_known_values(Parabola, lr=0.05, multiplier=0.1, max_kl=100.0)
    for lr in (0.05, 0.005):  # the second averages the noise
        algorithm.optimizer.lr.fill_(lr)
        for _ in range(60):
            steps(algorithm, batch, 1)
            algorithm.multipliers.load_state_dict(
                {f"log_{x}": torch.tensor(0.1).log() for x in ("temperature", "kl_coef")}
            )
    dist = algorithm.policy.dist(batch)
    assert dist.mean[0, 0].item() == pytest.approx(0.3, abs=0.01)
    assert dist.log_sigma.exp().item() == pytest.approx(math.sqrt(0.1 / (2 * Parabola.curvature)), rel=0.03)


def test_the_temperature_leads_to_the_entropy_target() -> None:
    """On average, for the two swing around it: policy and multiplier learn at one rate."""
    algorithm, batch = on_known_values(Parabola, entropy_target=-0.7, lr=0.05, multiplier=0.5, max_kl=100.0)
    assert algorithm.policy.dist(batch).entropy().mean().item() > 0.9
    steps(algorithm, batch, 100)
    found = []
    for _ in range(20):
        steps(algorithm, batch, 10)
        found.append(algorithm.policy.dist(batch).entropy().mean().item())
    assert sum(found) / 20 == pytest.approx(-0.7, abs=0.3)


@pytest.mark.parametrize("bound", [0.02, 100.0])
def test_the_bound_holds_a_policy_that_would_run_away(bound: float) -> None:
    algorithm, batch = on_known_values(Slope, max_kl=bound, lr=0.01, multiplier=1.0)
    before = algorithm.multipliers()[1].item()
    steps(algorithm, batch, 60)
    kl = float(algorithm.old.dist(batch).kl(algorithm.policy.dist(batch)).mean().detach())
    if bound < 1:
        assert 0.5 * bound < kl < 1.5 * bound and algorithm.multipliers()[1].item() > before
    else:
        assert kl > 0.2


def test_entropy_is_in_units_of_half_the_width_of_the_box() -> None:
    numbers = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    for kind in ("gaussian", "squashed"):
        entropies = []
        for width in (1.0, 8.0):
            head = make_head(spaces.Box(-width, width, (2,)), kind)
            entropies.append(head.unit_entropy(head(numbers)))
        assert torch.allclose(*entropies, atol=1e-5)


def test_what_it_cannot_learn_from_is_refused_by_name() -> None:
    norm = Standardize(spaces.Box(-1.0, 1.0, (3,)))
    with pytest.raises(ValueError, match=r"differentiated by the action are for a Box, and actions are Discrete\(3\)"):
        ActionCritic(norm, spaces.Discrete(3))
    box = spaces.Box(-1.0, 1.0, (1,))
    with pytest.raises(ValueError, match=r"critic\.shared=true is for values of states"):
        ActionCritic(norm, box, shared=Policy(norm, box))
    env = PointMass(8)
    with pytest.raises(ValueError, match=r"take policy\.distribution=squashed or gaussian"):
        algorithm = made(env, look={"distribution": "beta"})
        algorithm.validate(collector(algorithm, env))


def test_it_resumes_exactly() -> None:
    one, two = ((a, collector(a, env)) for env in (PointMass(8), PointMass(8)) for a in [made(env, **BRIEF[REPPO])])
    one[0].iterate(one[1])
    resume_alike(one, two)


@pytest.mark.long
def test_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_alike(lambda env: made(env, **BRIEF[REPPO]), monkeypatch)


@pytest.mark.long
def test_it_does_what_the_suite_relies_on() -> None:
    check_algorithm(REPPO, epochs=10, minibatches=4, lr=3e-3, max_kl=0.02, gamma=0.9)
