"""Conversion of gymnasium's spaces, observations and actions to tensors.

All of an observation except images becomes one vector [N, O]: boxes are flattened, discrete numbers are one-hot, and
entries of dictionaries and tuples are concatenated in order.  Images, which are boxes of bytes from 0 to 255 with two
to four dims, become [N, C, H, W] under their own keys, next to ``vector``; a dot in a key becomes an underscore.  The
entry ``critic_obs`` of a dictionary stays separate, for the critic only, and so does ``action_mask``, as one bool for
each discrete action.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from pgsuite.types import ACTION_MASK, PRIVILEGED, Obs, map_obs

VECTOR = "vector"
LARGEST = 2**20  # numbers of a one-hot vector
NAMES = nn.ModuleDict()  # whose attributes are names that no part of it may have
FIXED = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
Leaf = tuple[str, spaces.Space[Any], Any]  # path, space, batch of observations


def tensor_space(space: spaces.Space[Any]) -> spaces.Box | spaces.Dict:
    """The space of the result of ``tensors``.  Raises ValueError for observations without a fixed size."""
    parts: dict[str, spaces.Space[Any]] = {}
    vectors: list[spaces.Box] = []
    public, apart = split(space)
    for path, leaf, _ in leaves(public):
        if not isinstance(leaf, FIXED):
            where = f"the entry {path!r} of the observations, {leaf}, has" if path else f"observations {leaf} have"
            raise ValueError(
                f"{where} no fixed size: Box, Discrete, MultiDiscrete, MultiBinary, and dictionaries and tuples of "
                f"them have{_remedy(space)}"
            )
        if (size := one_hot_size(leaf)) > LARGEST:
            raise ValueError(
                f"observations {leaf} would become one-hot vectors of {size:,} numbers, {4 * size / 2**20:,.0f} MB "
                "each: give features of the number in its place, by an observation wrapper (env.wrappers=)"
            )
        if is_image(leaf):
            shape = channels_first(torch.empty(1, *(leaf.shape or ()))).shape[1:]
            if (key := module_name(path)) in parts:
                raise ValueError(f"two images of {space} have the name {key!r}: give one of them another")
            parts[key] = spaces.Box(0, 255, shape, np.uint8)
        else:
            flat = spaces.flatten_space(leaf)
            assert isinstance(flat, spaces.Box)
            vectors.append(flat)
    if VECTOR in parts:
        raise ValueError(f"an image of {space} is named {VECTOR!r}, as is all that is no image: give it another name")
    if vectors:
        low, high = np.concatenate([x.low for x in vectors]), np.concatenate([x.high for x in vectors])
        parts[VECTOR] = spaces.Box(low, high, dtype=np.result_type(low, high).type)
    if not parts:
        raise ValueError(f"observations {space} hold nothing that a policy may see")
    for key, part in apart.items():
        shape = tensor_space(part)
        parts[key] = shape if key == PRIVILEGED else spaces.MultiBinary(math.prod(shape.shape or ()))
    return spaces.Dict(parts) if len(parts) > 1 else next(iter(parts.values()))  # pyright: ignore[reportReturnType]


def _remedy(space: spaces.Space[Any]) -> str:
    """How to leave out the entries without a fixed size, in words; empty if nothing would remain."""
    parts = space.items() if isinstance(space, spaces.Dict) else []
    fixed = [key for key, part in parts if all(isinstance(leaf, FIXED) for _, leaf, _ in leaves(part))]
    wrapper = f"{{gymnasium.wrappers.FilterObservation: {{filter_keys: [{', '.join(fixed)}]}}}}"
    return f"; env.wrappers=[{wrapper}] leaves such entries out" if fixed else ""


def tensors(space: spaces.Space[Any], obs: Any) -> Obs:
    """Convert a batch of observations, arrays or tensors, to tensors [N, *O] in new memory."""
    parts: dict[str, Obs] = {}
    vectors: list[Tensor] = []
    public, apart = split(space)
    for path, leaf, x in leaves(public, obs):
        if is_image(leaf):
            parts[module_name(path)] = channels_first(copied(x)).contiguous()
        else:
            vectors.append(flatten(leaf, copied(x)))
    if vectors:
        parts[VECTOR] = torch.cat(vectors, -1) if len(vectors) > 1 else vectors[0]
    for key, part in apart.items():
        x = tensors(part, obs[key])
        parts[key] = x if key == PRIVILEGED else x > 0
    return parts if len(parts) > 1 else next(iter(parts.values()))


def mismatch(space: spaces.Space[Any], obs: Any, path: tuple[str, ...] = ()) -> str | None:
    """What is wrong with one observation of a space, in words; None if nothing is.  Numbers outside the bounds of a Box
    pass, and so do dtypes that gymnasium converts to the declared one, such as float64 to float32."""
    name = f"an observation with {'/'.join(path)!r}" if path else "an observation"
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts: list[tuple[Any, spaces.Space[Any]]]
        if isinstance(space, spaces.Dict):
            parts = list(space.items())
            if not isinstance(obs, Mapping):
                return f"{name} that is {shown(obs)}; it must be a dictionary with {', '.join(space)}"
            if missing := [key for key in space if key not in obs]:
                return f"{name} without {', '.join(map(repr, missing))}, which its space declares"
        else:
            parts = list(enumerate(space))
            if not isinstance(obs, tuple | list) or len(obs) != len(parts):
                return f"{name} that is {shown(obs)}; it must be a tuple of {len(parts)} parts"
        found = (mismatch(part, obs[key], (*path, str(key))) for key, part in parts)
        return next(filter(None, found), None)
    try:
        x = np.asarray(obs)
    except (ValueError, TypeError, RuntimeError) as error:  # of lists of unequal lengths, for example
        return f"{name} that is no array: {error}"
    if x.dtype.kind not in "biuf":
        return f"{name} that is {shown(obs)}; it must hold numbers"
    if x.shape != (space.shape or ()):
        return f"{name} of shape {x.shape}; its space declares {space.shape or ()}"
    if x.dtype != space.dtype and not np.can_cast(x.dtype, space.dtype or float, "same_kind"):
        return f"{name} of dtype {x.dtype}; its space declares {space.dtype}"
    if isinstance(space, spaces.Box):
        return None
    low, count = first_action(space), 2 if isinstance(space, spaces.MultiBinary) else 0
    count = space.n if isinstance(space, spaces.Discrete) else getattr(space, "nvec", count)
    if bool(((x < low) | (x >= low + count)).any()):
        return f"{name} of {shown(obs)}; its space declares {space}"
    return None


def shown(x: Any) -> str:
    """A value from outside in a few words."""
    if isinstance(x, np.ndarray | Tensor) and x.ndim and math.prod(x.shape) > 8:
        return f"an array of shape {tuple(x.shape)}"
    words = " ".join((str(x) if isinstance(x, np.ndarray | np.generic) else repr(x)).split())
    return words if len(words) <= 60 else f"{words[:56]} ..."


def module_name(path: str) -> str:
    """A path as the name of a network's part: torch takes no dots, no empty names and none of its own."""
    name = path.replace(".", "_")
    return f"{name}_" if not name or hasattr(NAMES, name) else name


