"""Action distributions over any leading dims [...].

Tensors in, tensors out, and no state: a policy makes one per look at its observations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Generator, Tensor
from torch.nn.functional import softplus


class Distribution(Protocol):
    def sample(self, generator: Generator | None = None) -> Tensor:
        """An action [..., *A]."""
        ...

    def mode(self) -> Tensor:
        """The likeliest action [..., *A]."""
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
        """The same distribution, through which no gradient flows."""
        ...


LOG_SIGMA_FLOOR = -20.0


@dataclass(frozen=True)
class Gaussian:
    """Diagonal.  ``log_sigma`` must broadcast to ``mean``; it is held above -20, so that sigma, which is its
    exponential, is positive and its square representable in float32 whatever an optimizer does."""

    mean: Tensor  # [..., A]
    log_sigma: Tensor  # [A] or [..., A]

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_sigma", self.log_sigma.clamp(min=LOG_SIGMA_FLOOR))

    def sample(self, generator: Generator | None = None) -> Tensor:
        noise = torch.empty_like(self.mean).normal_(generator=generator)
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
class Categorical:
    """``logits`` must be normalized: their exponentials sum to one."""

    logits: Tensor  # [..., A]

    def sample(self, generator: Generator | None = None) -> Tensor:
        noise = torch.empty_like(self.logits).exponential_(generator=generator)
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


@dataclass(frozen=True)
class MultiCategorical:
    """Independent choices, one for each of ``logits``, which must be normalized."""

    logits: tuple[Tensor, ...]  # [..., n] each

    @property
    def parts(self) -> list[Categorical]:
        return [Categorical(x) for x in self.logits]

    def sample(self, generator: Generator | None = None) -> Tensor:
        return torch.stack([part.sample(generator) for part in self.parts], -1)

    def mode(self) -> Tensor:
        return torch.stack([part.mode() for part in self.parts], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        each = zip(self.parts, action.unbind(-1), strict=True)
        return torch.stack([part.log_prob(x) for part, x in each]).sum(0)

    def entropy(self) -> Tensor:
        return torch.stack([part.entropy() for part in self.parts]).sum(0)

    def kl(self, other: MultiCategorical) -> Tensor:
        return torch.stack([p.kl(q) for p, q in zip(self.parts, other.parts, strict=True)]).sum(0)

    def detach(self) -> MultiCategorical:
        return MultiCategorical(tuple(x.detach() for x in self.logits))


@dataclass(frozen=True)
class Bernoulli:
    """Independent choices of 0 or 1.  Written with softplus, which no logit overflows."""

    logits: Tensor  # [..., A] log of the odds of a 1

    def sample(self, generator: Generator | None = None) -> Tensor:
        return (torch.empty_like(self.logits).uniform_(generator=generator) < self.logits.sigmoid()).long()

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
