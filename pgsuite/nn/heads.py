"""Heads, which map the outputs of a network to an action distribution.

A custom head is a subclass of ``Head``, chosen by its dotted path: ``policy.distribution=my_package.MyHead``.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn.functional import softplus

from pgsuite.components import Component, component_class, make_component
from pgsuite.nn.distributions import (
    HERMITE,
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Gaussian,
    Joined,
    MultiCategorical,
    Slot,
    Squashed,
)
from pgsuite.types import Metrics, masked_mean

Sigma = Literal["free", "state"]
FORBIDDEN = -1e8  # logit of a masked action: its probability is zero, and gradients stay finite


class Head(nn.Module, ABC):
    """Maps ``inputs`` network outputs to an action distribution.  Raises ValueError for unsupported action spaces."""

    inputs: int

    @abstractmethod
    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, numbers: Tensor, allowed: Tensor | None = None) -> Distribution:
        """The action distribution for network outputs [..., inputs].  ``allowed`` is the mask of discrete actions, in
        the order of the logits."""

    def unit_entropy(self, dist: Distribution) -> Tensor:
        """The entropy [...] in nats, of actions in units of half the width of their Box."""
        return dist.entropy()

    def metrics(self, action: Tensor, mask: Tensor) -> Metrics:
        """Diagnostics of the distribution's own parameters, and of actions [..., *A] where mask [...] is true."""
        return {}

    def refuse(self, wanted: str, space: spaces.Space[Any]) -> ValueError:
        name = type(self).__name__.removesuffix("Head").lower()
        return ValueError(f"policy.distribution={name} is for {wanted}, and actions are {space}")


class GaussianHead(Head):
    """A diagonal Gaussian.  Its log standard deviation is a free parameter; with ``sigma="state"`` the network's output
    is added to it.

    With ``normalize_actions``, mean and standard deviation are in units of half the width of the Box, from its middle,
    so that a policy begins in the middle and explores the same share of any Box.  The environment clips actions to the
    Box.
    """

    middle: Tensor
    half_width: Tensor
    log_half_width: Tensor

    def __init__(
        self,
        space: spaces.Space[Any],
        log_sigma: float = -0.5,
        sigma: Sigma = "free",
        normalize_actions: bool = True,
    ) -> None:
        super().__init__(space)
        if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
            raise self.refuse("a Box of floats", space)
        size = math.prod(space.shape)
        self.state_dependent, self.inputs = sigma == "state", size * (1 + (sigma == "state"))
        self.log_sigma = nn.Parameter(torch.full((size,), log_sigma))
        self.bounds = Bounds(space)
        middle, half_width = normalization(space)
        self.normalize_actions = normalize_actions and bool((middle != 0).any() or (half_width != 1).any())
        for name, x in {"middle": middle, "half_width": half_width, "log_half_width": half_width.log()}.items():
            self.register_buffer(name, x, persistent=False)

    def forward(self, numbers: Tensor, allowed: Tensor | None = None) -> Distribution:
        gaussian = self.gaussian(numbers)
        if not self.normalize_actions:
            return gaussian
        mean = torch.addcmul(self.middle, gaussian.mean, self.half_width)
        return Gaussian(mean, gaussian.log_sigma + self.log_half_width)

    def gaussian(self, numbers: Tensor) -> Gaussian:
        if not self.state_dependent:
            return Gaussian(numbers, self.log_sigma)
        mean, more = numbers.chunk(2, -1)
        return Gaussian(mean, self.log_sigma + more)

    def unit_entropy(self, dist: Distribution) -> Tensor:
        return dist.entropy() - self.log_half_width.sum()

    def metrics(self, action: Tensor, mask: Tensor) -> Metrics:
        outside = (action < self.bounds.low) | (action > self.bounds.high)
        clipped = masked_mean(outside.to(self.log_sigma.dtype).mean(-1), mask)
        return {"sigma": self.log_sigma.detach().exp().mean(), "action_clip_fraction": clipped}


class Bounds(nn.Module):
    """The bounds [A] of a Box, as buffers."""

    low: Tensor
    high: Tensor

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__()
        assert isinstance(space, spaces.Box)
        for name in ("low", "high"):
            self.register_buffer(name, torch.as_tensor(getattr(space, name)).flatten().clone(), persistent=False)


