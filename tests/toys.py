"""Worlds small enough to know everything about, and algorithms built on them in one call."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import kills
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from pgsuite import seeding
from pgsuite.algorithms import (
    A2C,
    CPO,
    NPG,
    PPO,
    TRPO,
    Algorithm,
    PPOLagrangian,
    PPOPenalty,
    Reinforce,
    TRPOLagrangian,
)
from pgsuite.execution.modes import execute
from pgsuite.nn.action_critic import ActionCritic
from pgsuite.nn.normalize import RewardScale, Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.rollout import Collector
from pgsuite.training import checkpoint
from pgsuite.training.trainer import Trainer
from pgsuite.types import Step

ALL: list[type[Algorithm]] = [Reinforce, A2C, PPO, PPOPenalty, NPG, TRPO]
# Passes over a batch: enough that each is shuffled anew and steps on what the one before left, and no more.
BRIEF: dict[type[Algorithm], dict[str, Any]] = {
    Reinforce: {"critic_epochs": 2, "critic_minibatches": 2},
    A2C: {},
    PPO: {"epochs": 2, "minibatches": 2},
    PPOPenalty: {"epochs": 2, "minibatches": 2},
    NPG: {"critic_epochs": 2, "critic_minibatches": 2},
    TRPO: {"critic_epochs": 2, "critic_minibatches": 2},
}
BRIEF |= {PPOLagrangian: BRIEF[PPO], TRPOLagrangian: BRIEF[TRPO], CPO: BRIEF[TRPO]}


def mostly_long(cases: Iterable[Any], *short: Any) -> list[Any]:
    """Parameters of a test that are marked as long, but for the ``short`` ones."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    brief = [case if isinstance(case, tuple) else (case,) for case in short]
    return [pytest.param(*x, marks=[] if x in brief else pytest.mark.long) for x in values]


