"""Policies and critics.  Both read obs [..., *O], memory [..., H] and start [...] from whatever they are given; those
without memory look at obs alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from gymnasium import spaces
from torch import Generator, Tensor, nn

from pgsuite.nn.distributions import Categorical, Distribution, Gaussian
from pgsuite.nn.normalize import Standardize
from pgsuite.types import Metrics, Obs, Rollout


class Tanh(nn.Module):
    """tanh x = 1 - 2 sigmoid(-2 x): on a CPU, torch's own tanh takes several times as long as its sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.rsub((-2 * x).sigmoid_(), 1, alpha=2)


ACTIVATIONS = {"tanh": Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


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


def mlp(sizes: Sequence[int], activation: str, last_gain: float, generator: Generator | None = None) -> nn.Sequential:
    """Linear layers of these sizes; orthogonal weights of gain sqrt 2, and last_gain for the last; zero biases."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")  # drawn once, from our generator
        nn.init.orthogonal_(linear.weight, last_gain if last else math.sqrt(2), generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class GaussianHead(nn.Module):
    """Means [..., A] to a diagonal Gaussian whose sigma is a parameter of its own."""

    def __init__(self, size: int, log_sigma: float) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.full((size,), log_sigma))

    def forward(self, mean: Tensor) -> Gaussian:
        return Gaussian(mean, self.log_sigma)

    def watch(self) -> Metrics:
        return {"sigma": self.log_sigma.detach().exp().mean()}


class CategoricalHead(nn.Module):
    """Logits [..., A] to a categorical distribution."""

    def forward(self, logits: Tensor) -> Categorical:
        return Categorical(logits.log_softmax(-1))

    def watch(self) -> Metrics:
        return {}


def make_head(space: spaces.Space[Any], log_sigma: float | None) -> tuple[int, GaussianHead | CategoricalHead]:
    """How many numbers the action space asks of a network, and what makes a distribution of them.

    Raises ValueError for a space with no distribution here, and for a sigma where actions are discrete.
    """
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        return space.shape[0], GaussianHead(space.shape[0], -0.5 if log_sigma is None else log_sigma)
    if isinstance(space, spaces.Discrete):
        if log_sigma is not None:
            raise ValueError(f"policy.log_sigma is for continuous actions, and these are {space}: leave it out")
        return int(space.n), CategoricalHead()
    raise ValueError(f"no policy for actions {space}: Box with one dimension and Discrete have one")


class Policy(nn.Module):
    """A feed-forward policy over observations [..., *O]."""

    sequential = False  # whether minibatches must be whole columns in time order

    def __init__(
        self,
        obs_norm: Standardize,
        action_space: spaces.Space[Any],
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        log_sigma: float | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        size, head = make_head(action_space, log_sigma)
        self.obs_norm, self.head = obs_norm, head
        self.net = mlp((*obs_norm.shape, *hidden, size), activation, last_gain=0.01, generator=generator)

    def observe(self, rollout: Rollout) -> None:
        """Take in what was seen.  Statistics move only here, between one update and the next rollout."""
        self.obs_norm.update(rollout.obs, rollout.mask)

    def blank(self, num_envs: int) -> Tensor:
        """The memory [N, H] of having seen nothing."""
        return torch.zeros(num_envs, 0, device=next(self.parameters()).device)

    def dist(self, seen: Seen) -> Distribution:
        return self.head(self.net(self.obs_norm(seen.obs)))

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
        dist = self.head(self.net(self.obs_norm(obs)))
        action = dist.mode() if deterministic else dist.sample(generator)
        return Choice(action, dist.log_prob(action), memory)

    def watch(self) -> Metrics:
        """What a practitioner keeps an eye on."""
        return self.head.watch()


class Critic(nn.Module):
    """State values [...] of observations [..., *O]."""

    def __init__(
        self,
        obs_norm: Standardize,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self.obs_norm = obs_norm
        self.net = mlp((*obs_norm.shape, *hidden, 1), activation, last_gain=1.0, generator=generator)

    def forward(self, seen: Seen) -> Tensor:
        return self.value(seen.obs)

    def value(self, obs: Obs) -> Tensor:
        return self.net(self.obs_norm(obs)).squeeze(-1)

    def bootstrap(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The value [T, N] of each step and of its true successor."""
        return self(rollout), self.value(rollout.next_obs)
