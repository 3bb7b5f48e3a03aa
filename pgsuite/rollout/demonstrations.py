"""Rollouts of recorded episodes in place of environments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pgsuite import distributed
from pgsuite.envs.base import VectorEnv
from pgsuite.nn.policy import Policy, log_prob
from pgsuite.rollout.collect import Collector
from pgsuite.types import Obs, Rollout, map_obs


@dataclass(frozen=True)
class Demonstrations:
    """The L steps of recorded episodes, one episode after the other."""

    obs: Obs  # [L, *O]
    action: Tensor  # [L, *A]
    start: Tensor  # [L] bool, the first step of an episode


class DemonstrationCollector(Collector):
    """Windows of T recorded steps, each of which continues the one before; the N columns begin evenly spread over the
    demonstrations, which start over at their end.  The environments only say what an observation and an action are.

    Rewards are zero, no episode ends, ``logp`` is that of the present policy, and a recurrent policy begins each window
    in its initial state.
    """

    supports_overlap = False

    def __init__(self, env: VectorEnv, horizon: int, seed: int, demonstrations: Demonstrations) -> None:
        super().__init__(env, horizon, seed)
        self.data = Demonstrations(
            map_obs(lambda x: x.to(env.device), demonstrations.obs),
            demonstrations.action.to(env.device),
            demonstrations.start.to(env.device),
        )
        self.length = len(demonstrations.start)
        columns = torch.arange(env.num_envs, device=env.device) + distributed.rank() * env.num_envs
        self.first = columns * self.length // (env.num_envs * distributed.size())  # [N]
        self.position = torch.zeros((), dtype=torch.long, device=env.device)  # steps that every column has made

    def _collect(self, policy: Policy) -> Rollout:
        steps = self.position + torch.arange(self.horizon, device=self.env.device)
        index = (steps.unsqueeze(-1) + self.first) % self.length
        self.position.copy_((self.position + self.horizon) % self.length)
        obs, start = map_obs(lambda x: x[index], self.data.obs), self.data.start[index]
        start[0].fill_(True)
        nothing, never = torch.zeros(index.shape, device=index.device), torch.zeros_like(start)
        initial = policy.initial_state(self.env.num_envs)
        rollout = Rollout(
            obs=obs,
            hidden_state={name: x.unsqueeze(0) for name, x in initial.items()},
            start=start,
            action=self.data.action[index],
            logp=nothing,
            reward=nothing,
            next_obs=obs,
            terminated=never,
            truncated=never,
            mask=~never,
        )
        with torch.no_grad():
            rollout = replace(rollout, logp=log_prob(policy, rollout))
        self.buffer.set(rollout)
        return rollout

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"position": self.position.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.position.copy_(state["position"])
