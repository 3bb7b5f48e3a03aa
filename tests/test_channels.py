"""Channels: a reward apart is worth what the reward is, and every kind of environment gives its channels."""

import math
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from test_constrained import rollout_of
from torch import Tensor
from toys import PointMass, Toy, build, collector, compile_by, mostly_long

from pgsuite.algorithms import A2C, CPO, NPG, PPO, TRPO, Channel, PPOLagrangian, Reinforce
from pgsuite.algorithms.channels import Channels
from pgsuite.algorithms.estimators import GAE, MonteCarlo
from pgsuite.algorithms.rnd import RND
from pgsuite.envs import BrokenEnvError, Gym, GymEnv, make
from pgsuite.envs.gym_env import Maker, Watch
from pgsuite.envs.tasks import Cruise
from pgsuite.execution.modes import execute
from pgsuite.rollout import EpisodeTracker, StepCollector
from pgsuite.testing import check_algorithm
from pgsuite.training.trainer import Trainer
from pgsuite.types import Step


class Apart(PointMass):
    """Pays the reward in a channel, times ``sign``, and nothing as the reward."""

    channels = ("apart",)

    def __init__(self, num_envs: int, sign: float = 1.0) -> None:
        super().__init__(num_envs)
        self.sign = sign

    def step(self, action: Tensor) -> Step:
        step = super().step(action)
        return step._replace(reward=0 * step.reward, channels={"apart": self.sign * step.reward})


@pytest.fixture
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("weight", "shared"), mostly_long([(1.0, False), (-2.0, False), (-2.0, True)], (-2.0, False)))
def test_a_channel_is_worth_what_the_reward_is_times_its_weight(weight: float, shared: bool) -> None:
    """A policy moves alike for a reward, and for the same in a channel with its own discount, estimator and scale."""
    moved, values = [], []
    for env in (PointMass(16), Apart(16, 1 / weight)):
        own: dict[str, Any] = {"gamma": 0.9, "estimator": GAE(lam=0.8)}
        if isinstance(env, Apart):
            own = {"channels": Channels(apart=Channel(weight=weight, **own))}
        algorithm = build(NPG, env, shared=shared, scale=False, **own)
        algorithm.critic.out.weight.data.zero_()
        for channel in algorithm.channels.values():
            channel.critic.out.weight.data.zero_()
        algorithm.iterate(collector(algorithm, env))
        moved.append(torch.cat([p.flatten() for p in algorithm.policy.parameters()]))
        values.append(algorithm)
    assert torch.allclose(*moved, atol=1e-9)
    critic = values[1].channels["apart"].critic
    assert critic.body is values[1].policy.body if shared else critic.body is not values[1].critic.body
    assert critic.body.obs_norm is values[1].policy.obs_norm
    assert not torch.equal(critic.out.weight, 0 * critic.out.weight)


def test_returns_that_are_not_episodic_go_on_in_the_next_episode() -> None:
    env = Apart(2)
    ends = torch.tensor([[False, False], [True, False], [False, False], [False, True]])
    cost = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0], [64.0, 128.0]])
    rollout = replace(rollout_of(cost, ends, torch.ones(2, dtype=torch.bool)), channels={"apart": cost})
    rollout = replace(rollout, obs=torch.zeros(4, 2, 4), next_obs=torch.zeros(4, 2, 4))
    for episodic, first in ((True, [1 + 2.0, 2 + 4 + 8 + 16]), (False, [1 + 2 + 4 + 8, 2 + 4 + 8 + 16])):
        channel = Channel(gamma=0.5, estimator=MonteCarlo(), episodic=episodic)
        build(A2C, env, channels=Channels(apart=channel))
        channel.critic.out.weight.data.zero_()
        assert channel.estimate(rollout)["target"][0].tolist() == first