def copied(x: Any) -> Tensor:
    return x.clone() if isinstance(x, Tensor) else torch.tensor(x)


def leaves(space: spaces.Space[Any], obs: Any = None, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """The parts of a space that have none themselves."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        children = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        for key, part in children:
            yield from leaves(part, None if obs is None else obs[key], (*path, str(key)))
    else:
        yield "/".join(path), space, obs


def split(space: spaces.Space[Any]) -> tuple[spaces.Space[Any], dict[str, spaces.Space[Any]]]:
    """What everybody may see, and what stays apart."""
    if not isinstance(space, spaces.Dict):
        return space, {}
    apart = {key: space[key] for key in (PRIVILEGED, ACTION_MASK) if key in space.spaces}
    rest = OrderedDict((key, part) for key, part in space.items() if key not in apart)  # in the order that they have
    return spaces.Dict(rest), apart


def is_image(space: spaces.Space[Any]) -> bool:
    """Bytes from 0 to 255 with two to four dims."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) not in (2, 3, 4):
        return False
    return bool((space.low == 0).all() and (space.high == 255).all())


def channels_first(x: Tensor) -> Tensor:
    """Images [N, H, W], [N, C, H, W], [N, H, W, C], or stacks [N, S, ...] of the latter two, as [N, C, H, W].

    Of the first and the last dim of an image, the smaller one is its channels.
    """
    if x.ndim == 3:
        return x.unsqueeze(1)
    if x.shape[-1] < x.shape[-3]:
        x = x.movedim(-1, -3)
    return x.flatten(1, -3)


def flatten(space: spaces.Space[Any], x: Tensor) -> Tensor:
    """A batch of what is neither an image nor a dictionary, as vectors [N, O]."""
    if isinstance(space, spaces.Discrete):
        return one_hot(x - int(space.start), int(space.n))
    x = x.reshape(x.shape[0], math.prod(space.shape or ()))
    if isinstance(space, spaces.MultiDiscrete):
        columns = zip(x.unbind(-1), space.start.flatten(), space.nvec.flatten(), strict=True)
        return torch.cat([one_hot(column - int(start), int(n)) for column, start, n in columns], -1)
    return x if x.is_floating_point() else x.float()


def one_hot_size(space: spaces.Space[Any]) -> int:
    """The length of the one-hot vector of a discrete space; 0 for other spaces."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    return int(space.nvec.sum()) if isinstance(space, spaces.MultiDiscrete) else 0


def one_hot(x: Tensor, n: int) -> Tensor:
    return torch.nn.functional.one_hot(x.long(), n).float()


def to_device(obs: Obs, device: torch.device, dtype: torch.dtype) -> Obs:
    """Move observations to a device and vectors to dtype; images stay bytes, and masks bools."""
    return map_obs(lambda x: x.to(device) if x.ndim == 4 or x.dtype is torch.bool else x.to(device, dtype), obs)


class ToSpace(nn.Module):
    """A policy's actions [N, *A] as elements of a space, in tensors: clipped to a Box and rounded to its whole numbers,
    or offset by a discrete space's start.  Those of dictionaries and tuples stay one vector of their parts' numbers."""

    low: Tensor
    high: Tensor
    first: Tensor

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__()
        self.space = space
        self.parts = nn.ModuleList([ToSpace(part) for _, part, _ in leaves(space)] if is_joined(space) else [])
        self.dtype = torch.float32
        if isinstance(space, spaces.Box):
            self.register_buffer("low", torch.tensor(space.low))
            self.register_buffer("high", torch.tensor(space.high))
        elif not is_joined(space):
            self.register_buffer("first", torch.as_tensor(first_action(space)))
        if not is_joined(space):
            self.dtype = torch.from_numpy(np.empty(0, space.dtype)).dtype

    def forward(self, action: Tensor) -> Tensor:
        if is_joined(self.space):
            each = zip(self.parts, split_action(self.space, action), strict=True)
            return torch.cat([part(x).reshape(-1, x.shape[-1]).to(action) for part, x in each], -1)
        x = action.reshape(-1, *(self.space.shape or ()))
        if not isinstance(self.space, spaces.Box):
            return x + self.first.to(x)
        x = x.round() if self.space.dtype.kind in "iu" else x
        return torch.minimum(torch.maximum(x, self.low.to(x)), self.high.to(x))

    def elements(self, action: Tensor) -> Any:
        """The same with the dtypes of the space, in new memory, nested as it is."""
        parts = iter(self.parts if is_joined(self.space) else [self])

        def part(space: spaces.Space[Any], x: Tensor) -> Tensor:
            return x.reshape(-1, *(space.shape or ())).to(next(parts).dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]

        return nested_action(self.space, self(action), part)


def is_joined(space: spaces.Space[Any]) -> bool:
    """Whether actions have parts."""
    return isinstance(space, spaces.Dict | spaces.Tuple)


def split_action(space: spaces.Space[Any], action: Tensor) -> list[Tensor]:
    """The numbers [N, size] of every part of joined actions [N, A], in order."""
    return list(action.split([math.prod(part.shape or ()) for _, part, _ in leaves(space)], -1))


def nested_action(space: spaces.Space[Any], action: Tensor, of: Callable[[spaces.Space[Any], Tensor], Any]) -> Any:
    """Actions [N, *A] nested as their space, each part as ``of`` returns it."""
    if not is_joined(space):
        return of(space, action)
    columns = iter(split_action(space, action))

    def nest(part: spaces.Space[Any]) -> Any:
        if isinstance(part, spaces.Dict):
            return {key: nest(inner) for key, inner in part.items()}
        if isinstance(part, spaces.Tuple):
            return tuple(nest(inner) for inner in part)
        return of(part, next(columns))

    return nest(space)


def joined_action(space: spaces.Space[Any], native: Any) -> Tensor:
    """The policy's action [*A] for an element of the space; the inverse of ``native_action`` for a single one."""
    parts = [torch.as_tensor(x) - torch.as_tensor(first_action(part)) for _, part, x in leaves(space, native)]
    return torch.cat([x.flatten() for x in parts]) if is_joined(space) else parts[0]


def first_action(space: spaces.Space[Any]) -> Any:
    """The native action for a policy's action 0: ``start`` of discrete spaces."""
    return space.start if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else 0


def native_action(space: spaces.Space[Any], action: Tensor) -> Any:
    """A policy's actions [N, *A] as a batch of the space: clipped to a Box and rounded to its whole numbers, or offset
    by a discrete space's start; those of dictionaries and tuples are nested."""
    return nested_action(space, action, _native)


def _native(space: spaces.Space[Any], action: Tensor) -> np.ndarray:
    x = action.cpu().numpy().reshape(-1, *(space.shape or ()))
    if not isinstance(space, spaces.Box):
        return x.astype(space.dtype) + first_action(space)
    if space.dtype.kind in "iu":
        x = np.rint(x.astype(np.float64))  # float64 holds the bounds of all common types
    return x.clip(space.low, space.high).astype(space.dtype)


def to_data(space: spaces.Space[Any]) -> dict[str, Any]:
    """A space as JSON data.  A bound shared by all numbers is written once, and null means no bound.  Raises ValueError
    for spaces without a fixed size."""
    data: dict[str, Any] = {"type": type(space).__name__}
    if isinstance(space, spaces.Dict):
        return data | {"spaces": {key: to_data(part) for key, part in space.items()}}
    if isinstance(space, spaces.Tuple):
        return data | {"spaces": [to_data(part) for part in space]}
    if isinstance(space, spaces.Box):
        bounds = {name: _bound(getattr(space, name)) for name in ("low", "high")}
        return data | {"shape": list(space.shape), "dtype": space.dtype.name} | bounds
    if isinstance(space, spaces.Discrete):
        return data | {"n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return data | {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return data | {"n": space.n if isinstance(space.n, int) else list(space.shape)}
    raise ValueError(f"{space} has no fixed size")


def of_data(data: dict[str, Any]) -> spaces.Space[Any]:
    """The space for data of ``to_data``."""
    match data["type"]:
        case "Dict":
            return spaces.Dict(OrderedDict((key, of_data(part)) for key, part in data["spaces"].items()))
        case "Tuple":
            return spaces.Tuple([of_data(part) for part in data["spaces"]])
        case "Box":
            shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])
            bounds = zip((data["low"], data["high"]), (-np.inf, np.inf), strict=True)
            low, high = (np.array(_numbers(x, none), dtype=dtype) for x, none in bounds)
            return spaces.Box(np.broadcast_to(low, shape), np.broadcast_to(high, shape), shape, dtype.type)
        case "Discrete":
            return spaces.Discrete(data["n"], start=data["start"])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(data["nvec"], start=data["start"])
        case "MultiBinary":
            return spaces.MultiBinary(data["n"])
    raise ValueError(f"no space is a {data['type']}")


def _bound(x: np.ndarray) -> Any:
    same = x.size > 0 and bool((x == x.flat[0]).all())
    return _finite(x.flat[0].item() if same else x.tolist())


def _finite(x: Any) -> Any:
    if isinstance(x, list):
        return [_finite(each) for each in x]
    return x if math.isfinite(x) else None


def _numbers(x: Any, none: float) -> Any:
    if isinstance(x, list):
        return [_numbers(each, none) for each in x]
    return none if x is None else x
