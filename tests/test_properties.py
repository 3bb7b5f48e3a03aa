"""What holds for experience of any shape, episodes of any pattern and spaces of any kind."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from gymnasium import spaces
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import ALL, Toy, build

from pgsuite import seeding
from pgsuite.algorithms import Algorithm
from pgsuite.envs.spaces import tensor_space
from pgsuite.functional import trust_region as tr
from pgsuite.nn.normalize import RunningMoments, Standardize
from pgsuite.nn.policy import Policy
from pgsuite.rollout import minibatches
from pgsuite.types import Batch, Rollout, average, map_obs, masked_mean, masked_means, moments, standardize

SEEDS = st.integers(0, 2**31)
JUNK = st.sampled_from([0.0, 1e30, torch.inf, -torch.inf, torch.nan])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Cells and masks


def cells_of(steps: int, envs: int) -> Batch:
    """A batch in which every field of cell (t, n), and every part of its observation, holds t * N + n."""
    cell = torch.arange(steps * envs).view(steps, envs)
    values: dict[str, Any] = {f.name: cell for f in fields(Batch)}
    values["obs"] = {"a": cell.unsqueeze(-1).expand(-1, -1, 3), "b": {"c": cell, "d": cell[..., None, None]}}
    return Batch(**values)


def parts(x: Any) -> list[Tensor]:
    """The tensors of experience or of an observation."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        return [y for part in x.values() for y in parts(part)]
    return [y for f in fields(x) for y in parts(getattr(x, f.name))]


def holds(part: Batch, cells: Tensor) -> bool:
    """Whether every field holds these cells, and nothing else."""
    return all(
        torch.equal(x, cells.view((*cells.shape, *[1] * (x.ndim - cells.ndim))).expand_as(x)) for x in parts(part)
    )


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), st.booleans(), SEEDS)
def test_minibatches_are_a_partition_of_the_cells(steps: int, envs: int, count: int, columns: bool, seed: int) -> None:
    batch, size = cells_of(steps, envs), envs if columns else steps * envs
    if size % count:
        with pytest.raises(ValueError, match="do not divide"):
            list(minibatches(batch, count, columns=columns, generator=generator(seed)))
        return
    found = list(minibatches(batch, count, columns=columns, generator=generator(seed)))
    assert len(found) == count and len({part.logp.numel() for part in found}) == 1
    assert sorted(torch.cat([part.logp.flatten() for part in found]).tolist()) == list(range(steps * envs))
    for part in found:
        assert holds(part, part.logp)
        assert not columns or torch.equal(part.logp, part.logp[0] + envs * torch.arange(steps).unsqueeze(1))


@given(st.integers(1, 6), st.integers(1, 6), SEEDS)
def test_mapping_and_indexing_act_on_every_part_of_experience(steps: int, envs: int, seed: int) -> None:
    batch, g = cells_of(steps, envs), generator(seed)
    cell = batch.logp
    t, n = (int(torch.randint(size, (), generator=g)) for size in (steps, envs))
    chosen = torch.rand(steps, envs, generator=g) < 0.5
    for index in (t, slice(t, None), (t, n), (slice(None), n), (slice(None), [n, 0]), chosen):
        assert holds(batch[index], cell[index])
    assert holds(batch.map(lambda x: 2 * x + 1), 2 * cell + 1)
    assert holds(batch.map(lambda x: x.flatten(0, 1)), cell.flatten())
    assert len(parts(batch)) == len(fields(Batch)) + 2


