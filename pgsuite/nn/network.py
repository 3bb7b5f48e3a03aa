"""Networks from observations [..., *O] to numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypedDict

import torch
from gymnasium import spaces
from torch import Generator, Tensor, nn

from pgsuite.components import Component, make_component
from pgsuite.nn.layers import Convolutions, Joined, linear, perceptron
from pgsuite.nn.normalize import Standardize, is_image
from pgsuite.nn.recurrent import RECURRENCES, Recurrence
from pgsuite.types import ACTION_MASK, PRIVILEGED, HiddenState, Obs, Rollout, leaves, map_obs


class PolicyInput(Protocol):
    """What a network may look at; a Rollout and a Batch both are one."""

    @property
    def obs(self) -> Obs: ...
    @property
    def hidden_state(self) -> HiddenState: ...
    @property
    def start(self) -> Tensor: ...


class Shape(TypedDict, total=False):
    """What a body may be told about itself, and the generator that draws its parameters."""

    hidden: Sequence[int]
    activation: str
    convolutions: Iterable[Sequence[int]] | None
    recurrent: Component
    recurrent_size: int
    generator: Generator | None


class Body(nn.Module):
    """Features [..., size] of observations [..., *O], from which ``Network`` reads actions or values.

    A body without memory defines ``forward(obs)``.  One with memory is ``sequential`` and ``carries`` its hidden state:
    it defines ``initial_state`` and ``step``, and keeps the state under its ``name``, which is policy or critic.

    One of your own is chosen by ``policy.body``; it is made as ``cls(obs_norm, name, generator, **settings)``.

    obs_norm: what observations are, as ``obs_norm.space``, and their standardization, ``obs_norm(obs)``; it may be
    shared with other bodies.
    """

    sequential = False  # whether it must be shown whole columns [T, N] in time order
    carries = False  # whether its hidden state goes on from rollout to rollout

    def __init__(self, obs_norm: Standardize, name: str, size: int, shape: str = "") -> None:
        super().__init__()
        self.obs_norm, self.name, self.size = obs_norm, name, size
        self.shape = shape or f"{type(self).__name__} > {size}"  # for people

    def forward(self, obs: Obs) -> Tensor:
        """Features [..., size] of observations [..., *O], each by itself."""
        raise NotImplementedError(f"{type(self).__name__} defines neither forward(obs) nor step")

    def initial_state(self, num_envs: int) -> HiddenState:
        """The hidden states [num_envs, ...] before the first step of an episode."""
        return {}

    def sequence(self, seen: PolicyInput) -> tuple[Tensor, HiddenState]:
        """Features [..., size] of all that was seen, with the hidden states after each step where they are carried.  A
        ``sequential`` body gets [T, N] cells, and begins with the hidden states of the first row."""
        if not self.sequential:
            return self(seen.obs), {}
        state, features, after = {self.name: seen.hidden_state[self.name][0]}, [], []
        for t, start in enumerate(seen.start):
            row, state = self.step(map_obs(lambda x, t=t: x[t], seen.obs), state, start)
            features.append(row)
            after.append(state[self.name])
        return torch.stack(features), {self.name: torch.stack(after)}

    def step(self, obs: Obs, hidden_state: HiddenState, start: Tensor) -> tuple[Tensor, HiddenState]:
        """Features [..., size] of single observations [..., *O], each after a hidden state of its own, and the hidden
        states after them; where ``start`` [...], an episode begins and the hidden state before it does not count."""
        return self(obs), {}

    def successors(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Features [T, N, size] of each step and of its true successor, which is reached before any episode ends."""
        features, after = self.sequence(rollout)
        return features, self.step(rollout.next_obs, after, torch.zeros_like(rollout.start))[0]


def make_body(choice: Component, obs_norm: Standardize, name: str, generator: Generator | None) -> Body:
    """A body by its dotted path.  Raises ValueError if there is none, or its features are not of its ``size``."""
    where = f"{name}.body"
    body = make_component(choice, {}, Body, where, obs_norm, name, generator)
    start = torch.ones(1, dtype=torch.bool)
    with torch.no_grad():
        found = body.step(zeros(obs_norm.space), body.initial_state(1), start)[0]
    if found.shape != (1, body.size):
        raise ValueError(
            f"{where}: the features of one observation have the shape {tuple(found.shape)}, and by size={body.size} "
            f"they must have {(1, body.size)}"
        )
    return body


