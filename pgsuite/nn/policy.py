"""Policies and critics.  Both read obs [..., *O], memory [..., H] and start [...] from whatever they are given; those
without memory look at obs alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from gymnasium import spaces
from torch import Generator, Tensor, nn

from pgsuite.nn.distributions import Bernoulli, Categorical, Distribution, Gaussian, MultiCategorical
from pgsuite.nn.network import Network
from pgsuite.nn.normalize import Standardize
from pgsuite.types import Metrics, Obs, Rollout


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


class GaussianHead(nn.Module):
    """Means [..., A] to a diagonal Gaussian whose sigma is a parameter of its own."""

    def __init__(self, size: int, log_sigma: float) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.full((size,), log_sigma))

    def forward(self, mean: Tensor) -> Gaussian:
        return Gaussian(mean, self.log_sigma)

    def watch(self) -> Metrics:
        return {"sigma": self.log_sigma.detach().exp().mean()}


class Unwatched(nn.Module):
    """A head without parameters."""

    def watch(self) -> Metrics:
        return {}


class CategoricalHead(Unwatched):
    """Logits [..., A] to a categorical distribution."""

    def forward(self, logits: Tensor) -> Categorical:
        return Categorical(logits.log_softmax(-1))


class MultiCategoricalHead(Unwatched):
    """Logits [..., sum of sizes] to several independent choices."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, logits: Tensor) -> MultiCategorical:
        return MultiCategorical(tuple(x.log_softmax(-1) for x in logits.split(self.sizes, -1)))


class BernoulliHead(Unwatched):
    """Logits [..., A] to independent yes-or-no choices."""

    def forward(self, logits: Tensor) -> Bernoulli:
        return Bernoulli(logits)


Head = GaussianHead | CategoricalHead | MultiCategoricalHead | BernoulliHead


def make_head(space: spaces.Space[Any], log_sigma: float | None) -> tuple[int, Head]:
    """How many numbers the action space asks of a network, and what makes a distribution of them.

    Raises ValueError for a space with no distribution here, and for a sigma where actions are discrete.
    """
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        size = math.prod(space.shape)
        return size, GaussianHead(size, -0.5 if log_sigma is None else log_sigma)
    if log_sigma is not None:
        raise ValueError(f"policy.log_sigma is for continuous actions, and these are {space}: leave it out")
    if isinstance(space, spaces.Discrete):
        return int(space.n), CategoricalHead()
    if isinstance(space, spaces.MultiDiscrete):
        sizes = tuple(int(n) for n in space.nvec.flatten())
        return sum(sizes), MultiCategoricalHead(sizes)
    if isinstance(space, spaces.MultiBinary):
        size = math.prod(space.shape)
        return size, BernoulliHead()
    raise ValueError(f"no policy for actions {space}: Box of floats, Discrete, MultiDiscrete and MultiBinary have one")


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
        log_sigma: float | None = None,
        generator: Generator | None = None,
    ) -> None:
        size, head = make_head(action_space, log_sigma)
        super().__init__(
            obs_norm,
            size,
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
        return self.head(self.read(seen.obs))

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
        dist = self.head(self.read(obs))
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
