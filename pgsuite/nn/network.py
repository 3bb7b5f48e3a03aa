"""Networks: bodies, which compute features of observations [..., *O], and linear outputs on top of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypedDict

import torch
from gymnasium import spaces
from torch import Generator, Tensor, nn

from pgsuite.components import Component, make_component
from pgsuite.nn.layers import BLOCKS, Block, Convolutions, Joined, Norm, linear
from pgsuite.nn.memory_transformer import WindowTransformer
from pgsuite.nn.normalize import Standardize, is_image
from pgsuite.nn.recurrent import RECURRENCES, Memory
from pgsuite.types import ACTION_MASK, PRIVILEGED, Cells, HiddenState, Obs, Rollout, leaves, map_obs


class PolicyInput(Protocol):
    """The inputs of a network; Rollout and Batch both provide them."""

    @property
    def obs(self) -> Obs: ...
    @property
    def hidden_state(self) -> HiddenState: ...
    @property
    def start(self) -> Tensor: ...


class Shape(TypedDict, total=False):
    """Arguments of a body: its layers, and the generator of its initial parameters."""

    hidden: Sequence[int]
    activation: str
    norm: Norm
    block: Block
    convolutions: Iterable[Sequence[int]] | None
    recurrent: Component
    recurrent_size: int
    generator: Generator | None


MEMORIES: dict[str, type[Memory]] = {**RECURRENCES, "transformer": WindowTransformer}
Sequencer = Callable[[Rollout], tuple[Tensor, HiddenState]]
LARGEST_PASS = 2**24  # numbers of the observations, or hidden states, in one pass over a rollout without gradient


class Body(nn.Module):
    """Features [..., size] of observations [..., *O], the input of the output layer of a policy or critic.

    A body without memory defines ``forward(obs)``.  One with memory is ``sequential`` and ``carries`` its hidden state:
    it defines ``initial_state`` and ``step``, and keeps the state under its ``name``: policy, critic, or that of a
    channel's critic.

    One of your own is chosen by ``policy.body``; it is made as ``cls(obs_norm, name, generator, **settings)``.

    obs_norm: the standardization of observations, ``obs_norm(obs)``, with their space, ``obs_norm.space``; may be
    shared with other bodies.
    """

    sequential = False  # whether its input must be complete columns [T, N] in time order
    carries = False  # whether its hidden state persists from one rollout to the next
    fixed_shape = False  # whether all inputs of one shape must take the same operations, since they are compiled
    pieces_sync_reason: str | None = None  # what ``pieces`` reads back to the host, and the setting that avoids it

    def __init__(self, obs_norm: Standardize, name: str, size: int, shape: str = "") -> None:
        super().__init__()
        self.obs_norm, self.name, self.size = obs_norm, name, size
        self.shape = shape or f"{type(self).__name__} > {size}"  # for display

    def forward(self, obs: Obs) -> Tensor:
        """Features [..., size] of observations [..., *O], independently of each other."""
        raise NotImplementedError(f"{type(self).__name__} defines neither forward(obs) nor step")

    def initial_state(self, num_envs: int) -> HiddenState:
        """The initial hidden states [num_envs, ...] of an episode."""
        return {}

    def sequence(self, seen: PolicyInput) -> tuple[Tensor, HiddenState]:
        """Features [..., size] of all cells, and the hidden states after each step if they persist.  A ``sequential``
        body is given [T, N] cells and starts from the hidden states of the first row."""
        if not self.sequential:
            return self(seen.obs), {}
        state, features, after = {self.name: seen.hidden_state[self.name][0]}, [], []
        for t, start in enumerate(seen.start):
            row, state = self.step(map_obs(lambda x, t=t: x[t], seen.obs), state, start)
            features.append(row)
            after.append(state[self.name])
        return torch.stack(features), {self.name: torch.stack(after)}

    def pieces(self, seen: Cells, count: int) -> list[tuple[Tensor, Cells]]:
        """Up to ``count`` parts of the columns of [T, N] cells, or of [B] cells, each with their indices.  A part may
        lack last rows that are masked in all of its columns."""
        dim, size, found = seen.logp.ndim - 1, seen.logp.shape[-1], []
        for index in torch.arange(size).tensor_split(min(count, size)):
            first, length = int(index[0]), len(index)
            part = seen.map(lambda x, first=first, length=length: x.narrow(dim, first, length))
            found.append((index.to(seen.logp.device), part))
        return found

    def step(self, obs: Obs, hidden_state: HiddenState, start: Tensor) -> tuple[Tensor, HiddenState]:
        """Features [..., size] of single observations [..., *O], each with a hidden state before it, and the hidden
        states after them.  ``start`` [...] marks the first observations of episodes."""
        return self(obs), {}

    def successors(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Features [T, N, size] of each observation and of its true successor, processed in the same episode."""
        features, after = self.sequence(rollout)
        numbers = rollout.start.shape[1] * sum(x.shape[-1] for x in self.initial_state(1).values())
        rows, following = max(1, LARGEST_PASS // max(1, numbers)), []
        for t in range(0, len(rollout.start), rows):
            part = slice(t, t + rows)
            states = {name: x[part] for name, x in after.items()}
            obs = map_obs(lambda x, part=part: x[part], rollout.next_obs)
            following.append(self.step(obs, states, torch.zeros_like(rollout.start[part]))[0])
        return features, torch.cat(following)

    def successors_by_need(self, rollout: Rollout, sequence: Sequencer) -> tuple[Tensor, Tensor]:
        """The same, where a successor that is the next observation is not computed again, nor a terminal one, whose
        features are then arbitrary.  Reads from the device where episodes were truncated.  ``sequence`` stands for the
        method of that name."""
        if self.sequential:
            features, after = sequence(rollout)
        else:
            cells = max(1, LARGEST_PASS // max(1, sum(x[0, 0].numel() for x in leaves(rollout.obs))))
            rows = max(1, cells // rollout.start.shape[1])
            steps, after = len(rollout.start), {}
            if steps <= rows:
                features = sequence(rollout)[0]
            else:
                features = torch.cat([sequence(rollout[t : t + rows])[0] for t in range(0, steps, rows)])
        anew = rollout.truncated.clone()
        anew[-1] = True
        index = anew.nonzero(as_tuple=True)
        obs, after = map_obs(lambda x: x[index], rollout.next_obs), {name: x[index] for name, x in after.items()}
        following = features.roll(-1, 0)
        following[index] = self.step(obs, after, torch.zeros_like(rollout.start[index]))[0]
        return features, following


def make_body(choice: Component, obs_norm: Standardize, name: str, generator: Generator | None) -> Body:
    """Make a body by its dotted path.  Raises ValueError if it is not found, or its features have another ``size``."""
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
    """An observation [1, *O] of zeros."""
    if isinstance(space, spaces.Dict):
        return {key: zeros(part) for key, part in space.items()}  # pyright: ignore[reportReturnType]
    return torch.zeros(1, *(space.shape or ()), dtype=torch.uint8 if is_image(space) else torch.float32)


class Features(Body):
    """The default body: standardized observations, convolutions for images, an optional recurrent layer, hidden layers.

    Convolutions and hidden layers are computed in ``dtype`` by autocast; parameters, features, the recurrent layer and
    the output layer of a ``Network`` stay float32.

    With ``privileged`` the input is ``critic_obs`` if observations have it; otherwise it is everything else.
    ``obs_norm`` may be shared with other bodies.  Raises ValueError for residual blocks of different widths.
    """

    def __init__(
        self,
        obs_norm: Standardize,
        name: str,
        *,
        privileged: bool,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        norm: Norm = "none",
        block: Block = "plain",
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
        self.shape = "".join(images) + str(features)  # for display
        self.recurrence = None
        if recurrent != "none":
            where = f"{name}.recurrent"
            self.recurrence = make_component(recurrent, MEMORIES, Memory, where, features, recurrent_size, generator)
            features = recurrent_size
            self.shape += f" > {self.recurrence.label} {features} > {features}"
        self.sequential = self.carries = self.recurrence is not None
        if block == "residual" and len(set(hidden)) > 1:
            raise ValueError(f"{name}.hidden must be of one width for {name}.block=residual, got {list(hidden)}")
        self.hidden = BLOCKS[block]((features, *hidden), activation, generator, norm=norm)
        self.size = (features, *hidden)[-1]
        kind = ["normalized"] * (norm == "layer") + ["residual"] * (block == "residual")
        self.shape += " > " + " ".join([*kind, ""]) if kind and hidden else "-" * bool(hidden)
        self.shape += "-".join(map(str, hidden))

    def initial_state(self, num_envs: int) -> HiddenState:
        if self.recurrence is None:
            return {}
        return {self.name: next(self.recurrence.parameters()).new_zeros(num_envs, self.recurrence.width)}

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
        return self.low(self.hidden, x.squeeze(0)), {self.name: after[0]}

    def encode(self, obs: Obs) -> Tensor:
        if self.keys is not None:
            obs = {key: obs[key] for key in self.keys}
        return self.low(self.encoder, self.obs_norm(obs))

    def low(self, layers: nn.Module, x: Obs) -> Tensor:
        """layers(x), computed in ``dtype``."""
        if self.dtype is torch.float32:
            return layers(x)
        # The cache of cast weights is disabled: it must not be filled during the capture of a CUDA graph.
        with torch.autocast(leaves(x)[0].device.type, self.dtype, cache_enabled=False):
            return layers(x).float()


class Network(nn.Module):
    """A body with a linear output layer: ``size`` outputs [..., size] for each observation."""

    def __init__(self, body: Body, size: int, gain: float, generator: Generator | None) -> None:
        super().__init__()
        self.body = body
        self.out = linear(body.size, size, gain, generator)
        self.shape = f"{body.shape}-{size}"  # for display

    @property
    def sequential(self) -> bool:
        """Whether its input must be complete columns in time order."""
        return self.body.sequential