def zeros(space: spaces.Space[Any]) -> Obs:
    """One observation [1, *O] of zeros."""
    if isinstance(space, spaces.Dict):
        return {key: zeros(part) for key, part in space.items()}  # pyright: ignore[reportReturnType]
    return torch.zeros(1, *(space.shape or ()), dtype=torch.uint8 if is_image(space) else torch.float32)


class Features(Body):
    """``size`` features of each observation: what may be seen of it is standardized, images go through convolutions,
    and all that through a memory, if there is one, and hidden layers.

    Convolutions and hidden layers are computed in ``dtype``, by autocast; parameters, what comes out, a memory, and the
    numbers that a ``Network`` makes of them are not.

    With ``privileged`` it sees the part of the observations that is for the critic, where they have one; without, the
    rest.  ``obs_norm`` may be shared with other bodies.
    """

    def __init__(
        self,
        obs_norm: Standardize,
        name: str,
        *,
        privileged: bool,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        convolutions: Iterable[Sequence[int]] | None = None,
        recurrent: Component = "none",
        recurrent_size: int = 64,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(obs_norm, name, 0)

        def encoder(space: spaces.Space[Any]) -> tuple[nn.Module, int]:
            if isinstance(space, spaces.Dict):
                parts, sizes = zip(*map(encoder, space.values()), strict=True)
                return Joined(dict(zip(space, parts, strict=True))), sum(sizes)
            if is_image(space):
                net = Convolutions(space.shape or (), convolutions, activation, generator)
                return net, net.size
            return nn.Identity(), math.prod(space.shape or ())

        space, self.keys = obs_norm.space, None
        if isinstance(space, spaces.Dict):
            privileged = privileged and PRIVILEGED in space.spaces
            self.keys = [key for key in space if key != ACTION_MASK and (key == PRIVILEGED) == privileged]
            space = spaces.Dict({key: space[key] for key in self.keys})
        self.dtype = torch.float32
        self.encoder, features = encoder(space)
        images = ["x".join(map(str, m.shape)) + " > " for m in self.encoder.modules() if isinstance(m, Convolutions)]
        self.shape = "".join(images) + str(features)  # for people
        self.recurrence = None
        if recurrent != "none":
            where = f"{name}.recurrent"
            self.recurrence = make_component(
                recurrent, RECURRENCES, Recurrence, where, features, recurrent_size, generator
            )
            features = recurrent_size
            self.shape += f" > {type(self.recurrence).__name__.lower()} {features} > {features}"
        self.sequential = self.carries = self.recurrence is not None
        self.hidden = perceptron((features, *hidden), activation, generator)
        self.size = (features, *hidden)[-1]
        self.shape += "".join(f"-{size}" for size in hidden)

    def initial_state(self, num_envs: int) -> HiddenState:
        if self.recurrence is None:
            return {}
        return {self.name: self.recurrence.read.weight.new_zeros(num_envs, self.recurrence.width)}

    def sequence(self, seen: PolicyInput) -> tuple[Tensor, HiddenState]:
        x = self.encode(seen.obs)
        if self.recurrence is None:
            return self.low(self.hidden, x), {}
        x, after = self.recurrence(x, seen.hidden_state[self.name][0], seen.start)
        return self.low(self.hidden, x), {self.name: after}

    def step(self, obs: Obs, hidden_state: HiddenState, start: Tensor) -> tuple[Tensor, HiddenState]:
        x = self.encode(obs)
        if self.recurrence is None:
            return self.low(self.hidden, x), {}
        x, after = self.recurrence(x.unsqueeze(0), hidden_state[self.name], start.unsqueeze(0))
        return self.low(self.hidden, x.squeeze(0)), {self.name: after.squeeze(0)}

    def encode(self, obs: Obs) -> Tensor:
        if self.keys is not None:
            obs = {key: obs[key] for key in self.keys}
        return self.low(self.encoder, self.obs_norm(obs))

    def low(self, layers: nn.Module, x: Obs) -> Tensor:
        """layers(x), computed in ``dtype``."""
        if self.dtype is torch.float32:
            return layers(x)
        # Without the cache of cast weights, which a CUDA graph may not fill.
        with torch.autocast(leaves(x)[0].device.type, self.dtype, cache_enabled=False):
            return layers(x).float()


class Network(nn.Module):
    """``size`` numbers [..., size] about each observation, read off the features of a body."""

    def __init__(self, body: Body, size: int, gain: float, generator: Generator | None) -> None:
        super().__init__()
        self.body = body
        self.out = linear(body.size, size, gain, generator)
        self.shape = f"{body.shape}-{size}"  # for people

    @property
    def sequential(self) -> bool:
        """Whether it must be shown whole columns in time order."""
        return self.body.sequential
