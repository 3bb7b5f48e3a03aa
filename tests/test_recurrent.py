"""Each test is one claim about memory, of policies and of critics, and about bodies that they share."""

import contextlib
import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from gymnasium import spaces
from test_algorithms import flat
from torch import Tensor
from toys import ALL, BRIEF, PointMass, Toy, build, collector, mostly_long

from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, PPOPenalty, Reinforce
from pgsuite.functional import trust_region as tr
from pgsuite.nn.policy import Critic
from pgsuite.nn.recurrent import GRU, LSTM, RECURRENCES, Recurrence
from pgsuite.rollout import StepCollector, minibatches
from pgsuite.training.trainer import Trainer
from pgsuite.transfer import as_on_accelerator

KINDS: list[Any] = ["gru", "lstm"]
WINDOW: Any = {"_target_": "transformer", "window": 5, "layers": 2}
MEMORIES: list[Any] = [*KINDS, pytest.param(WINDOW, id="transformer", marks=pytest.mark.long)]


class Recall(Toy):
    """A cue of -1 or 1 is shown once; ``delay`` blank steps later, and only then, repeating it pays one, and not one.

    Whoever has forgotten the cue is right half of the time: mean return zero.
    """

    obs_size = 2

    def __init__(self, num_envs: int, delay: int = 4, seed: int = 0) -> None:
        self.delay = delay
        super().__init__(num_envs, delay + 1, seed)
        self.cue = self.state[:, 0].clone()

    def fresh(self) -> Tensor:
        cue = 2.0 * torch.randint(2, (self.num_envs,), generator=self.generator) - 1
        return torch.stack([cue, torch.zeros_like(cue)], -1)

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shown = self.state[:, 0]
        self.cue = torch.where(shown != 0, shown, self.cue)
        last = self.clock == self.delay
        reward = torch.where(last, (2 * action - 1) * self.cue, 0.0)
        following = torch.stack([torch.zeros_like(shown), (self.clock + 1 == self.delay).float()], -1)
        return following, reward, last


def remembering(cls: type[Algorithm], env: Any, kind: Any = "gru", **fields: Any) -> Any:
    return build(cls, env, look={"recurrent": kind, "recurrent_size": 16}, recurrent=kind, **BRIEF[cls] | fields)


@pytest.mark.parametrize(("ours", "theirs"), [(GRU, torch.nn.GRUCell), (LSTM, torch.nn.LSTMCell)])
def test_recurrences_are_torchs_own_and_forget_where_episodes_start(ours: type[Recurrence], theirs: Any) -> None:
    mine, cell = ours(3, 5).double(), theirs(3, 5).double()
    with torch.no_grad():
        for layer, (weight, bias) in ((mine.read, ("weight_ih", "bias_ih")), (mine.recall, ("weight_hh", "bias_hh"))):
            getattr(cell, weight).copy_(layer.weight)
            layer.bias.normal_()
            getattr(cell, bias).copy_(layer.bias)
    x, start = torch.randn(9, 4, 3, dtype=torch.float64), torch.rand(9, 4) < 0.3
    hidden_state = first = torch.randn(4, mine.width, dtype=torch.float64)
    expected = []
    for t in range(9):
        hidden_state = hidden_state * ~start[t].unsqueeze(-1)
        after = cell(x[t], hidden_state if ours is GRU else tuple(hidden_state.chunk(2, -1)))
        hidden_state = after if ours is GRU else torch.cat(after, -1)
        expected.append(hidden_state)
    for where in (contextlib.nullcontext, as_on_accelerator):
        with where():
            out, memories = mine(x, first, start)
        assert torch.allclose(memories, torch.stack(expected)) and torch.equal(out, memories[..., :5])


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_poisoned_memory_is_forgotten_too(horizon: int) -> None:
    net, start = GRU(3, 5), torch.zeros(horizon, 2, dtype=torch.bool)
    start[0] = True
    hidden_state = torch.full((2, 5), torch.nan, requires_grad=True)
    out, _ = net(torch.randn(horizon, 2, 3), hidden_state, start)
    gradients = torch.autograd.grad(out.sum(), [*net.parameters(), hidden_state])
    assert out.isfinite().all() and all(x.isfinite().all() for x in gradients)