def normalization(space: spaces.Box) -> tuple[Tensor, Tensor]:
    """The middle and half the width [A] of a Box, by dimension.

    A dimension without bounds has middle 0 and half width 1, and one with a single bound lies one beyond it.  A
    dimension of a single value keeps half width 1, since it is clipped to that value.  Bounds beyond +-1e9 count as
    none: they stand for any number.
    """
    low, high = (torch.as_tensor(x).flatten().double() for x in (space.low, space.high))
    has_low, has_high = low > -1e9, high < 1e9
    only_one = torch.where(has_low, low + 1, torch.where(has_high, high - 1, 0.0))
    middle = torch.where(has_low & has_high, (low + high) / 2, only_one)
    half_width = torch.where(has_low & has_high & (high > low), (high - low) / 2, 1.0)
    return middle.to(torch.get_default_dtype()), half_width.to(torch.get_default_dtype())


def bounded(space: spaces.Space[Any]) -> bool:
    """Whether every dimension of a Box of floats has two bounds.  Raises ValueError for a dimension of one value."""
    if not (isinstance(space, spaces.Box) and space.dtype.kind == "f" and space.is_bounded()):
        return False
    if (same := (space.high <= space.low).flatten().nonzero()[0]).size:
        value = float(space.low.flat[same[0]])
        raise ValueError(
            f"dimension {same[0]} of actions {space} has the single value {value:g}, and a distribution on its bounds "
            "needs low < high: take policy.distribution=gaussian, or leave that dimension out of the action space"
        )
    return True


class SquashedHead(GaussianHead):
    """A Gaussian squashed to the bounds by tanh."""

    quadrature: Tensor

    def __init__(self, space: spaces.Space[Any], log_sigma: float = -0.5, sigma: Sigma = "free") -> None:
        super().__init__(space, log_sigma, sigma)
        if not bounded(space):
            raise self.refuse("a bounded Box", space)
        self.register_buffer("quadrature", HERMITE.float(), persistent=False)

    def forward(self, numbers: Tensor, allowed: Tensor | None = None) -> Distribution:
        return Squashed(self.gaussian(numbers), self.bounds.low, self.bounds.high, self.quadrature)

    def metrics(self, action: Tensor, mask: Tensor) -> Metrics:
        return {"sigma": self.log_sigma.detach().exp().mean()}


class BetaHead(Head):
    """A unimodal Beta distribution on the bounds (Chou et al., 2017)."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__(space)
        if not bounded(space):
            raise self.refuse("a bounded Box", space)
        self.bounds = Bounds(space)
        self.inputs = 2 * len(self.bounds.low)

    def forward(self, numbers: Tensor, allowed: Tensor | None = None) -> Distribution:
        alpha, beta = (1 + softplus(numbers)).chunk(2, -1)
        return Beta(alpha, beta, self.bounds.low, self.bounds.high)


class CategoricalHead(Head):
    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__(space)
        if not isinstance(space, spaces.Discrete):
            raise self.refuse("Discrete", space)
        self.inputs = int(space.n)

    def forward(self, numbers: Tensor, allowed: Tensor | None = None) -> Distribution:
        return Categorical(permitted(numbers, allowed).log_softmax(-1))


class MultiCategoricalHead(Head):
    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__(space)
        if not isinstance(space, spaces.MultiDiscrete):
            raise self.refuse("MultiDiscrete", space)
        self.sizes = tuple(int(n) for n in space.nvec.flatten())
        self.inputs = sum(self.sizes)

    def forward(self, numbers: Tensor, allowed: Tensor | None = None) -> Distribution:
        logits = permitted(numbers, allowed).split(self.sizes, -1)
        return MultiCategorical(tuple(x.log_softmax(-1) for x in logits))


class BernoulliHead(Head):
    """Independent Bernoulli distributions; the mask forbids ones."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__(space)
        if not isinstance(space, spaces.MultiBinary):
            raise self.refuse("MultiBinary", space)
        self.inputs = math.prod(space.shape)

    def forward(self, numbers: Tensor, allowed: Tensor | None = None) -> Distribution:
        return Bernoulli(permitted(numbers, allowed))


