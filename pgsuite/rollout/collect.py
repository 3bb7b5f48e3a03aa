"""Collectors, which fill [T, N] rollouts: of a fixed number of steps, or of whole episodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from pgsuite import seeding
from pgsuite.envs.base import VectorEnv
from pgsuite.kernel import Kernel, phase
from pgsuite.nn.policy import Policy, PolicyOutput
from pgsuite.rollout.buffer import RolloutBuffer
from pgsuite.types import LIFE_LOST, HiddenState, Obs, Rollout, map_obs


class Collector(ABC):
    """Runs a policy for up to T = horizon steps in N environments.  Actions are sampled from a generator of its own."""

    whole_episodes = False
    fixed_shape = False  # whether all rollouts must have one shape, so that what is compiled fits them all
    supports_overlap = True  # whether another thread may collect during the update
    is_off_policy = False  # whether the behavior policy may be older than the policy that is updated
    host_sync_reason: str | None = (
        None  # what is read back to the host during collection, and the setting that avoids it; None if nothing is
    )

    def __init__(self, env: VectorEnv, horizon: int, seed: int = 0) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 step, got {horizon}")
        self.env, self.horizon = env, horizon
        self.generator = seeding.generator(seed, "acting", env.device)
        self.buffer = RolloutBuffer(horizon)
        self.collect = Kernel("collect", self._collect)
        self.act = Kernel("act", self._act)
        self.started = False
        self.seconds = {"environment": 0.0, "acting": 0.0}  # host time; on an accelerator, of launches only
        self.obs: Obs
        self.hidden_state: HiddenState
        self.start: Tensor

    @property
    def stepper(self) -> Collector:
        """The collector that steps the environments."""
        return self

    def wait(self) -> None:
        """Wait for background work of this collector."""

    def validate(self, policy: Policy) -> None:
        """Raise ValueError for a policy that cannot act here."""

    @abstractmethod
    def _collect(self, policy: Policy) -> Rollout:
        """Collect a rollout [T, N], of views that the next rollout overwrites."""

    def reset(self, policy: Policy) -> None:
        """Restart every environment and reset the hidden states."""
        self.obs, self.hidden_state = self.env.reset(), policy.initial_state(self.env.num_envs)
        self.start = torch.ones(self.env.num_envs, dtype=torch.bool, device=self.env.device)
        self.started = True

    def step(self, t: int, policy: Policy, live: Tensor) -> Rollout:
        """Step every environment once and write the transition [N] to row t; returns the transition."""
        row = self.transition(policy, live)
        with phase("write"):
            self.buffer.write(t, row)
        return row

    def transition(self, policy: Policy, live: Tensor) -> Rollout:
        """Step every environment once; returns the transition [N]."""
        began = perf_counter()
        choice = self.act(policy)
        acted = perf_counter()
        with phase("environments"):
            step = self.env.step(choice.action)
        self.seconds["environment"] += perf_counter() - acted
        self.seconds["acting"] += acted - began
        start = step.done
        if step.mask is not None:
            live, start = live & step.mask, start | (self.start & ~step.mask)
        row = Rollout(
            obs=self.obs,
            hidden_state=self.hidden_state,
            start=self.start,
            action=choice.action,
            logp=choice.logp,
            reward=step.reward,
            next_obs=step.next_obs,
            terminated=step.terminated,
            truncated=step.truncated,
            mask=live,
            extra={} if step.life_lost is None else {LIFE_LOST: step.life_lost},
            channels=step.channels or {},
        )
        self.obs, self.hidden_state, self.start = step.obs, choice.hidden_state, start
        return row

    def _act(self, policy: Policy) -> PolicyOutput:
        """Sample an action for the current observation of each environment."""
        return policy.act(self.obs, self.hidden_state, self.start, self.generator)

    def reseed(self) -> None:
        """Reseed the generator of actions, so that the following actions differ."""
        seed = torch.randint(2**62, (), generator=self.generator, device=self.generator.device)
        self.generator.manual_seed(int(seed))

    def state_dict(self) -> dict[str, Any]:
        """The state of environments, generator and hidden states: everything that acting depends on, except the
        policy."""
        state = {"env": self.env.state_dict(), "generator": self.generator.get_state(), "begun": self.started}
        return state | (
            {name: getattr(self, name) for name in ("obs", "hidden_state", "start")} if self.started else {}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env.load_state_dict(state["env"])
        self.generator.set_state(state["generator"])
        self.started = state["begun"]
        for name in ("obs", "hidden_state", "start") if self.started else ():
            setattr(self, name, map_obs(lambda x: x.to(self.env.device), state[name]))


class StepCollector(Collector):
    """T steps in each environment; episodes continue from one rollout to the next."""

    def _collect(self, policy: Policy) -> Rollout:
        if not self.started:
            self.reset(policy)
        live = torch.ones_like(self.start)
        for t in range(self.horizon):
            self.step(t, policy, live)
        return self.buffer.read()


class EpisodeCollector(Collector):
    """One complete episode per environment, masked after its end.

    A fixed number of episodes keeps Monte Carlo returns unbiased; taking those that finish within the horizon would
    favour short episodes.  Every ``poll`` steps one bit is read back to the host: whether any episode still runs.
    """

    whole_episodes = True

    def __init__(self, env: VectorEnv, horizon: int, seed: int = 0, poll: int = 10) -> None:
        super().__init__(env, horizon, seed)
        if env.max_episode_steps is None:
            raise ValueError(f"whole episodes need a time limit, and {env.name} has none: give env.max_episode_steps")
        if horizon < env.max_episode_steps:
            raise ValueError(
                f"whole episodes of {env.name} take up to {env.max_episode_steps} steps, so horizon must be at least "
                f"that, got {horizon}"
            )
        self.poll = poll

    @property
    def host_sync_reason(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.poll >= self.horizon:
            return None
        return f"every {self.poll} steps it is asked whether any episode still runs; with poll={self.horizon} it is not"

    def _collect(self, policy: Policy) -> Rollout:
        self.reset(policy)
        live = torch.ones_like(self.start)
        for t in range(self.horizon):
            if t and t % self.poll == 0 and not bool(live.any()):
                self.buffer.mask_from(t)
                break
            live = live & ~self.step(t, policy, live).done
        return self.buffer.read()
