from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from pgsuite import distributed
from pgsuite.algorithms.a2c import A2C
from pgsuite.components import Component
from pgsuite.functional import objectives
from pgsuite.kernel import phase
from pgsuite.rollout import Collector
from pgsuite.rollout.minibatches import check_split
from pgsuite.settings import Count, Positive, Range
from pgsuite.types import Batch, Metrics, Rollout, average, standardize


@dataclass(kw_only=True, eq=False)
class PPO(A2C):
    """Proximal policy optimization: several epochs of minibatch steps on the clipped surrogate objective (Schulman et
    al., 2017, equation 7)."""

    optim: Component = "adam"  # adam, rmsprop, or a class by its dotted path, as torch.optim.AdamW
    lr: Positive = 3e-4
    clip: Positive = 0.2  # clip range of the importance ratio: 1 - clip to 1 + clip
    clip_high: Positive | None = None  # upper clip range: 1 - clip to 1 + clip_high; null takes clip
    dual_clip: Annotated[float, Range(1, open=True)] | None = None  # bound of the ratio at negative advantages
    epochs: Count = 10  # passes over each batch
    minibatches: Count = 4  # gradient steps in each pass
    recompute_advantage: bool = False  # recompute before every epoch but the first, with the current critic
    target_kl: Positive | None = None  # stop after an epoch whose mean KL exceeds this, in nats; null never stops
    early_stop: Literal["read", "masked"] = "read"  # target_kl reads one bit per epoch, or masks the later epochs
    normalize_advantage: Literal["none", "batch", "minibatch"] = "minibatch"  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def host_sync_reason(self) -> str | None:
        stops = self.target_kl is not None and self.early_stop == "read"
        return (
            "target_kl reads one bit of each epoch; algo.early_stop=masked reads none"
            if stops
            else super().host_sync_reason
        )

    def validate(self, collector: Collector) -> None:
        super().validate(collector)
        check_split(collector.horizon, collector.env.num_envs, self.minibatches, columns=self.sequential)

    @property
    def clips(self) -> tuple[float, float]:
        """Lower and upper clip range: the importance ratio is clipped to [1 - low, 1 + high]."""
        return self.clip, self.clip if self.clip_high is None else self.clip_high

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        objective = objectives.clipped_surrogate(ratio, advantage, *self.clips)
        return objective if self.dual_clip is None else objectives.dual_clipped(objective, advantage, self.dual_clip)

    def learn(self, rollout: Rollout) -> Metrics:
        """Compute advantages and run the epochs, until the last one or until the mean KL exceeds ``target_kl``."""
        batch, updates = self.compute_advantages(rollout), []
        stopped = torch.zeros_like(batch.mask[0, 0])
        for _ in range(0, self.epochs, self.epochs_at_once):
            if updates and self.target_kl is not None:
                stopped = stopped | (distributed.mean(updates[-1]["kl"]) > self.target_kl)
                if self.early_stop == "read" and bool(stopped):
                    break
            batch = self.compute_advantages(rollout) if updates and self.recompute_advantage else batch
            self.optimizer.skip_mask = stopped if self.early_stop == "masked" else None
            with phase("update"):
                updates.append(self.update(batch) | {"epochs": ~stopped})
        live = torch.stack([metrics.pop("epochs") for metrics in updates])
        epochs = self.epochs_at_once * live.sum(dtype=batch.logp.dtype)
        return average(updates, live) | {"epochs": epochs} | self.metrics(batch)

    @property
    def epochs_at_once(self) -> int:
        """Epochs of one update: all of them if nothing is decided or computed between two."""
        return self.epochs if self.target_kl is None and not self.recompute_advantage else 1

    def update(self, batch: Batch) -> Metrics:
        """Epochs on a batch: a gradient step on each minibatch."""
        return self.fit(self.optimizer, self.loss, (), batch, self.epochs_at_once, self.minibatches)

    def prepared(self, batch: Batch) -> Batch:
        """With standardized advantages, if these are standardized by minibatch."""
        if self.normalize_advantage == "minibatch":
            batch = replace(batch, advantage=standardize(batch.advantage, batch.mask))
        return batch

    def ratio_metrics(self, log_ratio: Tensor, ratio: Tensor, batch: Batch) -> Metrics:
        low, high = self.clips
        return {
            "kl": self.importance_weighted(objectives.sampled_kl(log_ratio), batch),
            "clip_fraction": ((ratio < 1 - low) | (ratio > 1 + high)).to(ratio.dtype),
        }
