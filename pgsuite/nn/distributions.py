"""Action distributions over any leading dims [...].

Distributions are stateless functions of tensors; a policy constructs one in each forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Generator, Tensor
from torch.nn.functional import softplus


class Distribution(Protocol):
    def sample(self, generator: Generator | None = None) -> Tensor:
        """An action [..., *A]."""
        ...

    def mode(self) -> Tensor:
        """The mode: the most likely action [..., *A]."""
        ...

    def log_prob(self, action: Tensor) -> Tensor:
        """[...], summed over action dims."""
        ...

    def entropy(self) -> Tensor:
        """[...] in nats."""
        ...

    def kl(self, other: Self) -> Tensor:
        """KL(self || other) [...] in nats."""
        ...

    def detach(self) -> Self:
        """The same distribution with detached parameters."""
        ...


NoiseDistribution = Literal["standard_normal", "standard_exponential", "uniform"]


class Reparameterized:
    """A distribution whose samples are a deterministic function of its parameters and of independent noise [...], which
    follows ``noise_distribution``; uniform noise lies in [0, 1)."""

    noise_distribution: ClassVar[NoiseDistribution]

    def noise(self, generator: Generator | None = None) -> Tensor:
        raise NotImplementedError

    def from_noise(self, noise: Tensor) -> Tensor:
        """The action [..., *A] for given noise."""
        raise NotImplementedError

    def sample(self, generator: Generator | None = None) -> Tensor:
        return self.from_noise(self.noise(generator))


LOG_SIGMA_RANGE = (-20.0, 20.0)


@dataclass(frozen=True)
class Gaussian(Reparameterized):
    """Diagonal Gaussian.  ``log_sigma`` must broadcast to ``mean``; it is clamped to +-20, so that sigma is positive
    and its square representable in float32 whatever the parameters are."""

    mean: Tensor  # [..., A]
    log_sigma: Tensor  # [A] or [..., A]
    noise_distribution = "standard_normal"

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_sigma", self.log_sigma.clamp(*LOG_SIGMA_RANGE))

    def noise(self, generator: Generator | None = None) -> Tensor:
        return torch.empty_like(self.mean).normal_(generator=generator)

    def from_noise(self, noise: Tensor) -> Tensor:
        return torch.addcmul(self.mean, self.log_sigma.exp(), noise)

    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.mean) * (-self.log_sigma).exp()
        return -0.5 * z.square().sum(-1) - (self.log_sigma + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_sigma + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).expand(self.mean.shape[:-1])

    def kl(self, other: Gaussian) -> Tensor:
        precision = (-2 * other.log_sigma).exp()
        spread = (2 * self.log_sigma).exp() * precision + (self.mean - other.mean) ** 2 * precision
        return (0.5 * (spread - 1) + other.log_sigma - self.log_sigma).sum(-1)

    def detach(self) -> Gaussian:
        return Gaussian(self.mean.detach(), self.log_sigma.detach())


@dataclass(frozen=True)
class Categorical(Reparameterized):
    """``logits`` must be normalized: their exponentials sum to one."""

    logits: Tensor  # [..., A]
    noise_distribution = "standard_exponential"

    def noise(self, generator: Generator | None = None) -> Tensor:
        return torch.empty_like(self.logits).exponential_(generator=generator)

    def from_noise(self, noise: Tensor) -> Tensor:
        return (self.logits - noise.log()).argmax(-1)

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.logits.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.logits.exp() * self.logits).sum(-1)

    def kl(self, other: Categorical) -> Tensor:
        return (self.logits.exp() * (self.logits - other.logits)).sum(-1)

    def detach(self) -> Categorical:
        return Categorical(self.logits.detach())


class Independent:
    """A distribution of independent parts: log-probability, entropy and KL are sums over them."""

    @property
    def parts(self) -> Sequence[Distribution]:
        raise NotImplementedError

    def split(self, action: Tensor) -> Iterable[Tensor]:
        """The action of each part."""
        raise NotImplementedError

    def log_prob(self, action: Tensor) -> Tensor:
        each = zip(self.parts, self.split(action), strict=True)
        return torch.stack([part.log_prob(x) for part, x in each]).sum(0)

    def entropy(self) -> Tensor:
        return torch.stack([part.entropy() for part in self.parts]).sum(0)

    def kl(self, other: Self) -> Tensor:
        return torch.stack([p.kl(q) for p, q in zip(self.parts, other.parts, strict=True)]).sum(0)


@dataclass(frozen=True)
class MultiCategorical(Independent, Reparameterized):
    """Independent categorical distributions, one for each of ``logits``, which must be normalized."""

    logits: tuple[Tensor, ...]  # [..., n] each
    noise_distribution = "standard_exponential"

    @property
    def parts(self) -> list[Categorical]:
        return [Categorical(x) for x in self.logits]

    def split(self, action: Tensor) -> Iterable[Tensor]:
        return action.unbind(-1)

    def noise(self, generator: Generator | None = None) -> Tensor:
        return torch.cat([part.noise(generator) for part in self.parts], -1)

    def from_noise(self, noise: Tensor) -> Tensor:
        each = zip(self.parts, noise.split([x.shape[-1] for x in self.logits], -1), strict=True)
        return torch.stack([part.from_noise(x) for part, x in each], -1)

    def mode(self) -> Tensor:
        return torch.stack([part.mode() for part in self.parts], -1)

    def detach(self) -> MultiCategorical:
        return MultiCategorical(tuple(x.detach() for x in self.logits))


@dataclass(frozen=True)
class Bernoulli(Reparameterized):
    """Independent Bernoulli distributions.  Computed with softplus, which does not overflow for any logit."""

    logits: Tensor  # [..., A] log-odds of a 1
    noise_distribution = "uniform"

    def noise(self, generator: Generator | None = None) -> Tensor:
        return torch.empty_like(self.logits).uniform_(generator=generator)

    def from_noise(self, noise: Tensor) -> Tensor:
        return (noise < self.logits.sigmoid()).long()

    def mode(self) -> Tensor:
        return (self.logits > 0).long()

    def log_prob(self, action: Tensor) -> Tensor:
        return (action * self.logits - softplus(self.logits)).sum(-1)

    def entropy(self) -> Tensor:
        return (softplus(self.logits) - self.logits.sigmoid() * self.logits).sum(-1)

    def kl(self, other: Bernoulli) -> Tensor:
        gap = self.logits - other.logits
        return (self.logits.sigmoid() * gap + softplus(other.logits) - softplus(self.logits)).sum(-1)

    def detach(self) -> Bernoulli:
        return Bernoulli(self.logits.detach())


class Slot(NamedTuple):
    """Where the numbers of a part are within those of a joined action."""

    name: str
    size: int  # numbers
    whole: bool  # whole numbers, which the part's distribution takes as integers
    scalar: bool  # the part's distribution takes a number rather than a vector


@dataclass(frozen=True)
class Joined(Independent):
    """Distributions of the parts of an action [..., A], whose numbers follow one another as ``slots`` says."""

    each: tuple[Distribution, ...]
    slots: tuple[Slot, ...]

    @property
    def parts(self) -> Sequence[Distribution]:
        return self.each

    def join(self, actions: Iterable[Tensor]) -> Tensor:
        columns = [x.unsqueeze(-1) if slot.scalar else x for x, slot in zip(actions, self.slots, strict=True)]
        return torch.cat(columns, -1)

    def split(self, action: Tensor) -> Iterator[Tensor]:
        for x, slot in zip(action.split([slot.size for slot in self.slots], -1), self.slots, strict=True):
            x = x.long() if slot.whole else x
            yield x.squeeze(-1) if slot.scalar else x

    def sample(self, generator: Generator | None = None) -> Tensor:
        return self.join(part.sample(generator) for part in self.parts)

    def mode(self) -> Tensor:
        return self.join(part.mode() for part in self.parts)

    def detach(self) -> Joined:
        return Joined(tuple(part.detach() for part in self.parts), self.slots)


def into_unit(action: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map an action from its bounds to (0, 1).  The bounds themselves, which rounding may reach, are moved to the
    nearest interior numbers, so that every action has a finite log-probability."""
    eps = torch.finfo(action.dtype).eps
    return ((action - low) / (high - low)).clamp(eps, 1 - eps)


