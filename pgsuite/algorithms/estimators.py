"""Advantage estimators as a configuration choice: each a small dataclass around a pure function."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pgsuite.functional import estimators
from pgsuite.nn.schedules import Scheduled
from pgsuite.settings import Count, Fraction, Positive
from pgsuite.types import Rollout


@dataclass(kw_only=True, eq=False)
class Estimator(Scheduled, ABC):
    """Turns a rollout and the critic's opinion of it into credit."""

    off_policy: ClassVar[bool] = False  # whether it wants the ratio
    supports_off_policy: ClassVar[bool] = False  # whether it has a form for what an earlier policy did

    @abstractmethod
    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        """Advantage and critic's target, each [T, N], from value, next_value and ratio, each [T, N]; the ratio of
        probabilities, learning policy over acting one, is all ones unless ``off_policy``."""

    def correct(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        """The same of the policy that learns, where an earlier one acted.  An advantage is corrected for what follows
        its action; whoever ascends it weights it by the importance ratio of that action itself."""
        raise NotImplementedError

    def truncate(self, weight: Tensor) -> Tensor:
        """The weights [T, N] of advantages that ``correct`` gave, from the ratios."""
        return weight


def trace(
    rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float, **options: Any
) -> tuple[Tensor, Tensor]:
    r = rollout
    return estimators.vtrace(r.reward, value, next_value, r.terminated, r.done, ratio, gamma=gamma, **options)


@dataclass(kw_only=True, eq=False)
class Lambda(Estimator, ABC):
    """Credit that fades with lam; where an earlier policy acted, faster by what it was likelier to do (Munos et al.,
    2016), which keeps the sums of unlikely actions from growing."""

    supports_off_policy = True

    lam: Fraction = 0.95  # lambda: 0 is one-step TD, 1 Monte Carlo

    def correct(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        return trace(
            rollout, value, next_value, ratio, gamma=gamma, lam=self.lam, rho_clip=math.inf, importance_weighted=False
        )


@dataclass(kw_only=True, eq=False)
class GAE(Lambda):
    """Generalized advantages (Schulman et al., 2016); the target is advantage plus value."""

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        advantage = estimators.gae(r.reward, value, next_value, r.terminated, r.done, gamma=gamma, lam=self.lam)
        return advantage, advantage + value


@dataclass(kw_only=True, eq=False)
class TDLambda(Lambda):
    """Lambda returns (Sutton and Barto, 2018); where values are consistent, the same as GAE by another road."""

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        target = estimators.td_lambda(r.reward, next_value, r.terminated, r.done, gamma=gamma, lam=self.lam)
        return target - value, target


@dataclass(kw_only=True, eq=False)
class NStep(Estimator):
    """n rewards, then the critic (Mnih et al., 2016)."""

    n_steps: Count = 5  # rewards before the critic's value is taken

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        r = rollout
        target = estimators.n_step(r.reward, next_value, r.terminated, r.done, gamma=gamma, n=self.n_steps)
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

    off_policy = supports_off_policy = True
    lam: Fraction = 1.0  # lambda: 0 is one-step TD, 1 Monte Carlo
    rho_clip: Positive = 1.0  # rho-bar: truncation of the importance weights of TD errors
    c_clip: Positive = 1.0  # c-bar: truncation of the importance weights of traces

    def __call__(
        self,
        rollout: Rollout,
        value: Tensor,
        next_value: Tensor,
        ratio: Tensor,
        *,
        gamma: float,
        importance_weighted: bool = True,
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"lam": self.lam, "rho_clip": self.rho_clip, "c_clip": self.c_clip}
        return trace(rollout, value, next_value, ratio, gamma=gamma, importance_weighted=importance_weighted, **options)

    def correct(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
    ) -> tuple[Tensor, Tensor]:
        return self(rollout, value, next_value, ratio, gamma=gamma, importance_weighted=False)

    def truncate(self, weight: Tensor) -> Tensor:
        return weight.clamp(max=self.rho_clip)


@dataclass(kw_only=True, eq=False)
class RLOO(Estimator):
    """What a response got in all, less what the others to the same prompt did on average (Ahmadian et al., 2024): the
    same for each of its tokens, undiscounted, and the critic has no part in it.  ``group`` adjacent columns answer one
    prompt."""

    group: Count = 4  # responses to each prompt, as env.samples says

    def __call__(
        self, rollout: Rollout, value: Tensor, next_value: Tensor, ratio: Tensor, *, gamma: float
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
