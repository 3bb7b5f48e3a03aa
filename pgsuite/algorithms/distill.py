"""Distillation of another policy in the states that the learning policy visits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from pgsuite.algorithms.imitation import Imitation
from pgsuite.nn.distributions import Distribution
from pgsuite.nn.policy import Policy
from pgsuite.types import PRIVILEGED, Batch


@dataclass(kw_only=True, eq=False)
class Distill(Imitation):
    """Distillation: KL(teacher || policy) in the states that the policy itself visits, as in DAgger (Ross et al.,
    2011), but of the latest rollout alone.

    A teacher whose observations are the entry ``critic_obs`` here sees that entry, which the policy does not.
    """

    teacher: Policy | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None:
            raise ValueError("algo=distill learns from a trained policy: give teacher=<run directory>")
        if self.teacher.sequential:
            raise ValueError("the teacher has a memory, which algo=distill does not run: take one without")
        its, own = (type(x.head).__name__.removesuffix("Head").lower() for x in (self.teacher, self.policy))
        if its != own:
            raise ValueError(f"the teacher's policy.distribution is {its} and that of the run is {own}: take {its}")
        self.teacher.requires_grad_(False)
        self.entry = seen_entry(self.teacher.obs_norm.space, self.policy.obs_norm.space)

    def distance(self, dist: Distribution, batch: Batch) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            target = self.teacher.dist(batch if self.entry is None else replace(batch, obs=batch.obs[self.entry]))
        return target.kl(dist)


def seen_entry(theirs: spaces.Space[Any], own: spaces.Space[Any]) -> str | None:
    """The entry of observations of the space ``own`` that is an observation of another space; None if the whole is one,
    but for entries that the other does not have.  Raises ValueError if there is none."""

    def fits(a: Any, b: Any) -> bool:
        if isinstance(a, spaces.Dict) and isinstance(b, spaces.Dict):
            return all(key in b.spaces and fits(part, b[key]) for key, part in a.items())
        return type(a) is type(b) and a.shape == b.shape

    if fits(theirs, own):
        return None
    parts = own.spaces if isinstance(own, spaces.Dict) else {}
    for key in sorted(parts, key=lambda key: key != PRIVILEGED):
        if fits(theirs, parts[key]):
            return key
    raise ValueError(f"the teacher was trained on observations {theirs}, which are no part of {own}")