def log_slope(x: Tensor) -> Tensor:
    """log of the derivative of sigmoid(2 x), without overflow."""
    return math.log(2.0) - 2 * x - 2 * softplus(-2 * x)


def hermite(count: int) -> Tensor:
    """Nodes and weights [2, count] for the mean of a function of a standard normal (Golub and Welsch, 1969)."""
    off = torch.arange(1, count, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return torch.stack([nodes, vectors[0].square()])


HERMITE = hermite(32)


@dataclass(frozen=True)
class Squashed(Reparameterized):
    """A Gaussian squashed by tanh to the bounds ``low`` and ``high`` [A] (Haarnoja et al., 2018, appendix C)."""

    base: Gaussian
    low: Tensor
    high: Tensor
    quadrature: Tensor = HERMITE  # for the entropy
    noise_distribution = "standard_normal"

    def squash(self, x: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * (2 * x).sigmoid()

    def noise(self, generator: Generator | None = None) -> Tensor:
        return self.base.noise(generator)

    def from_noise(self, noise: Tensor) -> Tensor:
        return self.squash(self.base.from_noise(noise))

    def mode(self) -> Tensor:
        """The squashed mode of the Gaussian, which is the median; the density itself may peak at the bounds."""
        return self.squash(self.base.mode())

    def log_prob(self, action: Tensor) -> Tensor:
        x = into_unit(action, self.low, self.high).logit() / 2
        return self.base.log_prob(x) - log_slope(x).sum(-1) - (self.high - self.low).log().sum(-1)

    def entropy(self) -> Tensor:
        """By Gauss-Hermite quadrature; the error per action dim is below 1e-4 nats for sigmas up to 1, 2e-3 up to e."""
        nodes, weights = self.quadrature.to(self.base.mean)
        sigma = self.base.log_sigma.exp().unsqueeze(-1)
        slope = (log_slope(self.base.mean.unsqueeze(-1) + sigma * nodes) * weights).sum((-1, -2))
        return self.base.entropy() + slope + (self.high - self.low).log().sum(-1)

    def kl(self, other: Squashed) -> Tensor:
        """The KL of the Gaussians, since KL is invariant under the common bijection."""
        return self.base.kl(other.base)

    def detach(self) -> Squashed:
        return Squashed(self.base.detach(), self.low, self.high, self.quadrature)


@dataclass(frozen=True)
class Beta:
    """Beta distribution on the bounds ``low`` and ``high`` [A], with alpha and beta of at least one.

    Differences of log-gamma functions are taken in float64: above a concentration of a thousand, float32 leaves noise.
    """

    alpha: Tensor  # [..., A]
    beta: Tensor  # [..., A]
    low: Tensor
    high: Tensor

    def sample(self, generator: Generator | None = None) -> Tensor:
        gamma = torch._standard_gamma  # pyright: ignore[reportPrivateImportUsage]
        a, b = (gamma(x, generator=generator) for x in (self.alpha, self.beta))
        return self.low + (self.high - self.low) * a / (a + b)

    def mode(self) -> Tensor:
        return self.low + (self.high - self.low) * (self.alpha - 1) / (self.alpha + self.beta - 2).clamp(min=1e-6)

    @property
    def concentrations(self) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, beta and their sum, in float64."""
        a, b = self.alpha.double(), self.beta.double()
        return a, b, a + b

    def log_normalizer(self) -> Tensor:
        a, b, total = self.concentrations
        return a.lgamma() + b.lgamma() - total.lgamma()

    def log_prob(self, action: Tensor) -> Tensor:
        x = into_unit(action, self.low, self.high)
        a, b, _ = self.concentrations
        density = (a - 1) * x.log() + (b - 1) * (-x).log1p() - self.log_normalizer()
        return (density - (self.high - self.low).log()).sum(-1).to(action.dtype)

    def entropy(self) -> Tensor:
        a, b, total = self.concentrations
        own = self.log_normalizer() - (a - 1) * a.digamma() - (b - 1) * b.digamma()
        return (own + (total - 2) * total.digamma() + (self.high - self.low).log()).sum(-1).to(self.alpha.dtype)

    def kl(self, other: Beta) -> Tensor:
        a, b, total = self.concentrations
        more_a, more_b = a - other.alpha, b - other.beta
        means = more_a * a.digamma() + more_b * b.digamma() - (more_a + more_b) * total.digamma()
        return (other.log_normalizer() - self.log_normalizer() + means).sum(-1).to(self.alpha.dtype)

    def detach(self) -> Beta:
        return Beta(self.alpha.detach(), self.beta.detach(), self.low, self.high)
