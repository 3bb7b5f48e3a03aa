"""Each test is one claim about the methods, checked on worlds where the answer is known."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import (
    ALL,
    LQR,
    Corridor,
    Endless,
    FrozenLake,
    PointMass,
    Probe,
    TwoSteps,
    build,
    collector,
    mostly_long,
    value,
)

from pgsuite import seeding
from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, PPOPenalty, Reinforce
from pgsuite.algorithms.estimators import GAE, MonteCarlo, NStep, TDLambda, VTrace
from pgsuite.functional import estimators
from pgsuite.functional import trust_region as tr
from pgsuite.nn import optim
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.optim import Adam, make_optimizer
from pgsuite.nn.policy import Critic, Policy
from pgsuite.rollout import EpisodeCollector, StepCollector
from pgsuite.testing.reads import NothingRead
from pgsuite.types import Batch


def first_batch(algorithm: Any, env: Any, horizon: int = 10) -> Batch:
    with torch.no_grad():
        return algorithm._compute_advantages(collector(algorithm, env, horizon).collect(algorithm.policy))


def flat(algorithm: Any) -> Tensor:
    return tr.flatten(list(algorithm.policy.parameters())).detach().clone()


class Priced(PointMass):
    """The task with its rewards multiplied."""

    def __init__(self, num_envs: int, times: float) -> None:
        super().__init__(num_envs)
        self.times = times

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        following, reward, terminated = super().move(action)
        return following, self.times * reward, terminated


@pytest.mark.parametrize("times", mostly_long([1e-3, 2.0**-10, 2.0**10, 1e3], 1e-3, 2.0**10))
@pytest.mark.parametrize("cls", ALL)
def test_multiplying_all_rewards_changes_nothing(cls: type[Algorithm], times: float) -> None:
    """From the first rollout on; powers of two do not even change the rounding."""
    found = []
    for factor in (1.0, times):
        env = Priced(8, factor)
        algorithm = build(cls, env)
        rollouts = collector(algorithm, env)
        for _ in range(3):
            algorithm.iterate(rollouts)
        found.append(flat(algorithm))
    if times in (2.0**-10, 2.0**10):
        assert torch.equal(*found)
    assert torch.allclose(*found, atol=2e-4)


# The seven traps


def test_a_search_that_fails_changes_no_bit() -> None:
    env = PointMass(16)
    algorithm = build(TRPO, env)
    batch = first_batch(algorithm, env)
    before, tried = flat(algorithm), []

    def refuse(attempt, whole):
        for fraction in (whole, 0.5 * whole):
            tried.append(float(attempt(fraction)[1]))
            assert torch.equal(before, flat(algorithm))
        return 0 * whole, {}

    algorithm.line_search = refuse
    metrics = algorithm.update_policy(batch)
    assert float(metrics["accepted"]) == float(metrics["step_fraction"]) == float(metrics["step_norm"]) == 0
    assert torch.equal(before, flat(algorithm)) and tried[0] > tried[1] > 1e-3


@pytest.mark.parametrize("cls", [NPG, TRPO])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 0.0])
def test_a_poisoned_batch_changes_no_bit(cls: type[NPG], poison: float) -> None:
    env = PointMass(16)
    algorithm = build(cls, env)
    batch = first_batch(algorithm, env)
    batch.advantage.fill_(poison)
    before = flat(algorithm)
    algorithm.update_policy(batch)
    assert torch.equal(before, flat(algorithm))


def test_trpo_reads_one_bit_per_try() -> None:
    env, reads = PointMass(16), 0
    algorithm = build(TRPO, env, max_backtracks=4)
    batch = first_batch(algorithm, env)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal reads
            reads += func._schema.name.removeprefix("aten::") in NothingRead.FORBIDDEN
            return func(*args, **(kwargs or {}))

    with Count():
        metrics = algorithm.update_policy(batch)
    assert reads == 1 + int(metrics["backtracks"])


@pytest.mark.parametrize("cls", mostly_long([A2C, PPO], PPO))
def test_the_hot_path_is_one_graph(cls: type[A2C]) -> None:
    env = PointMass(8)
    algorithm = build(cls, env)
    rollout = collector(algorithm, env).collect(algorithm.policy)
    whole: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}
    torch.compile(algorithm.policy.act, **whole)(rollout.obs[0], {}, rollout.start[0])
    with torch.no_grad():
        compiled, batch = (
            torch.compile(algorithm._compute_advantages, **whole)(rollout),
            algorithm._compute_advantages(rollout),
        )
    assert torch.allclose(compiled.advantage, batch.advantage, atol=1e-5)
    loss, _ = torch.compile(algorithm.loss, **whole)(batch)
    loss.backward()


def exact_gradient(survive: tuple[float, float], limit: int, logit: float, gamma: float = 1.0) -> float:
    """Of the expected discounted return of the corridor, in the second action's logit, by enumeration."""
    logits = torch.tensor([0.0, logit], dtype=torch.float64, requires_grad=True)
    survival = (logits.softmax(0) * torch.tensor(survive, dtype=torch.float64)).sum()
    value = torch.stack([(gamma * survival) ** t for t in range(limit)]).sum()
    return float(torch.autograd.grad(value, logits)[0][1])