@dataclass
class Given:
    """A recurrent layer with inputs of float64, and which of its steps begin episodes."""

    net: Recurrence
    x: Tensor
    hidden_state: Tensor
    start: Tensor

    @classmethod
    def make(cls, kind: Any, horizon: int, columns: int, chance: float) -> "Given":
        torch.manual_seed(0)
        net = RECURRENCES[kind](3, 4).double()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.7)
        x, hidden_state = (torch.randn(*n, dtype=torch.float64) for n in ((horizon, columns, 3), (columns, net.width)))
        start = torch.rand(horizon, columns) < chance
        return cls(net, x.requires_grad_(), hidden_state.requires_grad_(), start)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, self.hidden_state, *self.net.parameters()]

    def states(self, x: Tensor, hidden_state: Tensor, *params: Tensor) -> Tensor:
        named = dict(zip(dict(self.net.named_parameters()), params, strict=True))
        return torch.func.functional_call(self.net, named, (x, hidden_state, self.start))[1]


@pytest.mark.parametrize(
    ("horizon", "columns", "chance"), [(9, 4, 0.3), (5, 3, 0.0), (5, 3, 1.0), (1, 3, 0.5), (7, 1, 0.2)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_stretches_side_by_side_are_steps_one_after_the_other(
    kind: Any, horizon: int, columns: int, chance: float
) -> None:
    """In their states, and in the first and second derivatives by inputs, initial states and parameters."""
    given = Given.make(kind, horizon, columns, chance)

    def derivatives() -> list[Tensor]:
        states = given.states(*given.inputs)
        torch.manual_seed(1)
        cotangent = torch.randn_like(states)
        first = torch.autograd.grad(states, given.inputs, cotangent, retain_graph=True)
        slopes = torch.autograd.grad(states, given.inputs, cotangent, create_graph=True)
        along = torch.stack([(x * torch.randn_like(x)).sum() for x in slopes]).sum()
        second = torch.autograd.grad(along, given.inputs, materialize_grads=True)
        return [states, *first, *slopes, *second]

    found = derivatives()
    with as_on_accelerator():
        expected = derivatives()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_recurrences_are_those_of_finite_differences(kind: Any) -> None:
    given = Given.make(kind, 4, 2, 0.4)
    assert torch.autograd.gradcheck(given.states, given.inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(given.states, given.inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_recurrences_are_mapped_over_parameters_and_over_starts(kind: Any) -> None:
    given = Given.make(kind, 6, 2, 0.3)
    params = [torch.stack([p, 2 * p]).detach() for p in given.net.parameters()]
    both = partial(given.states, given.x, given.hidden_state)
    mapped = torch.vmap(both)(*params)
    assert torch.allclose(mapped, torch.stack([both(*(p[i] for p in params)) for i in range(2)]))

    def total(*params: Tensor) -> Tensor:
        return both(*params).square().sum()

    slope: Any = torch.func.grad(total)
    assert torch.allclose(torch.vmap(slope)(*params)[1], slope(*(p[1] for p in params)))
    starts = torch.rand(3, 6, 2) < 0.5
    mapped = torch.vmap(lambda start: given.net(given.x, given.hidden_state, start)[1])(starts)
    assert torch.allclose(mapped, torch.stack([given.net(given.x, given.hidden_state, x)[1] for x in starts]))


class Leaky(GRU):
    def step(self, drive: Tensor, hidden_state: Tensor) -> Tensor:
        return 0.5 * super().step(drive, hidden_state)


class Damped(LSTM):
    @staticmethod
    def cell(drive: Tensor, recalled: Tensor, hidden_state: Tensor) -> Tensor:
        return 0.5 * LSTM.cell(drive, recalled, hidden_state)


@pytest.mark.parametrize("cls", [Leaky, Damped])
def test_a_recurrence_derived_from_another_steps_as_it_says(cls: type[Recurrence]) -> None:
    net, start = cls(3, 4), torch.zeros(3, 2, dtype=torch.bool)
    x, hidden_state = torch.randn(3, 2, 3), torch.randn(2, net.width)
    states = net(x, hidden_state, start)[1]
    with as_on_accelerator():
        assert torch.allclose(states, net(x, hidden_state, start)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_units_keep_what_they_hold_for_up_to_a_span(kind: Any) -> None:
    """Without input, a state fades as slowly as the second gate's bias has it."""
    cls: Any = RECURRENCES[kind]
    net = cls(3, 500, torch.Generator().manual_seed(0), span=50)
    steps = 1 / (1 - net.read.bias[500:1000].sigmoid())
    assert 2 <= steps.min() < 3 and 48 < steps.max() <= 50 and float(steps.mean()) == pytest.approx(26, abs=2)


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("cls", ALL)
def test_a_policy_that_remembers_learns_as_it_acted(cls: type[Algorithm], kind: Any) -> None:
    """The ratio is one before the first step of every iteration, though episodes end and rollouts cut them."""
    env = PointMass(8, max_episode_steps=13)
    algorithm = remembering(cls, env, kind)
    rollouts = collector(algorithm, env)
    for _ in range(3):
        rollout = rollouts.collect(algorithm.policy)
        with torch.no_grad():
            ratio = (algorithm.policy.dist(rollout).log_prob(rollout.action) - rollout.logp).exp()
            blind = algorithm.policy.dist(replace(rollout, start=torch.ones_like(rollout.start)))
        assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-5)
        assert not torch.allclose(blind.log_prob(rollout.action), rollout.logp, atol=1e-5)
        algorithm.iterate(rollouts)


@pytest.mark.parametrize("kind", MEMORIES)
def test_what_a_critic_says_is_what_it_would_have_said_step_by_step(kind: Any) -> None:
    """Values, and those of true successors before any restart, with a memory that outlasts rollouts."""
    env = PointMass(6, max_episode_steps=7)
    algorithm = remembering(A2C, env, kind)
    critic, rollouts = algorithm.critic, StepCollector(env, 10)
    hidden_state = critic.body.initial_state(6)
    for _ in range(3):
        rollout = rollouts.collect(algorithm.policy)
        seen = critic.attach_critic_state(rollout)
        value, next_value = critic.values_and_next_values(seen)
        with as_on_accelerator():
            plainly = critic.values_and_next_values(seen)
        for found, again in zip(plainly, (value, next_value), strict=True):
            assert torch.allclose(found, again, atol=1e-6)  # no episode ends in a terminal state here
        for t in range(10):
            features, hidden_state = critic.body.step(rollout.obs[t], hidden_state, rollout.start[t])
            assert torch.allclose(critic.read(features), value[t], atol=1e-6)
            following, _ = critic.body.step(rollout.next_obs[t], hidden_state, torch.zeros(6, dtype=torch.bool))
            assert torch.allclose(critic.read(following), next_value[t], atol=1e-6)
        going = ~rollout.done[:-1]
        assert torch.allclose(next_value[:-1][going], value[1:][going], atol=1e-6)
        assert rollout.truncated.any() and not torch.allclose(next_value[:-1][~going], value[1:][~going], atol=1e-3)
        critic.update_statistics(rollout)


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("cls", [A2C, PPO, NPG])
def test_minibatches_of_sequences_are_whole_columns(cls: type[Algorithm], kind: Any) -> None:
    """Each part's log-probabilities and values are those that the same columns have in the whole."""
    env = PointMass(8, max_episode_steps=9)
    algorithm = remembering(cls, env, kind)
    rollouts = collector(algorithm, env)
    for _ in range(2):
        algorithm.iterate(rollouts)
    rollout = rollouts.collect(algorithm.policy)
    batch = algorithm.compute_advantages(algorithm.preprocess(rollout))
    for part in minibatches(batch, 4, columns=algorithm.sequential, generator=torch.Generator().manual_seed(0)):
        assert part.logp.shape == (20, 2)
        assert torch.allclose(algorithm.policy.dist(part).log_prob(part.action), part.logp, atol=1e-5)
        assert torch.allclose(algorithm.critic(part), part.value, atol=1e-5)


def test_minibatches_must_divide_the_environments_of_a_policy_that_remembers() -> None:
    env = PointMass(6)
    algorithm = remembering(PPO, env, minibatches=4)
    with pytest.raises(ValueError, match="4 minibatches do not divide a batch of 6"):
        Trainer(algorithm, collector(algorithm, env), 1000)


RATES: dict[Any, dict[str, Any]] = {
    Reinforce: {"lr": 0.02},
    A2C: {"lr": 0.01, "optim": "adam"},
    PPO: {"lr": 5e-3, "epochs": 4, "minibatches": 2},
    PPOPenalty: {"lr": 5e-3, "epochs": 4, "minibatches": 2},
    NPG: {"max_kl": 0.03, "damping": 0.01},
    TRPO: {"max_kl": 0.03, "damping": 0.01},
}


def remembered(cls: type[Algorithm], kind: Any, iterations: int = 120) -> float:
    """Mean return over ten iterations on Recall, the last ones or the first that show it solved."""
    env = Recall(64)
    algorithm = remembering(cls, env, kind, standardize=False, scale=False, gamma=1.0, **RATES[cls])
    rollouts, returns = collector(algorithm, env, 15), []
    for _ in range(iterations):
        algorithm.iterate(rollouts)
        rollout = rollouts.buffer.read()
        returns.append(float(rollout.reward[rollout.done & rollout.mask].mean()))
        if len(returns) >= 10 and sum(returns[-10:]) > 9.2:
            break
    return sum(returns[-10:]) / 10


@pytest.mark.parametrize("cls", mostly_long(ALL, PPO, NPG))
def test_every_method_learns_to_remember(cls: type[Algorithm]) -> None:
    assert remembered(cls, "gru") > 0.9


def test_a_long_memory_learns_it_too() -> None:
    assert remembered(PPO, "lstm") > 0.9


@pytest.mark.long
@pytest.mark.parametrize("cls", ALL)
def test_every_method_learns_to_attend(cls: type[Algorithm]) -> None:
    assert remembered(cls, WINDOW) > 0.9


@pytest.mark.long
def test_a_window_that_is_too_short_is_no_memory_of_it() -> None:
    assert abs(remembered(PPO, {"_target_": "transformer", "window": 3}, 30)) < 0.2


def test_rollouts_keep_the_state_at_their_start_only() -> None:
    """Of which a policy that attends learns as it acted."""
    env = PointMass(8, max_episode_steps=13)
    algorithm = remembering(PPO, env, WINDOW)
    rollouts = collector(algorithm, env)
    rollouts.collect(algorithm.policy)
    for _ in range(2):
        before = rollouts.hidden_state["policy"].clone()
        rollout = rollouts.collect(algorithm.policy)
        with torch.no_grad():
            ratio = (algorithm.policy.dist(rollout).log_prob(rollout.action) - rollout.logp).exp()
        assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-5)
        assert rollout.hidden_state["policy"].shape == (1, 8, algorithm.policy.initial_state(1)["policy"].shape[-1])
        assert before.any() and torch.equal(rollout.hidden_state["policy"][0], before)


@pytest.mark.parametrize("cls", [PPO, TRPO])
def test_without_a_memory_it_cannot_be_learned(cls: type[Algorithm]) -> None:
    assert abs(remembered(cls, "none", 60)) < 0.1


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_trust_region_holds_for_a_policy_that_remembers(kind: Any) -> None:
    env = PointMass(64, max_episode_steps=15)
    algorithm = remembering(TRPO, env, kind)
    rollouts = collector(algorithm, env, 25)
    for _ in range(6):
        metrics = algorithm.iterate(rollouts)
        assert 0 < metrics["kl"] <= algorithm.max_kl and metrics["surrogate_improvement"] > 0


# Bodies that are shared


def sharing(cls: type[Algorithm], env: Any, kind: Any = "none", **fields: Any) -> Any:
    return build(cls, env, look={"recurrent": kind, "recurrent_size": 16}, shared=True, **BRIEF[cls] | fields)


@pytest.mark.parametrize("kind", ["none", *MEMORIES])
@pytest.mark.parametrize("cls", ALL)
def test_a_shared_body_learns_and_only_a_joint_loss_moves_it_for_the_critic(cls: type[Algorithm], kind: Any) -> None:
    env = PointMass(16, max_episode_steps=15)
    options: dict[str, Any] = {"baseline": "critic"} if cls is Reinforce else {}
    algorithm = sharing(cls, env, kind, **options)
    assert algorithm.critic.body is algorithm.policy.body
    rollouts = collector(algorithm, env)
    for _ in range(2):
        assert all(x.isfinite() for x in algorithm.iterate(rollouts).values())
    algorithm = sharing(cls, env, kind, **options)  # with no momentum yet
    batch = algorithm.compute_advantages(algorithm.preprocess(collector(algorithm, env).collect(algorithm.policy)))
    batch = replace(batch, advantage=torch.zeros_like(batch.advantage), target=batch.value + 1)
    before, said = flat(algorithm), algorithm.critic(batch).detach()
    algorithm.update(batch)
    assert torch.equal(before, flat(algorithm)) == (cls not in (A2C, PPO, PPOPenalty))
    assert (algorithm.critic(batch) - said).mean() > 0


@pytest.mark.parametrize("kind", ["none", "gru"])
@pytest.mark.parametrize("cls", [A2C, PPO, PPOPenalty])
def test_a_loss_computes_a_shared_body_once(cls: type[Algorithm], kind: Any) -> None:
    """Its value and gradient are those of two passes; and a critic whose loss has no weight is not computed at all."""
    env = PointMass(16, max_episode_steps=15)
    algorithm = sharing(cls, env, kind)
    batch = algorithm.compute_advantages(algorithm.preprocess(collector(algorithm, env).collect(algorithm.policy)))
    passes: list[Any] = []
    once = algorithm.policy.body.hidden.register_forward_hook(lambda *_: passes.append(_))
    loss, metrics = algorithm.loss(batch)
    assert len(passes) == 1
    once.remove()
    algorithm.critic.body = copy.copy(algorithm.policy.body)  # the same parameters, and another object
    other, _ = algorithm.loss(batch)
    params = [*algorithm.policy.parameters(), *algorithm.critic.out.parameters()]
    both = [torch.autograd.grad(x, params, materialize_grads=True) for x in (loss, other)]
    torch.testing.assert_close((loss, *both[0]), (other, *both[1]), rtol=1e-4, atol=1e-6)

    algorithm.value_coef = 0.0
    algorithm.critic.predict = None
    assert "value_loss" in metrics and "value_loss" not in algorithm.loss(batch)[1]


def test_a_shared_trust_region_is_the_policys_alone() -> None:
    env = PointMass(32, max_episode_steps=15)
    algorithm = sharing(TRPO, env, "gru")
    rollouts = collector(algorithm, env, 25)
    for _ in range(5):
        metrics = algorithm.iterate(rollouts)
        assert 0 < metrics["kl"] <= algorithm.max_kl and metrics["surrogate_improvement"] > 0


def test_what_is_for_the_critic_alone_is_not_shared() -> None:
    env = PointMass(4)
    env.observation_space = spaces.Dict({"obs": spaces.Box(-1, 1, (3,)), "critic_obs": spaces.Box(-1, 1, (2,))})
    with pytest.raises(ValueError, match="would hide critic_obs from the critic"):
        sharing(PPO, env)


def test_the_gradient_flows_back_through_time() -> None:
    """The chance of the last action depends on the first observation, by finite differences."""
    env = PointMass(1, max_episode_steps=50)
    policy = remembering(A2C, env, "lstm").policy.double()
    rollout = StepCollector(env, 6).collect(policy)
    rollout = replace(rollout.map(lambda x: x.double() if x.is_floating_point() else x), action=rollout.action.double())
    params = list(policy.parameters())

    def last() -> Tensor:
        return policy.dist(rollout).log_prob(rollout.action)[-1, 0]

    gradient, start = tr.flat_grad(last(), params), tr.flatten(params).detach()
    direction = torch.randn_like(start)
    ends = []
    for eps in (1e-5, -1e-5):
        tr.assign(params, start + eps * direction)
        ends.append(float(last()))
    assert float(gradient @ direction) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)
    obs = rollout.obs.clone().requires_grad_()
    tr.assign(params, start)
    dist = policy.dist(replace(rollout, obs=obs))
    assert torch.autograd.grad(dist.log_prob(rollout.action)[-1, 0], obs)[0][0].any()


def test_critics_without_a_memory_of_their_own_carry_nothing() -> None:
    env = PointMass(4)
    for critic in (build(A2C, env).critic, sharing(A2C, env, "gru").critic):
        assert isinstance(critic, Critic) and critic.hidden_state.numel() == 0 and not critic.remembers


@pytest.mark.parametrize("kind", ["none", *MEMORIES])
def test_an_exported_policy_takes_its_statistics_and_its_memory_along(kind: Any) -> None:
    """torch.export holds the normalizer, frozen; memory goes in and comes out."""
    env = PointMass(4)
    algorithm = remembering(A2C, env, kind)
    rollouts, policy = collector(algorithm, env), algorithm.policy
    for _ in range(2):
        algorithm.iterate(rollouts)

    class Acting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, obs: Tensor, hidden_state: Any, start: Tensor) -> Any:
            features, hidden_state = self.policy.body.step(obs, hidden_state, start)
            return self.policy.distribution(features, obs).mode(), hidden_state

    seen = (rollouts.obs.clone(), dict(rollouts.hidden_state), rollouts.start.clone())
    exported = torch.export.export(Acting(), seen).module()
    assert any("moments.mean" in name for name, _ in exported.named_buffers())
    expected = policy.act(*seen, deterministic=True)
    action, hidden_state = exported(*seen)
    assert torch.allclose(action, expected.action) and hidden_state.keys() == expected.hidden_state.keys()
    assert all(torch.allclose(hidden_state[name], x) for name, x in expected.hidden_state.items())
    assert not torch.allclose(action, exported(seen[0] + 1, *seen[1:])[0])