def test_the_scale_of_a_channel_is_its_own_and_a_constant_factor_changes_nothing() -> None:
    found = []
    for factor in (1.0, 2.0**10):
        env = Apart(8, factor)
        algorithm = build(PPO, env, epochs=1, channels=Channels(apart=Channel(scale=True)))
        rollouts = collector(algorithm, env)
        for _ in range(2):
            algorithm.iterate(rollouts)
        found.append(torch.cat([p.flatten() for p in algorithm.policy.parameters()]))
    assert torch.equal(*found)


def test_the_sums_of_channels_are_those_of_episodes_as_far_as_they_count() -> None:
    tracker = EpisodeTracker(2, torch.device("cpu"), ["cost"])
    cost = torch.arange(8.0).view(4, 2)
    ends = torch.tensor([[False, False], [True, False], [False, True], [False, False]])
    rollout = rollout_of(cost, ends, torch.ones(2, dtype=torch.bool))
    mask = torch.ones_like(ends)
    mask[0, 1] = False  # whose cost of one does not count
    _, lengths, sums = tracker.update(replace(rollout, mask=mask))
    assert sums[lengths > 0].tolist() == [0 + 2, 3 + 5] and lengths[lengths > 0].tolist() == [2, 2]
    state = tracker.state_dict()
    other = EpisodeTracker(2, torch.device("cpu"), ["cost"])
    other.load_state_dict(state)
    again = rollout_of(cost, ~ends, torch.zeros(2, dtype=torch.bool))
    assert all(torch.equal(x, y) for x, y in zip(tracker.update(again), other.update(again), strict=True))


@pytest.mark.parametrize(
    ("cls", "channels"),
    mostly_long([(A2C, "cost"), (PPO, "rnd"), (TRPO, "rnd")]),
)
def test_methods_with_channels_do_what_the_suite_relies_on(cls: Any, channels: str) -> None:
    check_algorithm(cls, learns=False, channels=Channels(rnd=RND()) if channels == "rnd" else Channels(cost=Channel()))


def test_a_channel_that_no_environment_gives_is_refused() -> None:
    env = PointMass(4)
    algorithm = build(A2C, env, channels=Channels(energy=Channel()))
    with pytest.raises(ValueError, match="learns from the channel 'energy', and toy has none"):
        algorithm.validate(collector(algorithm, env))
    assert Reinforce.learn_channels is not A2C.learn_channels


# gymnasium


class Costly(gymnasium.Wrapper[Any, Any, Any, Any]):
    """CartPole whose cost is the distance from the middle."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return obs, reward, terminated, truncated, {"cost": abs(float(obs[0])), "other": "text"}


COSTLY = Gym(id="CartPole-v1", max_episode_steps=9, wrappers=["test_channels.Costly"], channels=["cost"])


@pytest.mark.parametrize("kind", mostly_long(["SameStep", "NextStep", "Disabled", "workers"], "SameStep", "NextStep"))
def test_costs_of_infos_are_those_of_their_steps_in_every_way_to_restart(kind: str) -> None:
    if kind == "workers":
        env: Any = make(replace(COSTLY, workers=2), 3)
    else:
        vec = SyncVectorEnv([Maker(COSTLY, i) for i in range(3)], autoreset_mode=AutoresetMode(kind))
        device = torch.device("cpu")
        env = GymEnv(vec, name="Costly", max_episode_steps=9, device=device, channels=["cost"])
    env.reset()
    ended = 0
    for t in range(40):
        step = env.step(torch.tensor([t % 2, (t + 1) % 2, 1]))
        real = torch.ones(3, dtype=torch.bool) if step.mask is None else step.mask
        assert torch.allclose(step.channels["cost"][real], step.next_obs[real, 0].abs(), atol=1e-6)
        ended += int(step.done.sum())
    assert ended > 3


class SixValues(gymnasium.Env[Any, Any]):
    """Returns the cost after the reward, as Safety-Gymnasium's environments do."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, cost: Any = 3) -> None:
        self.cost = cost

    def reset(self, **kwargs: Any) -> Any:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), 1.0, self.cost, False, False, {"more": 1}