class JoinedHead(Head):
    """A head for each part of a Dict or Tuple of actions; the parts are independent given the observation.

    The numbers of an action [..., A] are those of its parts, one after the other.  The entries of a mask are in the
    order of gymnasium's flattened space; those for a Box have no effect.
    """

    def __init__(self, space: spaces.Space[Any], distribution: Component = "auto", **options: Any) -> None:
        super().__init__(space)
        parts = list(leaves(space))  # whose names may be equal: {"a": {"b": ...}, "a.b": ...}
        if not parts:
            raise ValueError(f"no policy for actions {space}, which have no parts")
        boxes = any(isinstance(part, spaces.Box) for _, part in parts)
        self.heads, self.slots, self.masks = nn.ModuleList(), [], []
        for name, part in parts:
            box = isinstance(part, spaces.Box)
            chosen = box or not boxes  # by what is said of Boxes, which no other part would take
            self.heads.append(make_head(part, distribution, **options) if chosen else make_head(part))
            size, scalar = math.prod(part.shape or ()), isinstance(part, spaces.Discrete)
            self.slots.append(Slot(name, size, whole=not box, scalar=scalar))
            self.masks.append(spaces.flatdim(part))
        self.inputs = sum(head.inputs for head in self.each)

    @property
    def each(self) -> list[Head]:
        return [head for head in self.heads if isinstance(head, Head)]

    def forward(self, numbers: Tensor, allowed: Tensor | None = None) -> Distribution:
        masks = [None] * len(self.slots) if allowed is None else allowed.split(self.masks, -1)
        each = zip(self.each, numbers.split([head.inputs for head in self.each], -1), masks, strict=True)
        return Joined(tuple(head(x, mask) for head, x, mask in each), tuple(self.slots))

    def metrics(self, action: Tensor, mask: Tensor) -> Metrics:
        columns = action.split([slot.size for slot in self.slots], -1)
        each = zip(self.each, self.slots, columns, strict=True)
        return {f"{slot.name}.{key}": x for head, slot, x in each for key, x in head.metrics(x, mask).items()}


def leaves(space: spaces.Space[Any], name: str = "") -> Iterator[tuple[str, spaces.Space[Any]]]:
    """The parts of a Dict or Tuple, of its parts in turn, and so on, by name; a space without parts itself."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        for key, part in space.items() if isinstance(space, spaces.Dict) else enumerate(space):
            yield from leaves(part, f"{name}.{key}".lstrip("."))
    else:
        yield name, space


def permitted(logits: Tensor, allowed: Tensor | None) -> Tensor:
    return logits if allowed is None else logits.masked_fill(~allowed, FORBIDDEN)


HEADS: dict[str, type[Head]] = {
    "gaussian": GaussianHead,
    "squashed": SquashedHead,
    "beta": BetaHead,
    "categorical": CategoricalHead,
    "multicategorical": MultiCategoricalHead,
    "bernoulli": BernoulliHead,
}
DEFAULTS: Sequence[tuple[type[spaces.Space[Any]], str]] = (
    (spaces.Box, "gaussian"),
    (spaces.Discrete, "categorical"),
    (spaces.MultiDiscrete, "multicategorical"),
    (spaces.MultiBinary, "bernoulli"),
)


def continuous(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """For a Box of whole numbers the Box of floats that are rounded to them, with an equal share for each; any other
    space as it is."""
    if not isinstance(space, spaces.Box) or space.dtype.kind not in "iu":
        return space
    low, high = (torch.as_tensor(getattr(space, name)).double() + by for name, by in (("low", -0.5), ("high", 0.5)))
    return spaces.Box(low.float().numpy(), high.float().numpy())


def make_head(space: spaces.Space[Any], distribution: Component = "auto", **options: Any) -> Head:
    """Make the head that ``policy.distribution`` chooses; ``auto`` chooses by the type of the action space.  Options
    that are None or have their default are ignored.  In dictionaries and tuples, distribution and options are those of
    every Box.

    Raises ValueError for an unknown head, an unsupported space, and options of other heads.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple) and (distribution == "auto" or distribution in list(HEADS)):
        return JoinedHead(space, distribution, **options)
    space = continuous(space)
    if distribution == "auto":
        names = [name for kind, name in DEFAULTS if isinstance(space, kind)]
        if not names or (isinstance(space, spaces.Box) and space.dtype.kind != "f"):
            raise ValueError(
                f"no policy for actions {space}: Box, Discrete, MultiDiscrete, MultiBinary, and dictionaries and "
                "tuples of them have one"
            )
        (distribution,) = names
    cls = component_class(distribution, HEADS, Head, "policy.distribution")
    given = {name: x for name, x in options.items() if x is not None and x is not True and x != "free"}
    taken = inspect.signature(cls).parameters if issubclass(cls, GaussianHead) else ()
    if unused := [x for x in given if x not in taken]:
        name = distribution if isinstance(distribution, str) else distribution["_target_"]
        raise ValueError(
            f"policy.{' and policy.'.join(unused)} is for Gaussian policies, and this one is {name}, for actions "
            f"{space}: leave it out"
        )
    return make_component(distribution, HEADS, Head, "policy.distribution", space, **given)