def test_whole_episodes_give_the_exact_gradient_and_torn_ones_do_not() -> None:
    """Eight estimates of 5,000 episodes each, seeded; four standard errors."""
    survive, limit, envs, horizon = (0.5, 0.95), 40, 5_000, 8
    exact = exact_gradient(survive, limit, 1.0)

    def estimate(kind: str, seed: int) -> float:
        env = Corridor(envs, limit, survive, seed=seed)
        algorithm = build(Reinforce, env, gamma=1.0, standardize=False, scale=False)
        policy = algorithm.policy
        with torch.no_grad():
            for p in policy.parameters():
                p.zero_()
            policy.out.bias.copy_(torch.tensor([0.0, 1.0]))
        if kind == "whole":
            rollout = EpisodeCollector(env, limit, seed).collect(policy)
            batch, count = algorithm._compute_advantages(rollout), envs
            mask, advantage = batch.mask, batch.advantage
        else:
            rollout = StepCollector(env, horizon, seed).collect(policy)
            advantage = estimators.reward_to_go(rollout.reward, rollout.done, gamma=1.0)
            finished = rollout.done.flip(0).int().cumsum(0).flip(0) > 0
            mask = finished if kind == "finished" else torch.ones_like(rollout.mask)
            count = int(rollout.done.sum()) + (int((~rollout.done[-1]).sum()) if kind == "cut" else 0)
        gain = (policy.dist(rollout).log_prob(rollout.action) * advantage).where(mask, 0.0).sum() / count
        return float(torch.autograd.grad(gain, policy.out.bias)[0][1])

    whole = torch.tensor([estimate("whole", seed) for seed in range(8)])
    error = 4 * float(whole.std()) / math.sqrt(8)
    assert error < 0.1 * exact
    assert float(whole.mean()) == pytest.approx(exact, abs=error)
    for kind in ("cut", "finished"):
        torn = torch.tensor([estimate(kind, seed) for seed in range(4)])
        assert abs(float(torn.mean()) - exact) > 0.3 * exact, kind


def test_with_a_discount_only_the_total_return_gives_the_exact_gradient() -> None:
    """Returns to go leave out the factor gamma^t of step t.  Eight estimates of 5,000 episodes each, seeded; four
    standard errors."""
    survive, limit, envs, gamma = (0.5, 0.95), 40, 5_000, 0.9
    exact = exact_gradient(survive, limit, 1.0, gamma)

    def estimate(returns: str, seed: int) -> float:
        env = Corridor(envs, limit, survive, seed=seed)
        algorithm = build(Reinforce, env, gamma=gamma, returns=returns, standardize=False, scale=False)
        with torch.no_grad():
            for p in algorithm.policy.parameters():
                p.zero_()
            algorithm.policy.out.bias.copy_(torch.tensor([0.0, 1.0]))
        batch = algorithm._compute_advantages(EpisodeCollector(env, limit, seed).collect(algorithm.policy))
        return -float(torch.autograd.grad(algorithm.loss(batch)[0], algorithm.policy.out.bias)[0][1])

    for returns in ("total", "to-go"):
        found = torch.tensor([estimate(returns, seed) for seed in range(8)])
        error = 4 * float(found.std()) / math.sqrt(8)
        assert error < 0.1 * exact
        assert (abs(float(found.mean()) - exact) < error) == (returns == "total"), returns


@pytest.mark.parametrize("terminates", mostly_long([False, True], False))
def test_a_time_limit_is_not_the_end_of_the_task(terminates: bool) -> None:
    """Reward one forever: V = 1 / (1 - gamma) if the clock ends the episode; a geometric sum if the task does."""
    env = Endless(8, max_episode_steps=5)
    env.terminates = terminates
    options: dict[str, Any] = {"gamma": 0.98, "standardize": False, "scale": False, "normalize_advantage": "none"}
    algorithm = build(A2C, env, lr={"linear": [0.05, 0]}, optim="adam", max_grad_norm=None, **options)
    rollouts = StepCollector(env, 10)
    for i in range(600):
        algorithm.update_schedules(i / 600)
        algorithm.iterate(rollouts)
    said = float(value(algorithm.critic, torch.ones(1, 1)))
    if terminates:
        steps_left = sum(sum(0.98**i for i in range(n)) for n in range(1, 6)) / 5
        assert said == pytest.approx(steps_left, abs=0.2)
    else:
        assert said == pytest.approx(50, abs=1)