class Toy:
    """Clock, restarts and bookkeeping; a subclass says how states start, move and pay."""

    name = "toy"
    backend = "toy"
    description = "toy"
    is_resumable = True
    device = torch.device("cpu")
    action_space: spaces.Space[Any] = spaces.Discrete(2)
    observation_space: spaces.Space[Any]
    obs_size = 1

    def __init__(self, num_envs: int, max_episode_steps: int = 50, seed: int = 0) -> None:
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.observation_space = spaces.Box(-math.inf, math.inf, (self.obs_size,))
        self.generator = seeding.generator(seed, "environment")
        self.clock = torch.zeros(num_envs, dtype=torch.long)
        self.state = self.fresh()

    def fresh(self) -> Tensor:
        return torch.ones(self.num_envs, self.obs_size)

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Successor [N, O], reward [N], terminated [N]."""
        raise NotImplementedError

    def reset(self) -> Tensor:
        self.state, self.clock = self.fresh(), torch.zeros_like(self.clock)
        return self.state

    def step(self, action: Tensor) -> Step:
        next_obs, reward, terminated = self.move(action)
        self.clock = self.clock + 1
        truncated = (self.clock >= self.max_episode_steps) & ~terminated
        done = terminated | truncated
        self.state = torch.where(done.unsqueeze(-1), self.fresh(), next_obs)
        self.clock = torch.where(done, 0, self.clock)
        return Step(self.state, next_obs, reward, terminated, truncated)

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state, "clock": self.clock, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.clock = state["state"], state["clock"]
        self.generator.set_state(state["generator"])


class PointMass(Toy):
    """Push a point to the origin of the plane; leaving the arena ends the episode."""

    obs_size = 4
    action_space: spaces.Space[Any] = spaces.Box(-1.0, 1.0, (2,))

    def fresh(self) -> Tensor:
        place = torch.empty(self.num_envs, 2).uniform_(-1, 1, generator=self.generator)
        return torch.cat([place, torch.zeros_like(place)], -1)

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position, velocity = self.state.chunk(2, -1)
        force = action.clamp(-1, 1)
        velocity = 0.9 * velocity + 0.2 * force
        position = position + 0.2 * velocity
        reward = 1 - position.square().sum(-1) - 0.05 * force.square().sum(-1)
        return torch.cat([position, velocity], -1), reward, position.abs().amax(-1) > 2


class Corridor(Toy):
    """Each step pays one and survives with a probability that depends on the action taken."""

    def __init__(self, num_envs: int, max_episode_steps: int, survive: tuple[float, float], seed: int = 0) -> None:
        super().__init__(num_envs, max_episode_steps, seed)
        self.survive = torch.tensor(survive)

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        falls = torch.rand(self.num_envs, generator=self.generator) > self.survive[action]
        return self.fresh(), torch.ones(self.num_envs), falls


class Probe(Toy):
    """One step; the reward is ``pays(obs, action)``; the observation is -1 or 1 at random, or 0 if ``blank``."""

    def __init__(self, num_envs: int, pays: Any, *, blank: bool = False, seed: int = 0) -> None:
        self.pays, self.initial_state = pays, blank
        super().__init__(num_envs, 1, seed)

    def fresh(self) -> Tensor:
        if self.initial_state:
            return torch.zeros(self.num_envs, 1)
        return 2.0 * torch.randint(2, (self.num_envs, 1), generator=self.generator) - 1

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.state, self.pays(self.state.squeeze(-1), action), torch.ones(self.num_envs, dtype=torch.bool)


class TwoSteps(Toy):
    """Observation 0, then 1; reward one at the end."""

    def fresh(self) -> Tensor:
        return torch.zeros(self.num_envs, 1)

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ends = self.state.squeeze(-1) == 1
        return torch.ones(self.num_envs, 1), ends.float(), ends


class Endless(Toy):
    """Reward one for ever: every episode is cut by the clock (or ends there, if ``terminates``)."""

    terminates = False

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last = self.clock + 1 >= self.max_episode_steps
        return self.fresh(), torch.ones(self.num_envs), last & self.terminates


def build(
    cls: type[Algorithm],
    env: Any,
    *,
    seed: int = 0,
    hidden: tuple[int, ...] = (16,),
    standardize: bool = True,
    scale: bool = True,
    convolutions: Any = None,
    look: Any = None,
    critic_look: Any = None,
    recurrent: Any = "none",
    shared: bool = False,
    **fields: Any,
) -> Any:
    """An algorithm with small networks, its randomness its own."""
    generator = seeding.generator(seed, "algorithm")
    norm = Standardize(env.observation_space, enabled=standardize)
    both: Any = {"convolutions": convolutions, "generator": generator}
    policy = Policy(norm, env.action_space, hidden=hidden, **both | (look or {}))
    both |= {
        "recurrent": recurrent,
        "recurrent_size": 16,
        "num_envs": env.num_envs,
        "shared": policy if shared else None,
    }
    both = {"hidden": (16,), "activation": "elu"} | both | (critic_look or {})  # tanh begins as an odd function
    kind = partial(ActionCritic, action_space=env.action_space) if cls.action_values else Critic
    critic = kind(norm, **both)
    if scale:
        fields["reward_scale"] = RewardScale(env.num_envs)
    return cls(policy=policy, critic=critic, generator=generator, **fields)  # pyright: ignore[reportCallIssue]


def collector(algorithm: Any, env: Any, horizon: int = 20, seed: int = 0) -> Collector:
    horizon = env.max_episode_steps if algorithm.collector.whole_episodes else horizon
    return algorithm.collector(env, horizon, seed)


def resume_alike(one: tuple[Algorithm, Collector], two: tuple[Algorithm, Collector], iterations: int = 2) -> None:
    """Put an algorithm and its collector where others stand, and have both go on; assert that all parts of the one are
    then those of the other."""
    for theirs, mine in zip(one, two, strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for algorithm, rollouts in (one, two):
        for _ in range(iterations):
            algorithm.iterate(rollouts)
    for part, module in one[0].parts.items():
        for name, x in module.state_dict().items():
            assert torch.equal(x, two[0].parts[part].state_dict()[name]), f"{part}.{name}"


def compile_alike(build: Callable[[PointMass], Algorithm], monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that an algorithm moves its parameters compiled as eagerly, to rounding; by tracing alone, for graphs are
    not compiled."""
    traced = compile_by("eager", monkeypatch)
    runs = []
    for mode in ("eager", "compile"):
        env = PointMass(8)
        algorithm = build(env)
        rollouts = collector(algorithm, env)
        execute(algorithm, rollouts, mode)  # pyright: ignore[reportArgumentType]
        for _ in range(2):
            algorithm.iterate(rollouts)
        runs.append(torch.cat([optimizer.flat for optimizer in algorithm.optimizers]))
    assert traced and torch.allclose(*runs, rtol=1e-4, atol=1e-6)


