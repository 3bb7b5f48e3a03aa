"""Collection of the rollouts of several runs at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgsuite.many.env import JointEnv, joined
from pgsuite.many.stack import Generators, Stack
from pgsuite.nn.policy import Policy, PolicyOutput
from pgsuite.rollout import Collector
from pgsuite.types import Rollout, map_obs


class JointCollector:
    """Collects the rollouts of S runs in their joint environments.

    The state stays in the collectors of the runs: it is gathered from them before each rollout and handed back after
    it.  Each run's actions are drawn from the generator of its collector.
    """

    def __init__(self, collectors: Sequence[Collector], env: JointEnv, stack: Stack) -> None:
        first = collectors[0]
        self.collectors, self.env, self.stack = list(collectors), env, stack.within("algo.policy")
        self.whole = type(first)(env, first.horizon)
        if env.poll is not None:
            vars(self.whole)["poll"] = env.poll
        self.whole.act.run = self.act
        self.generators = Generators.of([collector.generator for collector in collectors])
        for collector in collectors:
            collector.seconds = self.whole.seconds

    @torch.no_grad()
    def collect(self, policy: Policy) -> Rollout:
        """The rollouts [S, T, N] of all runs; ``policy`` is the first run's."""
        env, whole = self.env, self.whole
        env.begin()
        new = [not collector.started for collector in self.collectors]
        if not whole.whole_episodes:
            if any(new):
                initial = policy.initial_state(env.each)
                start = torch.ones(env.each, dtype=torch.bool, device=env.device)
                for obs, collector, fresh in zip(env.restart(new), self.collectors, new, strict=True):
                    if fresh:
                        collector.obs, collector.hidden_state, collector.start = obs, initial, start
                        collector.started = True
            for name in ("obs", "hidden_state", "start"):
                setattr(whole, name, joined([getattr(collector, name) for collector in self.collectors]))
            whole.started = True
        self.generators.ahead = env.ahead = 1 if whole.whole_episodes else whole.horizon
        rollout = whole.collect(policy)
        self.generators.settle()
        env.settle()
        rollout = rollout.map(lambda x: x.unflatten(1, (env.count, env.each)).movedim(1, 0).contiguous())
        for s, collector in enumerate(self.collectors):
            collector.started = True
            collector.buffer.set(rollout[s])
            for name in ("obs", "hidden_state", "start"):
                setattr(collector, name, map_obs(lambda x, s=s: x[s * env.each :][: env.each], getattr(whole, name)))
        return rollout

    def act(self, policy: Policy) -> PolicyOutput:
        """Sample the actions of all runs for their current observations."""
        whole, by_run = self.whole, (self.env.count, self.env.each)
        self.generators.drawing = self.env.running
        seen: list[Any] = [
            map_obs(lambda x: x.unflatten(0, by_run), x) for x in (whole.obs, whole.hidden_state, whole.start)
        ]
        found: PolicyOutput = self.stack(self.choose, policy, *seen)
        return PolicyOutput(*(map_obs(lambda x: x.flatten(0, 1), x) for x in found))

    def choose(self, policy: Policy, obs: Any, hidden_state: Any, start: Tensor) -> PolicyOutput:
        return policy.act(obs, hidden_state, start, self.generators)