# One gradient under five names


def policy_gradient(algorithm: Any, batch: Batch) -> Tensor:
    params = list(algorithm.policy.parameters())
    logp = algorithm.policy.dist(batch).log_prob(batch.action)
    if isinstance(algorithm, Reinforce):
        gain = (logp * batch.advantage).where(batch.mask, 0.0).sum() / batch.mask.sum()
    else:
        gain = algorithm.surrogate((logp - batch.logp).exp(), batch.advantage).mean()
    return tr.flat_grad(gain, params)


def test_at_the_acting_policy_all_methods_ascend_one_direction() -> None:
    gradients = []
    for cls in (A2C, PPO, NPG, TRPO, Reinforce):
        env = PointMass(16, max_episode_steps=10)
        options: dict[str, Any] = {"estimator": MonteCarlo(), "normalize_advantage": "none"}
        options = {"baseline": "critic"} if cls is Reinforce else options
        algorithm = build(cls, env, seed=1, **options)
        rollout = StepCollector(env, 10, seed=2).collect(algorithm.policy)
        rollout.terminated.copy_(rollout.done)  # so that no method bootstraps
        rollout.truncated.fill_(False)
        with torch.no_grad():
            batch = algorithm._compute_advantages(rollout)
        gradients.append(policy_gradient(algorithm, batch))
    assert gradients[0].norm() > 1e-3
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, atol=1e-6)


def test_a2c_is_ppo_with_one_epoch_and_one_minibatch() -> None:
    ends = []
    for cls in (A2C, PPO):
        env = PointMass(8)
        same: dict[str, Any] = {
            "optim": "rmsprop",
            "lr": 7e-4,
            "estimator": GAE(lam=1.0),
            "normalize_advantage": "none",
        }
        same |= {"epochs": 1, "minibatches": 1} if issubclass(cls, PPO) else {}
        algorithm = build(cls, env, **same)
        rollouts = collector(algorithm, env, 5)
        for _ in range(5):
            algorithm.iterate(rollouts)
        ends.append(flat(algorithm))
    assert torch.equal(ends[0], ends[1])


def test_the_policy_gradient_of_a_bandit_is_the_closed_form() -> None:
    """d J / d theta = pi (r - J); a million pulls, five standard errors."""
    theta, reward, pulls = torch.tensor([0.0, 0.5, -0.5]), torch.tensor([1.0, 2.0, 3.0]), 1_000_000
    pi = theta.softmax(0)
    from pgsuite.nn.distributions import Categorical

    logits = theta.expand(pulls, 3).clone().requires_grad_()
    dist = Categorical(logits.log_softmax(-1))
    action = dist.sample(torch.Generator().manual_seed(0))
    baseline = estimators.leave_one_out(reward[action].unsqueeze(0), torch.ones(1, pulls, dtype=torch.bool))[0]
    gain = dist.log_prob(action) * (reward[action] - baseline)
    samples = torch.autograd.grad(gain.sum(), logits)[0]
    error = 5 * samples.std(0) / math.sqrt(pulls)
    expected = torch.tensor([-0.27006445, 0.06121938, 0.20884507])
    assert torch.allclose(pi * (reward - (pi * reward).sum()), expected, atol=1e-6)
    assert ((samples.mean(0) - expected).abs() < error).all()


@pytest.mark.parametrize("cls", [A2C, PPO])
def test_the_loss_falls_with_entropy_and_with_the_critics_error(cls: type[A2C]) -> None:
    """By their coefficients, and separately: one is of the policy, the other of the critic."""
    env = PointMass(8)
    algorithm, gradients = build(cls, env), []
    batch, parameters = first_batch(algorithm, env), [*algorithm.policy.parameters(), *algorithm.critic.parameters()]
    for algorithm.entropy_coef, algorithm.value_coef in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.7)):
        gradients.append(tr.flat_grad(algorithm.loss(batch)[0], parameters))
    entropy = tr.flat_grad(algorithm.policy.dist(batch).entropy().mean(), parameters)
    error = tr.flat_grad((algorithm.critic(batch) - batch.target).square().mean(), parameters)
    assert entropy.norm() > 0.1 and error.norm() > 0.1
    assert torch.allclose(gradients[1] - gradients[0], -0.3 * entropy, atol=1e-6)
    assert torch.allclose(gradients[2] - gradients[0], 0.7 * error, atol=1e-5)


