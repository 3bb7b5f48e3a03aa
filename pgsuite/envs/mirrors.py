"""Mirror symmetries of tasks: a map of observations and one of actions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from pgsuite.envs.tasks.base import Signed
from pgsuite.types import Obs


class Mirror(nn.Module, ABC):
    """A mirror symmetry of a task: one map of observations and one of actions, each its own inverse and volume-
    preserving.  From a mirrored state, a mirrored action leads to the mirrored next state with the same reward.

    A custom symmetry is a subclass, chosen by its dotted path: ``symmetry.mirror=my_package.MyMirror``.
    """

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        super().__init__()

    @abstractmethod
    def observation(self, obs: Obs) -> Obs:
        """The mirror images of observations [..., *O]."""

    @abstractmethod
    def action(self, action: Tensor) -> Tensor:
        """The mirror images of actions [..., *A]."""


class SignedPermutation(nn.Module):
    """The map x [..., n] -> y with y[i] = sign_i x[j_i].  Raises ValueError unless it is its own inverse."""

    index: Tensor
    sign: Tensor

    def __init__(self, entries: Signed, size: int, where: str) -> None:
        super().__init__()
        index = torch.tensor([abs(int(j)) - 1 for j in entries])
        sign = torch.tensor([-1.0 if j < 0 else 1.0 for j in entries])
        if sorted(index.tolist()) != list(range(size)):
            raise ValueError(f"{where} must have each of 1 to {size} once, with a sign, got {list(entries)}")
        if not torch.equal(index[index], torch.arange(size)) or not torch.equal(sign * sign[index], torch.ones(size)):
            raise ValueError(f"{where} must be its own inverse: mirrored twice, everything is as it was")
        self.signs = bool((sign < 0).any())
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("sign", sign.to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.index_select(-1, self.index)
        return x * self.sign if self.signs else x


class Table(Mirror):
    """A mirror symmetry by signed permutations, whose entries are counted from 1: ``[1, -3, -2]`` maps x, y, z to x,
    -z, -y.  That of a dictionary of observations has one for each entry.  That of discrete actions is a permutation of
    the actions.  Raises ValueError for tables that do not fit the spaces or are not their own inverses."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        observation: list[int] | dict[str, Any],  # table of the components of an observation, or one for each entry
        action: list[int],  # table of the components of an action, or of the discrete actions
    ) -> None:
        super().__init__(observation_space, action_space)
        parts = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        tables = observation if isinstance(observation, Mapping) else {"": observation}
        if tables.keys() != parts.keys():
            wanted = ", ".join(parts) if isinstance(observation_space, spaces.Dict) else "a list of numbers"
            raise ValueError(f"symmetry.mirror.observation must be for {wanted}, got {observation}")
        self.names = list(parts)
        self.tables = nn.ModuleList(
            SignedPermutation(tables[key], math.prod(part.shape or ()), f"symmetry.mirror.observation {key}".strip())
            for key, part in parts.items()
        )
        self.discrete = isinstance(action_space, spaces.Discrete)
        size = int(action_space.n) if isinstance(action_space, spaces.Discrete) else spaces.flatdim(action_space)
        self.actions = SignedPermutation(action, size, "symmetry.mirror.action")
        if self.actions.signs and not isinstance(action_space, spaces.Box):
            raise ValueError(f"symmetry.mirror.action may have signs for a Box only, and actions are {action_space}")

    def observation(self, obs: Obs) -> Obs:
        if not isinstance(obs, dict):
            return self.tables[0](obs)
        return {key: table(obs[key]) for key, table in zip(self.names, self.tables, strict=True)}

    def action(self, action: Tensor) -> Tensor:
        return self.actions.index[action] if self.discrete else self.actions(action)


MIRRORS: dict[str, type[Mirror]] = {"table": Table}