def test_a_step_of_six_values_has_its_cost_as_a_channel_and_a_missing_one_is_named() -> None:
    assert Watch(SixValues(), "six", ["cost"]).step(0)[4] == {"cost": 3.0}
    with pytest.raises(BrokenEnvError, match=r"six at its step 1 gave no 'speed' in its info, .* it has more, cost"):
        Watch(SixValues(), "six", ["speed"]).step(0)
    with pytest.raises(BrokenEnvError, match=r"gave nan as info\['cost'\]"):
        Watch(SixValues(math.nan), "six", ["cost"]).step(0)


@pytest.mark.long
@pytest.mark.parametrize("cls", [PPOLagrangian, CPO, A2C])
def test_compiled_channels_are_those_as_written_and_their_kernels_can_be_reset(
    cls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_by("aot_eager", monkeypatch)
    runs = []
    for execution in ("eager", "compile"):
        env = make(Cruise(), 16, seed=0)
        algorithm = build(cls, env, channels=Channels(rnd=RND()))
        rollouts = collector(algorithm, env, 16)
        execute(algorithm, rollouts, execution)
        trainer = Trainer(algorithm, rollouts, 10**6)
        trainer.iterate()
        runs.append(torch.cat([x.flatten() for part in algorithm.parts.values() for x in part.parameters()]))
    changed = {name for name, kernel in trainer.kernels.items() if kernel.run != kernel.function}
    assert changed >= {"channels.rnd.critic.values_and_next_values", "channels.rnd.predictor_optimizer.gradient_step"}
    assert torch.allclose(*runs, atol=1e-4)


# Random network distillation


def at(x: float) -> Tensor:
    return torch.full((16, 8, 4), x)


def test_what_was_visited_is_no_longer_new_and_what_was_not_still_is() -> None:
    env = PointMass(8)
    channel = RND(generator=torch.Generator().manual_seed(0), epochs=1, minibatches=1, predictor_epochs=20)
    algorithm = build(PPO, env, channels=Channels(rnd=channel))
    rollout = StepCollector(env, 16).collect(algorithm.policy)
    here, there = (replace(rollout, obs=at(x), next_obs=at(x)) for x in (0.3, -0.8))
    before = [float(channel.reward(x).mean()) for x in (here, there)]
    for _ in range(3):
        prepared = replace(here, estimates={"rnd": channel.estimate(here)})
        channel.learn(prepared, algorithm.fit)
    after = [float(channel.reward(x).mean()) for x in (here, there)]
    assert after[0] < 0.02 * before[0] and after[1] > 0.3 * before[1]
    channel.update_statistics(rollout)
    far = replace(rollout, next_obs=1e6 + 0 * rollout.next_obs)
    assert torch.equal(channel.reward(far), channel.reward(replace(far, next_obs=1e9 + 0 * far.next_obs)))  # clipped


class Lock(Toy):
    """Fourteen cells, each with one action that leads on and one that leads back to the first; the only reward is at
    the end, where random actions come once in 16,000 tries."""

    obs_size = 14
    code = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0])

    def fresh(self) -> Tensor:
        return torch.eye(len(self.code))[:1].repeat(self.num_envs, 1)

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cell = self.state.argmax(-1)
        cell = torch.where(action == self.code[cell], cell + 1, 0)
        opened = cell == len(self.code)
        return torch.eye(len(self.code))[cell.clamp(max=len(self.code) - 1)], opened.float(), opened


@pytest.mark.long
@pytest.mark.parametrize("cls", [PPO, TRPO])
def test_a_distant_reward_is_found_with_the_bonus_and_not_without(cls: Any) -> None:
    found = []
    for channels in (Channels(), Channels(rnd=RND())):
        env = Lock(16, 28)
        algorithm = build(cls, env, channels=channels)
        if cls is PPO:
            algorithm.optimizer.lr.fill_(1e-3)
        rollouts, sums = collector(algorithm, env, 28), []
        for _ in range(100):
            algorithm.iterate(rollouts)
            sums.append(float(rollouts.buffer.read().reward.sum()) / 16)
        found.append(sum(sums[-10:]) / 10)
    assert found[0] < 0.01 and found[1] > 1.5  # of two in each rollout
