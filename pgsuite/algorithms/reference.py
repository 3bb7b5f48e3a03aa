"""What keeps a policy close to another, whatever the method."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from pgsuite import distributed
from pgsuite.functional import objectives
from pgsuite.nn.policy import Policy
from pgsuite.types import Batch, Metrics, Rollout

Penalty = Literal["reward", "loss"]


class Reference(nn.Module):
    """A frozen twin of a policy as it now is, and the price ``coef`` of a nat of KL(policy || twin).

    In the ``reward``, each action pays coef (log pi - log ref), k1, and the critic sees it; in the ``loss``, what is
    ascended is less coef times k3.  With a ``target``, in nats per episode, the price follows what an episode strays:
    coef *= 1 + clip(KL / target - 1, -0.2, 0.2) episodes / ``horizon`` after each rollout (Ziegler et al., 2019,
    section 2.2).

    The twin is judged by all that it might say: a nucleus is the policy's alone.
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
    def compare(self, rollout: Rollout) -> Rollout:
        """The rollout with what the twin thinks of its actions, and with their price taken off the rewards, if there it
        is paid."""
        logp = self.policy.dist(rollout).log_prob(rollout.action).where(rollout.mask, 0.0)
        rollout = replace(rollout, extra=rollout.extra | {"reference": logp})
        if self.penalty == "loss":
            return rollout
        return replace(rollout, reward=rollout.reward - self.coef * self.log_ratio_to_reference(rollout))

    @staticmethod
    def log_ratio_to_reference(rollout: Rollout) -> Tensor:
        """log pi - log ref of each real action [T, N], and zero elsewhere."""
        return (rollout.logp - rollout.extra["reference"]).where(rollout.mask, 0.0)

    def kl_penalty(self, logp: Tensor, batch: Batch) -> Tensor | float:
        """What the loss pays for log-probabilities [...]."""
        if self.penalty == "reward":
            return 0.0
        return self.coef * objectives.reverse_kl(objectives.log_ratio(logp, batch.extra["reference"]))

    @torch.no_grad()
    def adapt(self, rollout: Rollout) -> Metrics:
        """Let the price follow what was strayed in a rollout that was compared, and say how much that was."""
        episodes = distributed.total((rollout.done & rollout.mask).sum().to(rollout.reward))
        kl = distributed.total(self.log_ratio_to_reference(rollout).sum()) / episodes.clamp(min=1.0)
        metrics = {"reference_kl": kl, "reference_coef": self.coef.clone()}
        if self.target is not None:
            error = (kl / self.target - 1).clamp(-0.2, 0.2)
            self.coef.mul_(1 + error * episodes / self.horizon)
        return metrics