@given(st.integers(1, 4), st.integers(1, 6), JUNK, SEEDS)
def test_each_metric_is_averaged_by_itself_over_steps_that_count(
    count: int, steps: int, junk: float, seed: int
) -> None:
    """Whatever the order they come in, and whatever steps that do not count hold."""
    g = generator(seed)
    x, live = torch.randn(steps, count, generator=g), torch.rand(steps, generator=g) < 0.7
    live[0] = True
    names = [f"metric {i}" for i in range(count)]
    rows = [dict(zip(names, row.where(real, junk), strict=True)) for row, real in zip(x, live, strict=True)]
    rows[1:] = [dict(reversed(row.items())) for row in rows[1:]]
    assert list(average(rows, live)) == names
    for i, name in enumerate(names):
        assert float(average(rows, live)[name]) == pytest.approx(float(x[live, i].double().mean()), abs=1e-6)
        counted = [row for row, real in zip(rows, live, strict=True) if real]
        assert float(average(counted)[name]) == pytest.approx(float(x[live, i].double().mean()), abs=1e-6)


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), JUNK, SEEDS)
def test_what_a_masked_cell_holds_is_nobodys_business(
    steps: int, envs: int, real: float, junk: float, seed: int
) -> None:
    g = generator(seed)
    x, mask = torch.randn(steps, envs, generator=g), torch.rand(steps, envs, generator=g) < real
    dirty, seen = x.where(mask, junk), x[mask].double()
    for found, other in zip(moments(x, mask), moments(dirty, mask), strict=True):
        assert torch.equal(found, other)
    assert torch.equal(standardize(x, mask), standardize(dirty, mask))
    assert torch.equal(standardize(dirty, mask)[~mask], torch.zeros(int((~mask).sum())))
    assert torch.equal(masked_means({"a": dirty}, mask)["a"], masked_means({"a": x}, mask)["a"])
    if mask.any():
        assert float(masked_mean(dirty, mask)) == pytest.approx(float(seen.mean()), abs=1e-6)
        assert float(moments(dirty, mask)[1]) == pytest.approx(float(seen.var(correction=0)), abs=1e-5)
    else:
        assert float(masked_mean(dirty, mask)) == 0
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(masked_mean(leaf.where(mask, junk), mask), leaf)
    assert slope.isfinite().all() and not slope[~mask].any()


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(1, 3), st.floats(-100, 100), SEEDS)
def test_running_moments_of_any_split_are_those_of_the_whole(
    sizes: list[int], width: int, offset: float, seed: int
) -> None:
    g = generator(seed)
    x = offset + torch.randn(sum(sizes), width, generator=g)
    mask = torch.rand(sum(sizes), generator=g) < 0.7
    assume(mask.sum() > 1)
    whole, split = RunningMoments((width,)), RunningMoments((width,))
    whole.update(x, mask)
    for part, m in zip(x.split(sizes), mask.split(sizes), strict=True):
        split.update(part.where(m.unsqueeze(-1), torch.nan), m)
    assert torch.allclose(whole.mean, split.mean, rtol=1e-4, atol=1e-4)
    assert torch.allclose(whole.var, split.var, rtol=1e-3, atol=1e-3 + 1e-6 * offset**2)
    assert float(split.count) == pytest.approx(float(mask.sum()), abs=1e-3)


# Spaces

BOXES = st.lists(st.integers(1, 3), max_size=2).map(lambda shape: spaces.Box(-1.0, 1.0, tuple(shape)))
DISCRETE = st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 4), st.integers(-2, 3))
MULTIDISCRETE = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(spaces.MultiDiscrete)
BITS = st.integers(1, 4).map(spaces.MultiBinary)
ACTIONS = st.one_of(
    st.tuples(BOXES, st.sampled_from(["gaussian", "squashed", "beta"])),
    st.tuples(st.one_of(DISCRETE, MULTIDISCRETE, BITS), st.just("auto")),
)
OBSERVATIONS: Any = st.recursive(
    st.one_of(BOXES, DISCRETE, MULTIDISCRETE, BITS),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3).map(spaces.Dict),
    max_leaves=4,
)


def drawn(space: spaces.Space[Any], lead: tuple[int, ...], g: torch.Generator) -> Any:
    """Random observations of a space of tensors."""
    if isinstance(space, spaces.Dict):
        return {key: drawn(part, lead, g) for key, part in space.items()}
    return torch.randn(*lead, *(space.shape or ()), generator=g)


def width(actions: spaces.Space[Any]) -> tuple[int, ...]:
    return () if isinstance(actions, spaces.Discrete) else (sum(1 for _ in actions.sample().flatten()),)


