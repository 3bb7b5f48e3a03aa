"""Mirror symmetries: exact tables of tasks, training on mirrored rollouts, and the mirror loss."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from test_cli import Cli, command  # noqa: F401
from toys import PointMass, build, collector, mostly_long, resume_alike

from pgsuite import seeding
from pgsuite.algorithms import A2C, NPG, PPO, SPO, TRPO, VMPO, Algorithm, PPOPenalty, Reinforce
from pgsuite.algorithms.symmetry import Symmetry
from pgsuite.envs import make
from pgsuite.envs.mirrors import SignedPermutation, Table
from pgsuite.envs.tasks import classic, mujoco
from pgsuite.envs.tasks.base import Signed

# The signed permutations of positions and velocities; of Robots, their own.
STATES: dict[Any, tuple[Signed, Signed] | None] = {
    mujoco.Ant: None,
    mujoco.Walker2d: None,
    mujoco.Swimmer: None,
    mujoco.Reacher: ((-1, -2, 3, -4), (-1, -2, 3, -4)),
}


def permuted(table: Signed, x: torch.Tensor) -> torch.Tensor:
    return SignedPermutation(table, len(table), "table")(x)


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("cls", mostly_long(STATES, mujoco.Ant))
def test_a_mirrored_state_and_action_give_the_mirrored_next_state(double: None, cls: Any) -> None:
    """To 1e-9 after each of forty steps, over which the states are those of random actions, contacts included."""
    one, two = cast(Any, [make(cls(), 8, dtype=torch.float64, seed=0) for _ in range(2)])
    qpos, qvel = STATES[cls] or cls.mirrors[:2]
    table = Table(one.observation_space, one.action_space, **{k: list(x) for k, x in one.task.mirror._asdict().items()})
    one.reset()
    two.reset()
    stream = torch.Generator().manual_seed(1)
    everywhere = torch.ones(8, dtype=torch.bool)
    for _ in range(40):
        p = one.task.physics
        p.set_state(everywhere, p.qpos.clone(), p.qvel.clone())  # with nothing left of the steps before
        two.task.physics.set_state(everywhere, permuted(qpos, p.qpos), permuted(qvel, p.qvel))
        low, high = (torch.as_tensor(x).double() for x in (one.action_space.low, one.action_space.high))
        action = low + (high - low) * torch.rand(8, len(low), generator=stream)
        step, image = one.step(action), two.step(table.action(action))
        assert torch.equal(step.terminated, image.terminated)
        assert (table.observation(step.next_obs) - image.next_obs).abs().max() < 1e-9
        assert (step.reward - image.reward).abs().max() < 1e-9


@pytest.mark.parametrize("cls", mostly_long([classic.CartPole, classic.Pendulum, classic.Acrobot], classic.CartPole))
def test_classic_tasks_are_symmetric(double: None, cls: Any) -> None:
    one, two = cast(Any, [make(cls(), 64, dtype=torch.float64, seed=0) for _ in range(2)])
    table = Table(one.observation_space, one.action_space, **{k: list(x) for k, x in one.task.mirror._asdict().items()})
    one.reset()
    two.reset()
    stream = torch.Generator().manual_seed(1)
    for _ in range(40):
        two.task.state.copy_(-one.task.state)
        action = torch.rand(64, 1, generator=stream) * 4 - 2
        if cls is not classic.Pendulum:
            action = (action.squeeze(-1) > 0).long() * (1 if cls is classic.CartPole else 2)
        step, image = one.step(action), two.step(table.action(action))
        assert torch.equal(step.terminated, image.terminated) and torch.allclose(step.reward, image.reward, atol=1e-12)
        assert torch.allclose(table.observation(step.next_obs), image.next_obs, atol=1e-12)


# Its mirror image is a half turn, so symmetric policies are odd, as networks with tanh and without biases are.
ODD = {"observation": [-1, -2, -3, -4], "action": [-1, -2]}


def symmetry(env: Any, *, augment: bool = True, coef: float = 0.0, bodies: Any = ()) -> Symmetry:
    mirror = Table(env.observation_space, env.action_space, **ODD)
    return Symmetry(mirror, env.action_space, augment=augment, coef=coef, bodies=bodies, num_envs=env.num_envs)


# Adam as usual would make steps of the rounding errors of gradients that are zero.
LARGE_EPS = {"optim": {"_target_": "adam", "eps": 1.0}, "lr": 0.01}
METHODS: dict[type[Algorithm], dict[str, Any]] = {
    Reinforce: LARGE_EPS,
    A2C: LARGE_EPS,
    **{cls: LARGE_EPS | {"epochs": 2, "minibatches": 1} for cls in (PPO, PPOPenalty, SPO, VMPO)},
    **{cls: {"critic_epochs": 2, "critic_minibatches": 2} for cls in (NPG, TRPO)},
}


def asymmetry(algorithm: Any) -> float:
    """The largest |mode(x) + mode(-x)| over random observations."""
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    start = torch.ones(50, dtype=torch.bool)
    modes = [algorithm.policy.choose(y, {}, start, lambda d: d.mode()).action for y in (x, -x)]
    return float((modes[0] + modes[1]).detach().abs().max())


@pytest.mark.parametrize("cls", mostly_long(METHODS, PPO, TRPO))
def test_a_symmetric_policy_stays_symmetric_on_mirrored_rollouts_and_on_no_others(
    double: None, cls: type[Algorithm]
) -> None:
    for augment in (True, False):
        env = PointMass(8)
        algorithm = build(cls, env, **METHODS[cls], symmetry=symmetry(env) if augment else None)
        assert asymmetry(algorithm) < 1e-15
        rollouts = collector(algorithm, env, 10)
        for _ in range(3):
            algorithm.iterate(rollouts)
        assert algorithm.finite() and (asymmetry(algorithm) < 1e-12) == augment


def test_importance_ratios_begin_at_one_and_weights_are_those_of_where_the_actions_were_drawn(double: None) -> None:
    """Also in later epochs, when the policy has moved: for a policy that is not symmetric."""
    env = PointMass(8)
    algorithm = build(PPO, env, symmetry=symmetry(env), recompute_advantage=True, reward_scale=None, epochs=2)
    with torch.no_grad():
        algorithm.policy.out.bias.add_(torch.tensor([0.5, -0.3]))
    rollout = collector(algorithm, env, 10).collect(algorithm.policy)
    logp = algorithm.policy.dist(rollout).log_prob(rollout.action).detach()
    prepared = algorithm.preprocess(rollout)
    one = algorithm.compute_advantages(prepared)
    assert torch.equal(one.obs, torch.cat([rollout.obs, -rollout.obs], 1))
    assert torch.equal(one.action, torch.cat([rollout.action, -rollout.action], 1))
    ratio = (algorithm.policy.dist(one).log_prob(one.action) - one.logp).exp()
    assert torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-12)
    weight = one.extra["weight"]
    assert torch.equal(weight[:, :8], torch.ones(10, 8)) and set(one.extra) == {"weight"}
    assert torch.allclose(weight[:, 8:], (one.logp[:, 8:] - logp).exp().clamp(max=1.0)) and weight.min() < 0.9
    for name in ("advantage", "target", "value"):
        assert torch.equal(getattr(one, name)[:, :8], getattr(one, name)[:, 8:])
    with torch.no_grad():
        algorithm.policy.out.bias.add_(0.2)
    later = algorithm.compute_advantages(prepared)
    assert torch.equal(later.logp, one.logp) and torch.equal(later.extra["weight"], weight)


def test_weights_make_the_mirrored_actions_an_estimate_of_the_policys_own(double: None) -> None:
    """Of two actions: the sum over what the mirrored policy draws, weighted, is that over what the policy draws."""
    env: Any = make(classic.CartPole(), 4, seed=0, dtype=torch.float64)
    tables = {key: list(x) for key, x in env.task.mirror._asdict().items()}
    both = Symmetry(Table(env.observation_space, env.action_space, **tables), env.action_space, augment=True, coef=0.0)
    algorithm = build(A2C, env, symmetry=both, normalize_advantage="none", scale=False)
    with torch.no_grad():
        algorithm.policy.out.bias.copy_(torch.tensor([0.7, -0.7]))
    rollout = collector(algorithm, env, 6).collect(algorithm.policy)
    seen = []
    for action in (0, 1):  # every action once, with the probability of drawing it
        own = torch.full_like(rollout.action, action)
        logp = algorithm.policy.dist(rollout).log_prob(own).detach()
        one = algorithm.compute_advantages(algorithm.preprocess(replace(rollout, action=own, logp=logp)))
        image = one[:, 4:]
        assert torch.equal(image.action, 1 - own)
        untruncated = (image.logp - logp).exp()
        assert torch.allclose(image.extra["weight"], untruncated.clamp(max=1.0))
        seen.append((logp.exp() * untruncated, image.logp.exp()))
    for drawn, own in seen:
        assert torch.allclose(drawn, own)


@pytest.mark.parametrize("cls", mostly_long([PPO, TRPO, Reinforce], TRPO))
def test_the_mirror_loss_is_the_squared_distance_and_makes_a_policy_symmetric(
    double: None, cls: type[Algorithm]
) -> None:
    env = PointMass(8)
    algorithms = [
        build(cls, env, **METHODS[cls], symmetry=symmetry(env, augment=False, coef=coef)) for coef in (1e-12, 30.0)
    ]
    found = []
    for algorithm in algorithms:
        with torch.no_grad():
            algorithm.policy.out.bias.add_(torch.tensor([0.5, -0.3]))
        rollouts = collector(algorithm, env, 20)
        rollout = rollouts.collect(algorithm.policy)
        penalty = algorithm.symmetry.penalty(algorithm.policy, rollout)
        modes = [algorithm.policy.dist(replace(rollout, obs=sign * rollout.obs)).mode() for sign in (1, -1)]
        assert torch.allclose(penalty, algorithm.symmetry.coef * (modes[0] + modes[1]).square().sum(-1))
        before = asymmetry(algorithm)
        for _ in range(5):
            algorithm.iterate(rollouts)
        found.append(asymmetry(algorithm) / before)
    assert found[1] < 0.95 and found[1] < found[0]


def remembering(cls: type[Algorithm], env: Any, recurrent: Any = "gru", *, own: bool = True, **options: Any) -> Any:
    """A method whose policy remembers, and, if ``own``, its critic as well, on mirrored rollouts."""
    look = {"recurrent": recurrent, "recurrent_size": 16, "generator": seeding.generator(0, "networks")}
    algorithm = build(cls, env, look=look, recurrent=recurrent if own else "none", **options)
    with torch.no_grad():
        algorithm.policy.out.weight.mul_(30)  # what is remembered matters to the actions
    bodies = [x.body for x in (algorithm.policy, getattr(algorithm, "critic", None)) if x is not None]
    algorithm.symmetry = symmetry(env, bodies=bodies)
    return algorithm


MEMORIES = ["gru", "lstm", {"_target_": "transformer", "window": 6}]


@pytest.mark.parametrize("recurrent", mostly_long(MEMORIES, MEMORIES[0]))
def test_memories_of_mirrored_episodes_are_those_of_having_lived_through_them(double: None, recurrent: Any) -> None:
    """Over three rollouts, with episodes that end within them: step by step from the first mirrored observation on."""
    env = PointMass(8, max_episode_steps=7)
    algorithm = remembering(PPO, env, recurrent, standardize=False)
    rollouts, policy, critic = collector(algorithm, env, 10), algorithm.policy, algorithm.critic
    states = {x.name: x.initial_state(8) for x in (policy.body, critic.body)}
    for _ in range(3):
        rollout = rollouts.collect(policy)
        prepared = algorithm.preprocess(rollout)
        batch = algorithm.compute_advantages(prepared)
        logp, values = [], []
        for t in range(10):
            features = []
            for body in (policy.body, critic.body):
                found, states[body.name] = body.step(-rollout.obs[t], states[body.name], rollout.start[t])
                features.append(found)
            logp.append(policy.distribution(features[0], -rollout.obs[t]).log_prob(-rollout.action[t]))
            values.append(critic.read(features[1]))
        assert torch.allclose(batch.logp[:, 8:], torch.stack(logp), atol=1e-10)
        assert torch.allclose(policy.dist(batch).log_prob(batch.action)[:, 8:], torch.stack(logp), atol=1e-10)
        assert torch.allclose(critic(batch)[:, 8:], torch.stack(values), atol=1e-10)
        assert torch.allclose(batch.logp[:, :8], rollout.logp, atol=1e-10)
        assert not torch.allclose(batch.logp[:, 8:], rollout.logp, atol=1e-3)
        algorithm.update_statistics(rollout)


@pytest.mark.parametrize("own", mostly_long([True, False], True))
@pytest.mark.parametrize("cls", mostly_long(METHODS, PPO))
def test_every_method_trains_on_what_is_remembered_and_resumes_exactly(cls: type[Algorithm], own: bool) -> None:
    pairs = []
    for seed in (0, 1):
        env = PointMass(8, max_episode_steps=7)
        algorithm = remembering(cls, env, own=own, seed=seed, **METHODS[cls])
        algorithm.symmetry.coef = 0.1
        pairs.append((algorithm, collector(algorithm, env, 10, seed=seed)))
    (algorithm, rollouts), _ = pairs
    algorithm.iterate(rollouts)
    memory = algorithm.symmetry.memory["policy"].hidden_state
    assert memory.abs().max() > 0 and algorithm.finite()
    assert any(name.endswith("hidden_state") for name in algorithm.state_dict()["symmetry"])
    resume_alike(*pairs)


def test_a_memory_whose_mirror_image_is_not_kept_is_refused() -> None:
    env = PointMass(8)
    algorithm = remembering(PPO, env)
    algorithm.validate(collector(algorithm, env))
    algorithm.symmetry = symmetry(env, bodies=[algorithm.policy.body])
    with pytest.raises(ValueError, match="for the critic"):
        algorithm.validate(collector(algorithm, env))


WRONG = [
    (["env=HalfCheetah", "symmetry.augment=true"], "HalfCheetah-v5 has no known mirror symmetry"),
    (["env=CartPole", "symmetry.coef=1"], "symmetry.coef is for a Box of actions"),
    (["env=SafetyAntVelocity", "algo=cpo", "algo.cost_limit=1", "symmetry.coef=1"], "takes no mirror loss"),
    (["env=CartPole", "symmetry.mirror=task"], "would have no effect with symmetry.augment=false"),
    (["env=Ant", "env.xml_file=hopper.xml", "symmetry.augment=true"], "has no known"),
    (
        ["env=Pendulum", "symmetry.coef=1", "symmetry.mirror={_target_: table, observation: [1, 2], action: [-1]}"],
        "symmetry.mirror.observation must have each of 1 to 3 once",
    ),
    (
        ["env=Pendulum", "symmetry.coef=1", "symmetry.mirror={_target_: table, observation: [2, 3, 1], action: [1]}"],
        "must be its own inverse",
    ),
]


@pytest.mark.parametrize(("given", "message"), mostly_long(WRONG, WRONG[-1]))
def test_what_does_not_fit_is_refused_by_name(command: Cli, given: list[str], message: str) -> None:  # noqa: F811
    code, _, err = command("train", *given)
    assert code == 1 and message in err and "Traceback" not in err, err


@pytest.mark.parametrize("more", [[], ["execution=compile"], ["seeds=2"]])
@pytest.mark.long
def test_runs_train_on_the_symmetry_of_their_task(command: Cli, more: list[str]) -> None:  # noqa: F811
    small = ["num_envs=4", "total_steps=512", "horizon=32", "symmetry.augment=true", *more]
    for algo, env, coef, memory in (
        ("trpo", "Pendulum", 1.0, "none"),
        ("ppo", "CartPole", 0.0, "none"),
        ("trpo", "Pendulum", 0.1, "gru"),
    ):
        given = [f"algo={algo}", f"env={env}", "~tuned", f"symmetry.coef={coef}", f"policy.recurrent={memory}"]
        code, _, err = command("train", *given, *small)
        assert code == 0, err
