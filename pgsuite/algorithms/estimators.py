"""Advantage estimators as a configuration choice: each a small dataclass around a pure function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pgsuite.functional import estimators
from pgsuite.nn.schedules import Scheduled
from pgsuite.settings import Count, Fraction, Positive
from pgsuite.types import Rollout


@dataclass(kw_only=True, eq=False)
class Estimator(Scheduled, ABC):
    """Turns a rollout and the critic's opinion of it into credit."""

    off_policy: ClassVar[bool] = False  # whether it wants the ratio

    @abstractmethod
    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        """Advantage and critic's target, each [T, N], from value, next_value and ratio, each [T, N]; the ratio of
        probabilities, learning policy over acting one, is all ones unless ``off_policy``."""


@dataclass(kw_only=True, eq=False)
class GAE(Estimator):
    """Generalized advantages (Schulman et al., 2016); the target is advantage plus value."""

    lam: Fraction = 0.95

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        advantage = estimators.gae(r.reward, value, next_value, r.terminated, r.done, gamma=gamma, lam=self.lam)
        return advantage, advantage + value


@dataclass(kw_only=True, eq=False)
class TDLambda(Estimator):
    """Lambda returns (Sutton and Barto, 2018); where values are consistent, the same as GAE by another road."""

    lam: Fraction = 0.95

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        target = estimators.td_lambda(r.reward, next_value, r.terminated, r.done, gamma=gamma, lam=self.lam)
        return target - value, target


@dataclass(kw_only=True, eq=False)
class NStep(Estimator):
    """n rewards, then the critic (Mnih et al., 2016)."""

    n: Count = 5

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        target = estimators.n_step(r.reward, next_value, r.terminated, r.done, gamma=gamma, n=self.n)
        return target - value, target


@dataclass(kw_only=True, eq=False)
class MonteCarlo(Estimator):
    """Every reward to the end of the episode; the critic only where clock or rollout cut it short."""

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        target = estimators.monte_carlo(r.reward, next_value, r.terminated, r.done, gamma=gamma)
        return target - value, target


@dataclass(kw_only=True, eq=False)
class VTrace(Estimator):
    """Importance-corrected lambda returns (Espeholt et al., 2018)."""

    off_policy = True
    lam: Fraction = 1.0
    rho_clip: Positive = 1.0
    c_clip: Positive = 1.0

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        return estimators.vtrace(
            r.reward,
            value,
            next_value,
            r.terminated,
            r.done,
            ratio,
            gamma=gamma,
            lam=self.lam,
            rho_clip=self.rho_clip,
            c_clip=self.c_clip,
        )


@dataclass(kw_only=True, eq=False)
class RLOO(Estimator):
    """What a response got in all, less what the others to the same prompt did on average (Ahmadian et al., 2024): the
    same for each of its tokens, undiscounted, and the critic has no part in it.  ``group`` adjacent columns answer one
    prompt."""

    group: Count = 4

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        advantage = self.compare(estimators.totals(r.reward, r.mask, self.group)).view(1, -1)
        return advantage.expand_as(r.reward), estimators.reward_to_go(r.reward, r.done, gamma=gamma)

    def compare(self, score: Tensor) -> Tensor:
        """Advantages [K, G] of K groups' scores."""
        return estimators.less_others(score)


@dataclass(kw_only=True, eq=False)
class GRPO(RLOO):
    """What a response got in all, less the mean of its group, over its deviation (Shao et al., 2024); without the
    ``deviation``, which favours prompts whose answers are alike, it is Dr. GRPO's (Liu et al., 2025)."""

    deviation: bool = True

    def compare(self, score: Tensor) -> Tensor:
        centred = score - score.mean(-1, keepdim=True)
        return centred / (score.std(-1, keepdim=True) + 1e-4) if self.deviation else centred
