from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgsuite import distributed
from pgsuite.algorithms.multipliers import Multipliers
from pgsuite.algorithms.ppo import PPO
from pgsuite.nn.policy import PastPolicy
from pgsuite.settings import Positive
from pgsuite.types import Batch, Metrics, Rollout, masked_mean, masked_means


@dataclass(kw_only=True, eq=False)
class VMPO(PPO):
    """On-policy maximum a posteriori policy optimization (Song et al., 2020).

    The policy maximizes the log-likelihood of the actions in the better half of each minibatch, weighted by psi =
    exp(advantage / temperature) / sum exp(advantage / temperature) (equation 3), within a mean KL(old || new) of
    ``max_kl`` (equation 5).  The temperature minimizes its dual over that half, temperature (bound + log mean
    exp(advantage / temperature)) (equation 4), and the multiplier of the KL follows its constraint.  Both are learned
    with the networks, by their logarithms.  The better half is that of each process.
    """

    unused_settings = ("clip", "clip_high", "dual_clip", "ratio")

    temperature_bound: Positive = 0.1  # bound on KL(psi || uniform weights of the better half), in nats
    max_kl: Positive = 0.01  # bound on the mean KL(old || new) of an update, in nats

    def __post_init__(self) -> None:
        self.multipliers = Multipliers(temperature=1.0, kl_coef=1.0).to(self.device)
        super().__post_init__()
        self.old = PastPolicy(self.policy)  # before the update

    @property
    def trained(self) -> list[nn.Module]:
        return [*super().trained, self.multipliers]

    def learn(self, rollout: Rollout) -> Metrics:
        self.old.keep()
        return super().learn(rollout)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        dist, prediction = self.evaluate(batch)
        logp, (temperature, kl_coef) = dist.log_prob(batch.action), self.multipliers()
        weight, log_mean = self.weights(batch, temperature)
        cells = {"policy_loss": -self.policy_objective(weight * logp, logp, batch), "kl": self.old.dist(batch).kl(dist)}
        if prediction is not None:
            cells["value_loss"] = self.value_error(prediction, batch)
        means = masked_means(cells | {"entropy": dist.entropy()}, batch.mask)
        loss = means["policy_loss"] - self.entropy_coef * means["entropy"]
        loss = loss + self.value_coef * means["value_loss"] if prediction is not None else loss
        loss = loss + kl_coef.detach() * means["kl"] + kl_coef * (self.max_kl - means["kl"].detach())
        loss = loss + temperature * (self.temperature_bound + log_mean)
        means |= {"loss": loss, "temperature": temperature, "kl_coef": kl_coef}
        return loss, {name: mean.detach() for name, mean in means.items()}

    def weights(self, batch: Batch, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """The weights psi [...] of a batch, scaled to a mean of one over its real cells, and log mean exp(advantage /
        temperature) [] over the better half, which is differentiable in the temperature."""
        gain = batch.advantage / temperature
        ranked = gain.detach().where(batch.mask, -torch.inf).flatten().sort(descending=True).values
        last = ((batch.mask.sum() + 1) // 2 - 1).clamp(min=0)
        better = batch.mask & (gain.detach() >= ranked.gather(0, last.unsqueeze(0)))
        shift = distributed.mean(ranked[0].nan_to_num(neginf=0.0))  # so that exponentials do not overflow
        power = (gain - shift).where(better, 0.0).exp() * better
        mean = masked_mean(self.importance_weighted(power, batch), batch.mask)
        share = masked_mean(self.importance_weighted(better.to(power.dtype), batch), batch.mask)
        whole = distributed.mean(mean.detach()).clamp(min=1e-30)
        log_mean = shift + (whole / distributed.mean(share)).log() + (mean - mean.detach()) / whole
        return (power / whole).detach(), log_mean
