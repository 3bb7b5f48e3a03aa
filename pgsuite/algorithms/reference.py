"""KL penalty with respect to a frozen reference policy, for all methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from pgsuite import distributed
from pgsuite.functional import objectives
from pgsuite.nn.policy import Policy, log_prob
from pgsuite.types import Batch, Metrics, Rollout

Penalty = Literal["reward", "loss"]


class Reference(nn.Module):
    """A frozen copy of a policy as it is at construction, and a penalty of ``coef`` times KL(policy || reference).

    With penalty ``reward``, coef (log pi - log ref), Schulman's k1, is subtracted from the reward of each action, and
    so is part of the critic's targets.  With ``loss``, coef times k3 is subtracted from the policy objective.  With a
    ``target``, in nats per episode, the coefficient is adaptive: coef *= 1 + clip(KL / target - 1, -0.2, 0.2) episodes
    / ``horizon`` after each rollout (Ziegler et al., 2019, section 2.2).

    Nucleus sampling restricts the policy's distribution and not that of the reference.
    """

    coef: Tensor

    def __init__(
        self,
        policy: Policy,
        coef: float,
        *,
        penalty: Penalty = "reward",
        target: float | None = None,
        horizon: int = 10_000,
    ) -> None:
        super().__init__()
        self.policy = policy.frozen_copy()
        self.penalty, self.target, self.horizon = penalty, target, horizon
        self.register_buffer("coef", torch.tensor(float(coef), device=next(policy.parameters()).device))

    @torch.no_grad()
    def compare(self, rollout: Rollout, pieces: int = 1) -> Rollout:
        """The rollout with the reference's log-probabilities [T, N] in ``extra["reference"]``, computed in so many
        pieces, and, with penalty ``reward``, with the KL penalty subtracted from its rewards."""
        logp = log_prob(self.policy, rollout, pieces).where(rollout.mask, 0.0)
        rollout = replace(rollout, extra=rollout.extra | {"reference": logp})
        if self.penalty == "loss":
            return rollout
        return replace(rollout, reward=rollout.reward - self.coef * self.log_ratio_to_reference(rollout))

    @staticmethod
    def log_ratio_to_reference(rollout: Rollout) -> Tensor:
        """log pi - log ref [T, N] of the actions in real cells; zero in masked ones."""
        return (rollout.logp - rollout.extra["reference"]).where(rollout.mask, 0.0)

    def kl_penalty(self, logp: Tensor, batch: Batch) -> Tensor | float:
        """KL penalty per cell [...] of the loss, for the policy's log-probabilities [...]; zero with penalty
        ``reward``."""
        if self.penalty == "reward":
            return 0.0
        return self.coef * objectives.reverse_kl(objectives.log_ratio(logp, batch.extra["reference"]))

    @torch.no_grad()
    def adapt(self, rollout: Rollout) -> Metrics:
        """Adapt the coefficient to the KL per episode of a rollout returned by ``compare``.  The metrics are that KL
        and the coefficient before the change."""
        episodes = distributed.total((rollout.done & rollout.mask).sum().to(rollout.reward))
        kl = distributed.total(self.log_ratio_to_reference(rollout).sum()) / episodes.clamp(min=1.0)
        metrics = {"reference_kl": kl, "reference_coef": self.coef.clone()}
        if self.target is not None:
            error = (kl / self.target - 1).clamp(-0.2, 0.2)
            self.coef.mul_(1 + error * episodes / self.horizon)
        return metrics