# Trust region


def test_trpo_improves_within_its_budget() -> None:
    env = PointMass(64)
    algorithm = build(TRPO, env, max_kl=0.02)
    rollouts = collector(algorithm, env, 25)
    for _ in range(8):
        metrics = algorithm.iterate(rollouts)
        assert (
            0 < metrics["kl"] <= algorithm.max_kl
            and metrics["surrogate_improvement"] > 0
            and metrics["step_fraction"] > 0
        )


def test_trpo_backtracks_when_the_quadratic_model_lies() -> None:
    """With no damping and a large budget the model is wrong far out, and some full step must be refused."""
    env = PointMass(32)
    algorithm = build(TRPO, env, max_kl=0.5, damping=1e-4)
    rollouts, backtracks = collector(algorithm, env, 25), 0.0
    for _ in range(8):
        metrics = algorithm.iterate(rollouts)
        backtracks += float(metrics["backtracks"])
        assert float(metrics["step_fraction"]) == 0 or metrics["kl"] <= 0.5
    assert backtracks > 0


def test_the_natural_step_spends_its_budget_in_the_quadratic_model() -> None:
    env = PointMass(64)
    algorithm = build(NPG, env, max_kl=1e-4, damping=0.0)
    batch = first_batch(algorithm, env, 25)
    assert float(algorithm.update_policy(batch)["kl"]) == pytest.approx(1e-4, rel=0.05)


def test_kl_is_from_old_to_new() -> None:
    env = PointMass(32)
    algorithm = build(NPG, env, max_kl=0.1)
    batch = first_batch(algorithm, env)
    old = copy.deepcopy(algorithm.policy)
    kl = algorithm.update_policy(batch)["kl"]
    before, after = old.dist(batch), algorithm.policy.dist(batch)
    assert torch.allclose(kl, before.kl(after).mean(), rtol=1e-4)
    assert not torch.allclose(kl, after.kl(before).mean(), rtol=1e-3)


# PPO's switches


def test_ppo_stops_early_when_it_strays() -> None:
    env = PointMass(16)
    wild = build(PPO, env, lr=0.05, target_kl=0.01)
    assert float(wild.iterate(collector(wild, env))["epochs"]) < 10
    calm = build(PPO, env, lr=1e-6, target_kl=0.01)
    assert float(calm.iterate(collector(calm, env))["epochs"]) == 10


def test_advantages_are_standardized_where_asked() -> None:
    env = PointMass(16)
    for where, expected in (("none", False), ("batch", True), ("minibatch", False)):
        batch = first_batch(build(PPO, env, normalize_advantage=where), env)
        assert (abs(float(batch.advantage.std(correction=0)) - 1) < 1e-4) == expected
    seen = []
    algorithm = build(PPO, env, normalize_advantage="minibatch", epochs=1, minibatches=4)
    surrogate = algorithm.surrogate
    algorithm.surrogate = lambda ratio, advantage: (
        seen.append(advantage.std(correction=0)),
        surrogate(ratio, advantage),
    )[1]
    algorithm.iterate(collector(algorithm, env))
    assert len(seen) == 4 and all(abs(float(s) - 1) < 1e-3 for s in seen)


def test_the_gradient_norm_is_bounded_where_asked() -> None:
    """RMSprop's first step from p with gradient g is lr g / (sqrt(0.01) |g| + eps), so look at what it remembers: the
    squares, a hundredth of them."""
    for bound in (None, 1e-3):
        env = PointMass(8)
        algorithm = build(A2C, env, max_grad_norm=bound)
        norm = float(algorithm.iterate(collector(algorithm, env))["grad_norm"])
        clipped = 10 * float(algorithm.optimizer.square.sum().sqrt())
        assert clipped == pytest.approx(norm if bound is None else bound, rel=1e-3) and norm > 1e-3


