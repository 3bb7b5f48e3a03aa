"""Policies and critics.  Both read obs [..., *O], memory [..., H] and start [...] from whatever they are given; those
without memory look at obs alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from gymnasium import spaces
from torch import Generator, Tensor

from pgsuite.nn.distributions import Distribution
from pgsuite.nn.heads import Sigma, make_head
from pgsuite.nn.network import Network
from pgsuite.nn.normalize import Standardize
from pgsuite.types import ACTION_MASK, Metrics, Obs, Rollout


class Seen(Protocol):
    """What a network may look at; a Rollout and a Batch both are one."""

    @property
    def obs(self) -> Obs: ...
    @property
    def memory(self) -> Tensor: ...
    @property
    def start(self) -> Tensor: ...


class Choice(NamedTuple):
    """What a policy does about one observation of each environment."""

    action: Tensor  # [N, *A]
    logp: Tensor  # [N]
    memory: Tensor  # [N, H] to carry on with


class Policy(Network):
    """A feed-forward policy over observations [..., *O]."""

    sequential = False  # whether minibatches must be whole columns in time order

    def __init__(
        self,
        obs_norm: Standardize,
        action_space: spaces.Space[Any],
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        convolutions: Iterable[Sequence[int]] | None = None,
        distribution: str = "auto",
        log_sigma: float | None = None,
        sigma: Sigma = "free",
        generator: Generator | None = None,
    ) -> None:
        head = make_head(action_space, distribution, log_sigma=log_sigma, sigma=sigma)
        super().__init__(
            obs_norm,
            head.inputs,
            privileged=False,
            last_gain=0.01,
            hidden=hidden,
            activation=activation,
            convolutions=convolutions,
            generator=generator,
        )
        self.head = head

    def observe(self, rollout: Rollout) -> None:
        """Take in what was seen.  Statistics move only here, between one update and the next rollout."""
        self.obs_norm.update(rollout.obs, rollout.mask)

    def blank(self, num_envs: int) -> Tensor:
        """The memory [N, H] of having seen nothing."""
        return torch.zeros(num_envs, 0, device=next(self.parameters()).device)

    def dist(self, seen: Seen) -> Distribution:
        return self.look(seen.obs)

    def look(self, obs: Obs) -> Distribution:
        allowed = obs[ACTION_MASK] if isinstance(obs, dict) and ACTION_MASK in obs else None
        return self.head(self.read(obs), allowed)

    @torch.no_grad()
    def act(
        self,
        obs: Obs,
        memory: Tensor,
        start: Tensor,
        generator: Generator | None = None,
        *,
        deterministic: bool = False,
    ) -> Choice:
        """Sample an action for each environment, or take the likeliest."""
        dist = self.look(obs)
        action = dist.mode() if deterministic else dist.sample(generator)
        return Choice(action, dist.log_prob(action), memory)

    def watch(self) -> Metrics:
        """What a practitioner keeps an eye on."""
        return self.head.watch()


class Critic(Network):
    """State values [...] of observations [..., *O]."""

    def __init__(
        self,
        obs_norm: Standardize,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        convolutions: Iterable[Sequence[int]] | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(
            obs_norm,
            1,
            privileged=True,
            last_gain=1.0,
            hidden=hidden,
            activation=activation,
            convolutions=convolutions,
            generator=generator,
        )

    def forward(self, seen: Seen) -> Tensor:
        return self.value(seen.obs)

    def value(self, obs: Obs) -> Tensor:
        return self.read(obs).squeeze(-1)

    def bootstrap(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The value [T, N] of each step and of its true successor."""
        return self(rollout), self.value(rollout.next_obs)