@given(OBSERVATIONS, ACTIONS, st.integers(1, 3), st.integers(1, 4), SEEDS, st.booleans())
def test_policies_act_in_every_space(
    observed: Any, acted: tuple[Any, str], steps: int, envs: int, seed: int, tensors: bool
) -> None:
    """Whether an observation is one vector, as environments give it, or a nest of dictionaries."""
    (actions, distribution), g = acted, generator(seed)
    space = tensor_space(observed) if tensors or not isinstance(observed, spaces.Dict) else nest(observed)
    policy = Policy(Standardize(space), actions, hidden=(4,), distribution=distribution, generator=g)
    obs, start = drawn(space, (envs,), g), torch.ones(envs, dtype=torch.bool)
    choice = policy.act(obs, policy.initial_state(envs), start, g)
    likeliest = policy.act(obs, policy.initial_state(envs), start, g, deterministic=True)
    for found in (choice, likeliest):
        assert found.action.shape == (envs, *width(actions)) and found.logp.shape == (envs,)
        assert found.logp.isfinite().all()
    many = drawn(space, (steps, envs), g)
    blank = map_obs(lambda x: x.expand(steps, *x.shape), policy.initial_state(envs))
    zeros = torch.zeros(steps, envs)
    rest = dict.fromkeys(("reward", "logp", "action"), zeros) | dict.fromkeys(
        ("start", "terminated", "truncated", "mask"), zeros.bool()
    )
    rollout = Rollout(obs=many, next_obs=many, hidden_state=blank, **rest)
    dist = policy.dist(rollout)
    action = dist.sample(g)
    assert action.shape == (steps, envs, *width(actions))
    for found in (dist.log_prob(action), dist.entropy(), dist.kl(dist.detach())):
        assert found.shape == (steps, envs) and found.isfinite().all()
    again = policy.act(map_obs(lambda x: x[0], many), policy.initial_state(envs), start, generator(seed))
    first = policy.dist(rollout[:1]).log_prob(again.action.unsqueeze(0))[0]
    assert torch.allclose(first, again.logp, atol=1e-5)


def nest(space: Any) -> spaces.Space[Any]:
    """A dictionary whose parts are vectors, nested as it is."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: nest(part) for key, part in space.items()})
    return tensor_space(space)


class Anywhere(Toy):
    """Random observations of any space, random rewards, and episodes that end at random."""

    def __init__(self, num_envs: int, observed: Any, actions: Any, ends: float, seed: int) -> None:
        self.num_envs, self.action_space, self.ends = num_envs, actions, ends
        self.observation_space, self.max_episode_steps = nest(observed), 6
        self.generator = seeding.generator(seed, "environment")
        self.clock = torch.zeros(num_envs, dtype=torch.long)

    def reset(self) -> Any:
        self.clock = torch.zeros_like(self.clock)
        return drawn(self.observation_space, (self.num_envs,), self.generator)

    def step(self, action: Tensor) -> Any:
        from pgsuite.types import Step, choose

        next_obs = drawn(self.observation_space, (self.num_envs,), self.generator)
        fresh = drawn(self.observation_space, (self.num_envs,), self.generator)
        reward = torch.randn(self.num_envs, generator=self.generator)
        terminated = torch.rand(self.num_envs, generator=self.generator) < self.ends
        self.clock = self.clock + 1
        truncated = (self.clock >= self.max_episode_steps) & ~terminated
        done = terminated | truncated
        self.clock = self.clock.where(~done, 0)
        return Step(choose(done, fresh, next_obs), next_obs, reward, terminated, truncated)


def single(actions: Any) -> bool:
    """Whether there is nothing to choose."""
    return (isinstance(actions, spaces.Discrete) and actions.n == 1) or (
        isinstance(actions, spaces.MultiDiscrete) and bool((actions.nvec == 1).all())
    )


@pytest.mark.parametrize("cls", ALL)
@settings(max_examples=12)
@given(OBSERVATIONS, ACTIONS, st.integers(2, 7), st.integers(2, 5), st.sampled_from([0.0, 0.3, 1.0]), SEEDS)
def test_every_method_learns_from_every_space(
    cls: type[Algorithm], observed: Any, acted: tuple[Any, str], steps: int, envs: int, ends: float, seed: int
) -> None:
    """One iteration leaves every parameter finite and moves some; the policy's, too, where there is a choice."""
    actions, distribution = acted
    env: Any = Anywhere(envs, observed, actions, ends, seed % 1000)
    once: dict[str, Any] = {
        name: 1 for name in ("minibatches", "critic_minibatches") if name in {f.name for f in fields(cls)}
    }
    algorithm = build(cls, env, hidden=(4,), look={"distribution": distribution}, **once)
    rollouts = algorithm.collector(env, max(steps, env.max_episode_steps) if cls.collector.whole_episodes else steps)
    before = tr.flatten(list(algorithm.policy.parameters())).detach().clone()
    metrics = algorithm.iterate(rollouts)
    after = tr.flatten(list(algorithm.policy.parameters())).detach()
    assert after.isfinite().all() and all(x.isfinite() for x in metrics.values())
    if algorithm.critic is not None:
        assert tr.flatten(list(algorithm.critic.parameters())).isfinite().all()
    assert torch.equal(before, after) == single(actions)
