"""Two ways to fill a [T, N] rollout."""

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
from pgsuite.types import HiddenState, Obs, Rollout, map_obs


class Collector(ABC):
    """Runs a policy for up to T = horizon steps in N environments, sampling from a generator of its own."""

    whole_episodes = False
    supports_overlap = True  # whether another thread may collect while the policy learns
    is_off_policy = False  # whether an earlier policy than the one that learns may have acted
    host_sync_reason: str | None = (
        None  # what is read back to the host while collecting, and how not to; None where nothing is
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
        self.seconds = {"environment": 0.0, "acting": 0.0}  # host time; on an accelerator, that of launching
        self.obs: Obs
        self.hidden_state: HiddenState
        self.start: Tensor

    @property
    def stepper(self) -> Collector:
        """What has the environments make their steps."""
        return self

    def wait(self) -> None:
        """Let whatever else this process does for it come to its end."""

    def validate(self, policy: Policy) -> None:
        """Raise ValueError for a policy that cannot act here."""

    @abstractmethod
    def _collect(self, policy: Policy) -> Rollout:
        """A rollout [T, N] of views, good until the next one."""

    def reset(self, policy: Policy) -> None:
        """Restart every environment and forget everything."""
        self.obs, self.hidden_state = self.env.reset(), policy.initial_state(self.env.num_envs)
        self.start = torch.ones(self.env.num_envs, dtype=torch.bool, device=self.env.device)
        self.started = True

    def step(self, t: int, policy: Policy, live: Tensor) -> Tensor:
        """One step in every environment, written to row t; returns done [N]."""
        began = perf_counter()
        choice = self.act(policy)
        acted = perf_counter()
        with phase("environments"):
            step = self.env.step(choice.action)
        self.seconds["environment"] += perf_counter() - acted
        self.seconds["acting"] += acted - began
        done = start = step.done
        if step.mask is not None:
            live, start = live & step.mask, done | (self.start & ~step.mask)
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
        )
        with phase("write"):
            self.buffer.write(t, row)
        self.obs, self.hidden_state, self.start = step.obs, choice.hidden_state, start
        return done

    def _act(self, policy: Policy) -> PolicyOutput:
        """What to do about what is seen."""
        return policy.act(self.obs, self.hidden_state, self.start, self.generator)

    def reseed(self) -> None:
        """Draw other actions from here on than would have come."""
        seed = torch.randint(2**62, (), generator=self.generator, device=self.generator.device)
        self.generator.manual_seed(int(seed))

    def state_dict(self) -> dict[str, Any]:
        """Where every environment stands, with all that acting depends on but the policy."""
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
    """T steps from wherever each environment stands; episodes cross iteration borders."""

    def _collect(self, policy: Policy) -> Rollout:
        if not self.started:
            self.reset(policy)
        live = torch.ones_like(self.start)
        for t in range(self.horizon):
            self.step(t, policy, live)
        return self.buffer.read()


class EpisodeCollector(Collector):
    """One whole episode per environment, masked once it ends.

    Counting a fixed number of episodes, rather than those that happen to finish in time, is what keeps Monte Carlo
    returns unbiased: waiting for the finished ones favours short ones.  Every ``poll`` steps the host asks whether any
    episode still runs, and stops if none does; that one bit is all it reads.
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
            live = live & ~self.step(t, policy, live)
        return self.buffer.read()