def put_back_alike(one: Trainer, two: Trainer, path: Path) -> None:
    """Assert that a trainer does the same as another whose saved state it takes up."""
    checkpoint.save(one.state_dict(), path)
    two.load_state_dict(checkpoint.load(path))
    for _ in range(3):
        one.step()
        two.step()
    assert not kills.differences(one.training_state(), two.training_state())


@torch.no_grad()
def value(critic: Critic, obs: Tensor) -> Tensor:
    """What a critic without memory says of observations [..., O], [...]."""
    return critic.read(critic.body.step(obs, {}, torch.ones(obs.shape[:-1], dtype=torch.bool))[0])


class LQR(Toy):
    """x' = x + u, reward -(x^2 + u^2): the linear quadratic regulator with A = B = Q = R = 1."""

    action_space: spaces.Space[Any] = spaces.Box(-math.inf, math.inf, (1,))

    def fresh(self) -> Tensor:
        return torch.empty(self.num_envs, 1).uniform_(-1, 1, generator=self.generator)

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cost = self.state.square().sum(-1) + action.square().sum(-1)
        return self.state + action, -cost, torch.zeros(self.num_envs, dtype=torch.bool)


class FrozenLake(Toy):
    """gymnasium's slippery FrozenLake from its own transition table; one-hot observations."""

    obs_size = 16
    action_space: spaces.Space[Any] = spaces.Discrete(4)

    def __init__(self, num_envs: int, max_episode_steps: int = 100, seed: int = 0) -> None:
        import gymnasium

        table: Any = gymnasium.make("FrozenLake-v1", is_slippery=True).unwrapped
        self.chance, self.reward = torch.zeros(2, 16, 4, 16, dtype=torch.float64)
        self.ends = torch.zeros(16, dtype=torch.bool)
        for s, actions in table.P.items():
            for a, outcomes in actions.items():
                for p, successor, reward, terminated in outcomes:
                    self.chance[s, a, successor] += p
                    self.reward[s, a, successor] = reward
                    self.ends[successor] |= terminated
        super().__init__(num_envs, max_episode_steps, seed)

    def fresh(self) -> Tensor:
        return torch.eye(16)[torch.zeros(self.num_envs, dtype=torch.long)]

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = self.state.argmax(-1)
        there = torch.multinomial(self.chance[here, action], 1, generator=self.generator).squeeze(-1)
        return torch.eye(16)[there], self.reward[here, action, there].float(), self.ends[there]

    def best(self) -> float:
        """The optimal chance of reaching the goal within the limit, by dynamic programming."""
        value = torch.zeros(16, dtype=torch.float64)
        for _ in range(self.max_episode_steps):
            following = self.reward + value * ~self.ends
            value = (self.chance * following).sum(-1).amax(-1)
        return float(value[0])


def compile_by(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have graphs made by another of torch's compilers than the one that takes its time; what is traced by ourselves is
    listed."""
    import torch._inductor as inductor  # a second, which workers that import a test's environment need not wait for

    made: list[Any] = []
    build_graph = inductor.compile if backend == "inductor" else lambda graph, inputs: graph
    monkeypatch.setattr(inductor, "compile", lambda *given: made.append(given) or build_graph(*given))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return made
