"""Collecting, storing, counting and splitting experience."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import Corridor, PointMass, Toy, TwoSteps, build, collector

from pgsuite.algorithms import PPO, Reinforce
from pgsuite.nn import network
from pgsuite.rollout import EpisodeCollector, EpisodeTracker, RolloutBuffer, StepCollector, minibatches
from pgsuite.transfer import as_on_accelerator
from pgsuite.types import Batch, Rollout


class Counter(Toy):
    """The observation is the clock; the reward is that of the step; episodes end after ``length`` steps."""

    def __init__(self, num_envs: int, length: list[int], limit: int = 50) -> None:
        self.length = torch.tensor(length)
        super().__init__(num_envs, limit)

    def fresh(self) -> Tensor:
        return torch.zeros(self.num_envs, 1)

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        now = self.state.squeeze(-1) + 1
        return now.unsqueeze(-1), now, now >= self.length


@pytest.mark.parametrize("name", ["action", "reward", "next_obs"])
def test_what_is_not_finite_counts_where_something_happened(name: str) -> None:
    env = Counter(2, [2, 4], limit=4)
    algorithm = build(Reinforce, env)
    rollout = EpisodeCollector(env, 4).collect(algorithm.policy)
    assert rollout.mask[:, 0].tolist() == [True, True, False, False] and bool(rollout.finite())
    part = getattr(rollout, name)
    if not part.is_floating_point():
        rollout = replace(rollout, **{name: part.float()})
        part = getattr(rollout, name)
    part[2, 0] = torch.nan
    assert bool(rollout.finite())
    part[1, 0] = torch.nan
    assert not bool(rollout.finite())


def test_a_rollout_says_what_happened_across_episodes_and_rollouts() -> None:
    env = Counter(2, [3, 100], limit=4)
    steps = StepCollector(env, 5)
    policy = build(PPO, env).policy
    first = steps.collect(policy).map(torch.clone)
    assert first.obs[:, 0, 0].tolist() == [0, 1, 2, 0, 1]
    assert first.next_obs[:, 0, 0].tolist() == [1, 2, 3, 1, 2]  # the true successor, not the restart
    assert first.terminated[:, 0].tolist() == [False, False, True, False, False]
    assert first.next_obs[:, 1, 0].tolist() == [1, 2, 3, 4, 1]
    assert first.truncated[:, 1].tolist() == [False, False, False, True, False]
    assert first.start[:, 1].tolist() == [True, False, False, False, True]
    second = steps.collect(policy)
    assert second.obs[0, :, 0].tolist() == [2, 1] and not second.start[0].any()
    assert first.mask.all() and second.mask.all()


def test_whole_episodes_are_masked_after_their_end_and_collection_stops_with_the_last() -> None:
    env = Counter(3, [2, 5, 3], limit=50)
    episodes = EpisodeCollector(env, 50, poll=1)
    policy = build(PPO, env).policy
    for _ in range(2):
        rollout = episodes.collect(policy)
        assert rollout.mask.sum(0).tolist() == [2, 5, 3]
        assert (rollout.reward.where(rollout.mask, 0.0).sum(0)).tolist() == [3, 15, 6]
        assert rollout.start[0].all() and (rollout.obs[0] == 0).all()
        assert int(env.clock.max()) < 6


def test_a_longer_rollout_leaves_no_trace_in_a_shorter_one() -> None:
    env = Counter(2, [40, 40], limit=50)
    episodes = EpisodeCollector(env, 50)
    policy = build(PPO, env).policy
    assert episodes.collect(policy).mask.sum(0).tolist() == [40, 40]
    env.length = torch.tensor([2, 3])
    assert episodes.collect(policy).mask.sum(0).tolist() == [2, 3]


def test_whole_episodes_need_the_whole_horizon() -> None:
    with pytest.raises(ValueError, match="up to 50 steps, so horizon must be at least that, got 49"):
        EpisodeCollector(PointMass(2), 49)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        StepCollector(PointMass(2), 0)


def test_episode_returns_run_on_from_rollout_to_rollout() -> None:
    env = Counter(2, [3, 7])
    steps, tracker, returns, lengths = StepCollector(env, 2), EpisodeTracker(2, env.device), [], []
    policy = build(PPO, env).policy
    for _ in range(5):
        got = tracker.finished_episodes(steps.collect(policy))
        returns += got[0].tolist()
        lengths += got[1].tolist()
    assert sorted(returns) == [6, 6, 6, 28] and sorted(lengths) == [3, 3, 3, 7]


def test_the_tracker_counts_one_episode_per_environment_of_whole_episodes() -> None:
    env = Counter(3, [2, 5, 3])
    tracker = EpisodeTracker(3, env.device)
    policy, episodes = build(PPO, env).policy, EpisodeCollector(env, 50)
    for _ in range(2):
        assert sorted(tracker.finished_episodes(episodes.collect(policy))[0].tolist()) == [3, 6, 15]


def example(steps: int = 4, envs: int = 6) -> Batch:
    """A batch in which every field of cell (t, n) holds t * N + n."""
    cell = torch.arange(steps * envs).view(steps, envs)
    values: dict[str, Any] = {
        f.name: cell.unsqueeze(-1) if f.name in ("obs", "hidden_state", "action") else cell for f in fields(Batch)
    }
    values["obs"] = {"a": cell.unsqueeze(-1), "b": cell}
    return Batch(**values)


@pytest.mark.parametrize("columns", [False, True])
def test_minibatches_hold_every_cell_once_and_keep_it_together(columns: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = list(minibatches(example(), 3, columns=columns, generator=generator))
    assert [p.logp.numel() for p in parts] == [8, 8, 8]
    cells = torch.cat([p.logp.flatten() for p in parts])
    assert sorted(cells.tolist()) == list(range(24)) and cells.tolist() != list(range(24))
    for part in parts:
        assert torch.equal(part.obs["a"].squeeze(-1), part.logp) and torch.equal(part.obs["b"], part.target)
        assert not columns or torch.equal(part.logp, part.logp[0] + 6 * torch.arange(4).unsqueeze(1))


def test_every_epoch_is_shuffled_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (list(minibatches(example(), 2, columns=False, generator=generator)) for _ in range(2))
    assert not torch.equal(first[0].logp, second[0].logp)


@pytest.mark.parametrize(("count", "columns"), [(5, False), (25, False), (4, True)])
def test_minibatches_that_do_not_divide_the_batch_are_refused(count: int, columns: bool) -> None:
    with pytest.raises(ValueError, match=f"{count} minibatches do not divide a batch of"):
        list(minibatches(example(), count, columns=columns))


def test_the_buffer_reuses_its_storage_and_holds_dictionaries() -> None:
    buffer, cell = RolloutBuffer(3), torch.ones(2)
    values: dict[str, Any] = {f.name: cell for f in fields(Rollout)}
    values |= {"obs": {"a": cell, "b": cell}, "next_obs": {"a": cell}}
    row = Rollout(**values)
    with pytest.raises(RuntimeError, match="nothing was collected"):
        buffer.read()
    for t in range(3):
        buffer.write(t, row.map(lambda x, t=t: x * t))
    address = buffer.read().reward.data_ptr()
    assert buffer.read().obs["b"][:, 0].tolist() == [0, 1, 2]
    buffer.write(0, row)
    assert buffer.read().reward.data_ptr() == address and buffer.read().reward[0, 0] == 1


def test_a_collector_restored_from_its_state_goes_on_identically() -> None:
    env, twin_env = Corridor(4, 20, (0.5, 0.9), seed=1), Corridor(4, 20, (0.5, 0.9), seed=2)
    algorithm = build(PPO, env)
    one, two = collector(algorithm, env, 7), collector(algorithm, twin_env, 7, seed=9)
    one.collect(algorithm.policy)
    two.load_state_dict(one.state_dict())
    a = one.collect(algorithm.policy)
    b = two.collect(algorithm.policy)
    assert a.hidden_state == b.hidden_state == a.channels == {}
    named = [f.name for f in fields(a) if isinstance(getattr(a, f.name), Tensor) or f.name == "obs"]
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in named)


def test_two_steps_end_where_they_should() -> None:
    env = TwoSteps(1)
    rollout = StepCollector(env, 4).collect(build(PPO, env).policy)
    assert rollout.reward[:, 0].tolist() == [0, 1, 0, 1] and rollout.terminated[:, 0].tolist() == [False, True] * 2


def test_values_are_computed_once_for_each_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: where a successor is the next observation its value is not computed again, and a terminal one, which
    may be anything, is not looked at.  A pass over many large observations is done in pieces."""
    env = Counter(3, [3, 100, 100], limit=4)
    algorithm = build(PPO, env)
    critic, rollout = algorithm.critic, StepCollector(env, 10).collect(algorithm.policy)
    with as_on_accelerator():
        value, following = critic.values_and_next_values(rollout)
    rollout.next_obs[rollout.terminated] = torch.nan
    seen: list[int] = []
    encode = critic.body.encode
    monkeypatch.setattr(critic.body, "encode", lambda obs: seen.append(obs[..., 0].numel()) or encode(obs))
    for largest, passes in ((10**6, [30]), (9, [9, 9, 9, 3]), (1, [3] * 10)):
        monkeypatch.setattr(network, "LARGEST_PASS", largest)
        seen.clear()
        found = critic.values_and_next_values(rollout)
        assert seen == [*passes, 2 * 2 + 3]  # two worlds are truncated twice; and there is the last row
        assert torch.allclose(found[0], value, atol=1e-6)
        assert torch.allclose(found[1][~rollout.terminated], following[~rollout.terminated], atol=1e-6)
        assert found[1].isfinite().all() and rollout.terminated.any() and rollout.truncated.any()
        with torch.no_grad():
            own, others = (algorithm.estimator(rollout, *x, None, gamma=0.9) for x in (found, (value, following)))
        for a, b in zip(own, others, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
