"""Advantage estimators as a configuration choice: each a small dataclass around a pure function."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pgsuite.functional import estimators
from pgsuite.nn.schedules import Scheduled
from pgsuite.settings import Count, Fraction, Positive
from pgsuite.types import Rollout


@dataclass(kw_only=True, eq=False)
class Estimator(Scheduled, ABC):
    """Computes advantages from a rollout and the critic's values."""

    off_policy: ClassVar[bool] = False  # whether it wants the ratio wherever there is one, also between PPO's epochs
    supports_off_policy: ClassVar[bool] = False  # whether it is right where an earlier policy acted (overlap=true)
    rho_clip: float = field(default=math.inf, init=False)  # most that an advantage is weighted by its action's ratio

    @abstractmethod
    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor | None, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        """Advantages and the critic's targets, each [T, N], from the values of the steps and of their true successors.

        ratio [T, N]: the probability of each action under the learning policy over that under the acting one; None
        where they are one policy.  Advantages are corrected for what follows their action; whoever ascends them
        weights them by the ratio of that action itself, up to ``rho_clip``.
        """


def trace(
    rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float, **options: Any
) -> tuple[Tensor, Tensor]:
    r = rollout
    return estimators.vtrace(
        r.reward, value, next_value, r.terminated, r.done, ratio, gamma=gamma, importance_weighted=False, **options
    )


@dataclass(kw_only=True, eq=False)
class Lambda(Estimator, ABC):
    """Advantages whose n-step parts fade with lam; where an earlier policy acted, faster by what it was likelier to do
    (Munos et al., 2016), which keeps the sums of unlikely actions from growing."""

    supports_off_policy = True

    lam: Fraction = 0.95  # lambda: 0 is one-step TD, 1 Monte Carlo

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor | None, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        if ratio is None:
            return self.on_policy(rollout, value, next_value, gamma)
        return trace(rollout, value, next_value, ratio, gamma=gamma, lam=self.lam, rho_clip=math.inf)

    @abstractmethod
    def on_policy(self, rollout: Rollout, value: Tensor, next_value: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """The same where the learning policy acted."""


@dataclass(kw_only=True, eq=False)
class GAE(Lambda):
    """Generalized advantages (Schulman et al., 2016); the target is advantage plus value."""

    def on_policy(self, rollout: Rollout, value: Tensor, next_value: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        r = rollout
        advantage = estimators.gae(r.reward, value, next_value, r.terminated, r.done, gamma=gamma, lam=self.lam)
        return advantage, advantage + value


@dataclass(kw_only=True, eq=False)
class TDLambda(Lambda):
    """Lambda returns (Sutton and Barto, 2018); where values are consistent, the same as GAE by another road."""

    def on_policy(self, rollout: Rollout, value: Tensor, next_value: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        r = rollout
        target = estimators.td_lambda(r.reward, next_value, r.terminated, r.done, gamma=gamma, lam=self.lam)
        return target - value, target


@dataclass(kw_only=True, eq=False)
class NStep(Estimator):
    """n rewards, then the critic (Mnih et al., 2016)."""

    n_steps: Count = 5  # rewards before the critic's value is taken

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor | None, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        target = estimators.n_step(r.reward, next_value, r.terminated, r.done, gamma=gamma, n=self.n_steps)
        return target - value, target


@dataclass(kw_only=True, eq=False)
class MonteCarlo(Estimator):
    """Every reward to the end of the episode; the critic only where clock or rollout cut it short."""

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor | None, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        target = estimators.monte_carlo(r.reward, next_value, r.terminated, r.done, gamma=gamma)
        return target - value, target


@dataclass(kw_only=True, eq=False)
class VTrace(Estimator):
    """Importance-corrected lambda returns (Espeholt et al., 2018)."""

    off_policy = supports_off_policy = True
    lam: Fraction = 1.0  # lambda: 0 is one-step TD, 1 Monte Carlo
    rho_clip: Positive = 1.0  # rho-bar: truncation of the importance weights of TD errors
    c_clip: Positive = 1.0  # c-bar: truncation of the importance weights of traces

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor | None, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        options = {"lam": self.lam, "rho_clip": self.rho_clip, "c_clip": self.c_clip}
        ratio = torch.ones_like(value) if ratio is None else ratio
        return trace(rollout, value, next_value, ratio, gamma=gamma, **options)


@dataclass(kw_only=True, eq=False)
class RLOO(Estimator):
    """What a response got in all, less what the others to the same prompt did on average (Ahmadian et al., 2024): the
    same for each of its tokens, undiscounted, and the critic has no part in it.  ``group`` adjacent columns answer one
    prompt."""

    group: Count = 4  # responses to each prompt, as env.samples says

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor | None, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        advantage = self.compare(estimators.group_returns(r.reward, r.mask, self.group)).view(1, -1)
        return advantage.expand_as(r.reward), estimators.reward_to_go(r.reward, r.done, gamma=gamma)

    def compare(self, score: Tensor) -> Tensor:
        """Advantages [K, G] of K groups' scores."""
        return estimators.leave_one_out_baseline(score)


@dataclass(kw_only=True, eq=False)
class GRPO(RLOO):
    """What a response got in all, less the mean of its group, over its deviation (Shao et al., 2024); without the
    ``deviation``, which favours prompts whose answers are alike, it is Dr. GRPO's (Liu et al., 2025)."""

    deviation: bool = True  # divide by the standard deviation of the group; false is Dr. GRPO

    def compare(self, score: Tensor) -> Tensor:
        centred = score - score.mean(-1, keepdim=True)
        return centred / (score.std(-1, keepdim=True) + 1e-4) if self.deviation else centred
