"""Advantage estimators as configurations: each is a dataclass that calls a function of ``functional.estimators``."""

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

    off_policy: ClassVar[bool] = False  # whether it needs the importance ratio also between the epochs of PPO
    supports_off_policy: ClassVar[bool] = False  # whether it corrects rollouts of an earlier policy (overlap=true)
    uses_values: ClassVar[bool] = True  # whether advantages or targets depend on the critic's values
    rho_clip: float = field(default=math.inf, init=False)  # upper bound of the importance weight of an advantage

    @abstractmethod
    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor | None, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        """Advantages and value targets, each [T, N], from the values of each step and of its true successor state.

        ratio [T, N]: importance ratio, the probability of each action under the policy to update over that under the
        behavior policy; None if the rollout is on-policy.  Advantages are corrected for the actions after their own;
        the caller weights each by the ratio of its own action, truncated at ``rho_clip``.
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
    """Exponentially weighted n-step advantages with decay ``lam``.  For rollouts of an earlier policy, traces are
    truncated at an importance ratio of one (Retrace, Munos et al., 2016), which bounds their variance."""

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
        """Advantages and value targets, each [T, N], of an on-policy rollout."""


@dataclass(kw_only=True, eq=False)
class GAE(Lambda):
    """Generalized advantage estimation (Schulman et al., 2016); the value target is advantage plus value."""

    def on_policy(self, rollout: Rollout, value: Tensor, next_value: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        r = rollout
        advantage = estimators.gae(r.reward, value, next_value, r.terminated, r.done, gamma=gamma, lam=self.lam)
        return advantage, advantage + value


@dataclass(kw_only=True, eq=False)
class TDLambda(Lambda):
    """Lambda returns (Sutton and Barto, 2018, section 12.1); equal to GAE if the value of a successor is that of the
    next step."""

    def on_policy(self, rollout: Rollout, value: Tensor, next_value: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        r = rollout
        target = estimators.td_lambda(r.reward, next_value, r.terminated, r.done, gamma=gamma, lam=self.lam)
        return target - value, target


@dataclass(kw_only=True, eq=False)
class NStep(Estimator):
    """n-step returns: n rewards, then the critic's value (Mnih et al., 2016)."""

    n_steps: Count = 5  # rewards before bootstrapping from the critic

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor | None, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        target = estimators.n_step(r.reward, next_value, r.terminated, r.done, gamma=gamma, n=self.n_steps)
        return target - value, target


@dataclass(kw_only=True, eq=False)
class MonteCarlo(Estimator):
    """Monte Carlo returns; bootstraps from the critic only at time limits and at the end of the rollout."""

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
    """REINFORCE leave-one-out: total reward of a response minus the mean total reward of the other responses to its
    prompt (Ahmadian et al., 2024).

    Undiscounted, equal for all tokens of a response, and independent of the critic.  ``group`` adjacent columns are
    responses to one prompt.
    """

    uses_values = False

    group: Count = 4  # responses to each prompt, equal to env.samples

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor | None, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        advantage = self.compare(estimators.group_returns(r.reward, r.mask, self.group)).view(1, -1)
        return advantage.expand_as(r.reward), estimators.reward_to_go(r.reward, r.done, gamma=gamma)

    def compare(self, score: Tensor) -> Tensor:
        """Advantages [K, G] from total rewards [K, G] of K groups of G responses."""
        return estimators.leave_one_out_baseline(score)


@dataclass(kw_only=True, eq=False)
class GRPO(RLOO):
    """Total reward of a response minus the mean of its group, divided by the group's standard deviation (Shao et al.,
    2024).

    Without ``deviation``, which weights prompts with similar responses more, it is the advantage of Dr. GRPO (Liu et
    al., 2025).
    """

    deviation: bool = True  # divide by the standard deviation of the group; false is Dr. GRPO

    def compare(self, score: Tensor) -> Tensor:
        centred = score - score.mean(-1, keepdim=True)
        return centred / (score.std(-1, keepdim=True) + 1e-4) if self.deviation else centred