@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
@pytest.mark.parametrize("piece", [optim.PIECE, 5])
def test_one_flat_vector_steps_as_separate_parameters_would(
    kind: Any, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's own optimizers and clipping, on layers that share the loss unevenly and one that it misses; at
    once and in pieces, as many parameters are."""
    monkeypatch.setattr(optim, "PIECE", piece)
    layers = [torch.nn.Linear(3, 4), torch.nn.Linear(4, 1), torch.nn.Linear(2, 2)]
    twins = copy.deepcopy(layers)
    params = [p for twin in twins for p in twin.parameters()]
    ours = make_optimizer(layers, 0.05, kind, 0.5)
    if kind == "adam":
        theirs: torch.optim.Optimizer = torch.optim.Adam(params, 0.05, eps=1e-5)
    else:
        theirs = torch.optim.RMSprop(params, 0.05, alpha=0.99, eps=1e-5)
    for _ in range(5):
        x = torch.randn(16, 3)
        norm = ours.step(lambda x: (layers[1](layers[0](x).tanh()).square().mean(), {}), x)["grad_norm"]
        theirs.zero_grad()
        twins[1](twins[0](x).tanh()).square().mean().backward()
        assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(params, 0.5)), rel=1e-5)
        theirs.step()
    for layer, twin in zip(layers, twins, strict=True):
        assert torch.allclose(layer.weight, twin.weight, atol=1e-6) and torch.allclose(layer.bias, twin.bias, atol=1e-6)


def test_a_parameter_has_one_optimizer() -> None:
    layer = torch.nn.Linear(1, 1)
    first, second = Adam([layer], 0.1), Adam([layer], 0.1)
    second.step(lambda: (layer.weight.sum(), {}))
    with pytest.raises(RuntimeError, match="left its optimizer"):
        first.step(lambda: (layer.weight.sum(), {}))


def test_credit_is_assigned_anew_before_each_epoch_where_asked() -> None:
    """With the critic as it then is, and never for the first; the acting policy's log-probabilities stay.  Where it is
    not asked, all epochs are one update."""
    for recompute in (False, True):
        env = PointMass(16)
        algorithm = build(PPO, env, epochs=3, lr=0.01, recompute_advantage=recompute)
        rollout, seen, update = collector(algorithm, env).collect(algorithm.policy), [], algorithm.update

        def watched(batch: Batch, seen: Any = seen, update: Any = update, critic: Any = algorithm.critic) -> Any:
            seen.append((batch, critic(batch).detach()))
            return update(batch)

        algorithm.update = watched
        algorithm.learn(rollout)
        for batch, said in seen:
            assert torch.equal(batch.logp, rollout.logp)
            assert torch.allclose(batch.value, said, atol=1e-6)
        assert len(seen) == (3 if recompute else 1)
        assert torch.equal(seen[0][0].target, seen[-1][0].target) != recompute


def test_epochs_of_one_update_are_those_of_several() -> None:
    """A limit of the KL that is never met decides after each epoch, and changes nothing."""
    found = []
    for target_kl in (None, 1e9):
        env = PointMass(16)
        algorithm = build(PPO, env, epochs=3, minibatches=4, lr=0.01, target_kl=target_kl)
        metrics = algorithm.learn(collector(algorithm, env).collect(algorithm.policy))
        found.append((metrics, torch.cat([x.flatten() for x in algorithm.policy.parameters()])))
    (one, together), (several, apart) = found
    assert torch.equal(together, apart) and one.keys() == several.keys() and float(one["epochs"]) == 3
    for name, x in one.items():
        assert torch.allclose(x, several[name], rtol=1e-5, atol=1e-7), name


def test_the_total_return_pays_every_action_alike() -> None:
    """Each real step of an episode is paid its whole discounted return; less that of the others, if they are asked."""
    env = Corridor(64, 12, (0.6, 0.9))
    for baseline in ("none", "leave-one-out"):
        algorithm = build(Reinforce, env, gamma=0.9, returns="total", baseline=baseline, scale=False)
        rollout = EpisodeCollector(env, 12).collect(algorithm.policy)
        batch = algorithm._compute_advantages(rollout)
        total = (rollout.reward * rollout.mask * 0.9 ** torch.arange(12.0).unsqueeze(-1)).sum(0)
        live = rollout.mask.sum(1, keepdim=True)
        others = ((total * rollout.mask).sum(1, keepdim=True) - total) / (live - 1).clamp(min=1)
        expected = total - others * (live > 1) * (baseline != "none")
        assert torch.allclose(batch.advantage[rollout.mask], expected.expand(12, 64)[rollout.mask], atol=1e-4)


def test_the_value_clip_is_off_unless_asked_for() -> None:
    env = PointMass(16)
    for clip in (None, 1e-3):
        algorithm = build(PPO, env, value_clip=clip)
        batch = first_batch(algorithm, env)
        value = batch.value + 1.0
        loss = algorithm.value_error(value.requires_grad_().unsqueeze(-1), batch).sum()
        slope = torch.autograd.grad(loss, value)[0]
        plain = torch.equal(slope, 2 * (value - batch.target).detach())
        assert plain == (clip is None)


@pytest.mark.parametrize(("lr", "factor"), [(1e-6, 0.5), (3e-2, 2.0)])
def test_the_price_of_straying_follows_how_far_an_update_went(lr: float, factor: float) -> None:
    env = PointMass(16)
    price = {"start": 0.3, "kl": 0.01, "factor": 0.5, "band": 1.5}
    algorithm = build(PPOPenalty, env, lr=lr, beta={"adaptive": price})
    rollouts = collector(algorithm, env)
    rollout = rollouts.collect(algorithm.policy)
    metrics = algorithm.learn(rollout) | algorithm.adapt(rollout)
    kl = (algorithm.policy.dist(rollout).log_prob(rollout.action) - rollout.logp).detach()
    assert float(metrics["kl"]) == pytest.approx(float((kl.expm1() - kl).mean()), rel=1e-4)
    assert (float(metrics["kl"]) > 0.015) == (factor > 1) and (float(metrics["kl"]) < 0.01 / 1.5) == (factor < 1)
    assert float(metrics["beta"]) == float(algorithm.beta) == pytest.approx(0.3 * factor)
    other = build(PPOPenalty, env)
    other.load_state_dict(copy.deepcopy(algorithm.state_dict()))
    assert float(other.beta) == float(algorithm.beta)


def test_straying_is_paid_for_by_the_nat() -> None:
    """With a large price the surrogate falls by beta times k3, whatever the advantage."""
    env = PointMass(4)
    algorithm, ratio = build(PPOPenalty, env, beta=7.0), torch.tensor([0.5, 1.0, 2.0])
    advantage = torch.tensor([1.0, -1.0, 0.5])
    expected = ratio * advantage - 7.0 * (ratio - 1 - ratio.log())
    assert torch.allclose(algorithm.surrogate(ratio, advantage), expected)


# REINFORCE's baselines


@pytest.mark.parametrize("baseline", ["none", "leave-one-out", "critic"])
def test_every_baseline_is_unbiased(baseline: str) -> None:
    """Baselines change the variance of the gradient and not its mean; seeded, five standard errors."""
    gradients = []
    for seed in range(30):
        env = Corridor(200, 10, (0.5, 0.9), seed=seed)
        algorithm = build(Reinforce, env, gamma=1.0, baseline=baseline, standardize=False, scale=False)
        with torch.no_grad():
            for p in algorithm.policy.parameters():
                p.zero_()
        batch = first_batch(algorithm, env)
        logp = algorithm.policy.dist(batch).log_prob(batch.action)
        gain = (logp * batch.advantage).where(batch.mask, 0.0).sum() / env.num_envs
        gradients.append(float(torch.autograd.grad(gain, algorithm.policy.out.bias)[0][1]))
    got, error = torch.tensor(gradients).mean(), 5 * torch.tensor(gradients).std() / math.sqrt(30)
    assert abs(float(got) - exact_gradient((0.5, 0.9), 10, 0.0)) < float(error)


def test_reinforce_refuses_torn_episodes() -> None:
    env = PointMass(4)
    with pytest.raises(ValueError, match="whole episodes"):
        build(Reinforce, env).validate(StepCollector(env, 50))
    with pytest.raises(ValueError, match="3 minibatches do not divide"):
        build(PPO, env, minibatches=3).validate(StepCollector(env, 50))


# Learning


PROBES: list[tuple[str, Callable[[Tensor, Tensor], Tensor], bool]] = [
    ("reward is one", lambda obs, action: torch.ones_like(obs), True),
    ("reward is the observation", lambda obs, action: obs, False),
    ("reward is the action times the observation", lambda obs, action: (2 * action - 1) * obs, False),
]
FAST: dict[type[Algorithm], dict[str, Any]] = {
    Reinforce: {"lr": 0.02, "baseline": "critic", "critic_lr": 0.01},
    A2C: {"lr": 0.02, "optim": "adam"},
    PPO: {"lr": 0.01, "epochs": 4, "minibatches": 2},
    PPOPenalty: {
        "lr": 0.01,
        "epochs": 4,
        "minibatches": 2,
        "beta": {"adaptive": {"start": 1.0, "kl": 0.05, "factor": 0.5}},
    },
    NPG: {"critic_lr": 0.02, "critic_epochs": 4, "critic_minibatches": 2, "max_kl": 0.05},
    TRPO: {"critic_lr": 0.02, "critic_epochs": 4, "critic_minibatches": 2, "max_kl": 0.05},
}


@pytest.mark.parametrize("cls", mostly_long(ALL, Reinforce, PPO, NPG))
@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p[0])
def test_probes_are_solved(cls: type[Algorithm], probe: tuple[str, Any, bool]) -> None:
    name, pays, blank = probe
    env = Probe(32, pays, blank=blank)
    algorithm = build(cls, env, standardize=False, scale=False, **FAST[cls])
    rollouts = collector(algorithm, env, 8)
    for _ in range(45 if cls is A2C else 30):
        algorithm.iterate(rollouts)
    rollout = rollouts.collect(algorithm.policy)
    value = algorithm.critic(rollout)[0].detach()
    best = {"action": 0.9, "observation": 0.9}[name.split()[-1]] if "action" in name else None
    if best is not None:
        assert float(rollout.reward[0].mean()) > best
    elif "observation" in name:
        assert torch.allclose(value, rollout.obs[0, :, 0], atol=0.1)
    else:
        assert torch.allclose(value, torch.ones_like(value), atol=0.1)


@pytest.mark.parametrize(
    "estimator", [GAE(), TDLambda(), NStep(n_steps=1), MonteCarlo(), VTrace()], ids=lambda e: type(e)
)
def test_value_flows_back_one_step_at_the_discount(estimator: Any) -> None:
    env = TwoSteps(16)
    algorithm = build(
        A2C, env, estimator=estimator, gamma=0.5, lr={"linear": [0.02, 0]}, optim="adam", standardize=False, scale=False
    )
    rollouts = StepCollector(env, 8)
    for i in range(150):
        algorithm.update_schedules(i / 150)
        algorithm.iterate(rollouts)
    values = value(algorithm.critic, torch.tensor([[0.0], [1.0]]))
    assert torch.allclose(values, torch.tensor([0.5, 1.0]), atol=0.03)


class QuadraticCritic(Critic):
    """V = w x^2 + b, which holds the regulator's value exactly."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__(Standardize(LQR(1).observation_space, enabled=False), hidden=(), generator=generator)

    def prediction(self, features: Tensor) -> Tensor:
        return super().prediction(features.square())


@pytest.mark.parametrize("cls", mostly_long([A2C, PPO, NPG, TRPO], PPO, TRPO))
def test_the_linear_quadratic_regulator_is_found(cls: type[Algorithm]) -> None:
    """At discount .9, u = -K x with K = .58840335, whatever noise is added; K once it has settled."""
    env = LQR(256, max_episode_steps=10)
    natural: dict[str, Any] = {"max_kl": 3e-3, "critic_lr": {"linear": [0.02, 0]}, "critic_epochs": 4}
    first_order: dict[Any, Any] = {
        A2C: {"lr": {"linear": [0.05, 0]}, "optim": "adam"},
        PPO: {"lr": {"linear": [0.01, 0]}, "epochs": 2},
    }
    options = first_order.get(cls, natural)
    generator = torch.Generator().manual_seed(0)
    policy = Policy(Standardize(env.observation_space, enabled=False), env.action_space, hidden=(), generator=generator)
    algorithm: Any = cls(
        policy=policy,
        critic=QuadraticCritic(generator),  # pyright: ignore[reportCallIssue]
        generator=generator,
        gamma=0.9,
        **options,
    )
    rollouts, gains = StepCollector(env, 10), []
    for i in range(100):
        algorithm.update_schedules(i / 100)
        algorithm.iterate(rollouts)
        gains.append(-float(policy.out.weight.detach()))
    assert sum(gains[50:]) / 50 == pytest.approx(0.58840335, abs=0.06)


@pytest.mark.parametrize("gain", [0.4, 0.58840335, 0.75])
def test_the_gradient_on_the_regulator_is_the_closed_form(gain: float) -> None:
    """With V = -P x^2 - c exact, dJ/dw for u = w x is E[x^2] (2 K - 2 gamma P (1 - K)), w = -K; zero at the optimum.
    Five standard errors over environments, seeded."""
    env, gamma = LQR(100_000, max_episode_steps=100), 0.9
    cost = (1 + gain**2) / (1 - gamma * (1 - gain) ** 2)
    generator = torch.Generator().manual_seed(1)
    policy = Policy(
        Standardize(env.observation_space, enabled=False),
        env.action_space,
        hidden=(),
        log_sigma=-1.5,
        generator=generator,
    )
    critic = QuadraticCritic(generator)
    noise = math.exp(-3.0) * (1 + gamma * cost) / (1 - gamma)
    (weight, bias), (curvature, constant) = policy.out.parameters(), critic.out.parameters()
    with torch.no_grad():
        for p, value in ((weight, -gain), (bias, 0.0), (curvature, -cost), (constant, -noise)):
            p.fill_(value)
    algorithm = A2C(policy=policy, critic=critic, gamma=gamma, normalize_advantage="none")
    batch = first_batch(algorithm, env, 4)
    x, sigma = batch.obs.squeeze(-1), math.exp(-1.5)
    score = (batch.action.squeeze(-1) + gain * x) / sigma**2 * x
    samples = (score * batch.advantage).mean(0)
    exact = float((x**2).mean()) * (2 * gain - 2 * gamma * cost * (1 - gain))
    loss = algorithm.loss(batch)[0]
    assert float(-torch.autograd.grad(loss, weight)[0]) == pytest.approx(float(samples.mean()), rel=1e-3)
    assert float(samples.mean()) == pytest.approx(exact, abs=5 * float(samples.std()) / env.num_envs**0.5)


def test_the_frozen_lake_is_crossed_nearly_as_well_as_can_be() -> None:
    env = FrozenLake(128)
    assert env.best() == pytest.approx(0.74419029, abs=1e-8)
    algorithm = build(PPO, env, hidden=(), standardize=False, lr={"linear": [0.03, 0]}, epochs=4, entropy_coef=0.003)
    rollouts, ended = StepCollector(env, 32), []
    for i in range(100):
        algorithm.update_schedules(i / 100)
        algorithm.iterate(rollouts)
        rollout = rollouts.buffer.read()
        ended.append((rollout.reward[rollout.done].sum(), rollout.done.sum()))
    wins, ends = (sum(float(x[k]) for x in ended[-40:]) for k in (0, 1))
    assert 0.68 < wins / ends < 0.78


# State, seeds and processes


def test_streams_of_one_seed_owe_nothing_to_one_another() -> None:
    """The same number in two bare generators draws the same bits; correlations to five standard errors."""
    count = 100_000
    draws = [
        torch.empty(count).normal_(generator=seeding.generator(0, stream))
        for stream in ("environment", "acting", "minibatches", "acting")
    ]
    assert torch.equal(draws[1], draws[3])
    correlation = torch.corrcoef(torch.stack(draws[:3])).triu(diagonal=1)
    assert float(correlation.abs().max()) < 5 / math.sqrt(count)


@dataclass(kw_only=True, eq=False)
class Twins(PPO):
    """Holds critics in a list, and more in a dictionary and a tuple."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.twins = [copy.deepcopy(self.critic), self.critic]
        self.more = {
            "optimizers": (Adam([self.twins[0].own], 1e-3),),
            "generator": torch.Generator().manual_seed(3),
            "modules": nn.ModuleList([copy.deepcopy(self.critic)]),
        }


def test_parts_in_lists_and_dictionaries_are_saved_restored_checked_and_counted() -> None:
    env = PointMass(4)
    one, two = build(Twins, env), build(Twins, env, seed=1)
    assert len(one.critics) == 3 and one.critics.count(one.critic) == 1
    assert len(one.optimizers) == 2
    one.slow_down()
    assert float(one.more["optimizers"][0].lr_scale) == 0.5
    state = copy.deepcopy(one.state_dict())
    assert {"twins.0", "more.optimizers.0", "more.generator", "more.modules"} <= state.keys() and "twins.1" not in state
    two.more["generator"].manual_seed(4)
    two.load_state_dict(state)
    assert two.more["generator"].initial_seed() == one.more["generator"].initial_seed()
    for a, b in zip(one.critics, two.critics, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert bool(one.finite())
    next(one.twins[0].parameters()).data.view(-1)[0] = torch.nan
    assert not bool(one.finite())


def test_a2c_tells_what_its_step_did() -> None:
    """The improvement of the mean of ratio x advantage, and the KL from the acting policy, as estimated by hand."""
    env = PointMass(16)
    algorithm = build(A2C, env, lr=3e-3)
    batch = first_batch(algorithm, env)
    metrics = algorithm.update(batch)
    with torch.no_grad():
        ratio = (algorithm.policy.dist(batch).log_prob(batch.action) - batch.logp).exp()
    improvement = ((ratio - 1) * batch.advantage)[batch.mask].mean()
    assert float(metrics["surrogate_improvement"]) == pytest.approx(float(improvement), rel=1e-3) and improvement > 1e-3
    kl = (ratio - 1 - ratio.log())[batch.mask].mean()
    assert float(metrics["kl"]) == pytest.approx(float(kl), rel=1e-2) and kl > 1e-4
    assert "policy_loss" not in metrics


@pytest.mark.parametrize("cls", [NPG, TRPO])
def test_a_run_that_is_slowed_down_takes_half_the_natural_step(cls: type[NPG]) -> None:
    env, lengths = PointMass(16), []
    for times in range(2):
        algorithm = build(cls, env)
        batch = first_batch(algorithm, env)
        for _ in range(times):
            algorithm.slow_down()
        env = PointMass(16)
        lengths.append(float(algorithm.update_policy(batch)["step_norm"]))
        names = [name for name in algorithm.metrics(batch) if "learning_rate" in name]
        assert names == ["critic_learning_rate"]
    assert lengths[1] == pytest.approx(lengths[0] / 2, rel=1e-3)
