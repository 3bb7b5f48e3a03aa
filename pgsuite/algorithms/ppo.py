from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from torch import Tensor

from pgsuite import parallel
from pgsuite.algorithms.a2c import A2C
from pgsuite.functional import objectives
from pgsuite.nn.optim import Kind
from pgsuite.rollout import Collector
from pgsuite.rollout.minibatches import check_split, minibatches
from pgsuite.settings import Count, Positive, Range
from pgsuite.types import Batch, Metrics, average, standardize


@dataclass(kw_only=True, eq=False)
class PPO(A2C):
    """Many small steps per rollout, on a surrogate that pays nothing for straying (Schulman et al., 2017)."""

    optim: Kind = "adam"
    lr: Positive = 3e-4
    clip: Positive = 0.2
    clip_high: Positive | None = None  # upwards; null stands for clip
    dual_clip: Annotated[float, Range(1, open=True)] | None = None  # the most that a bad action may cost, in advantages
    epochs: Count = 10
    minibatches: Count = 4
    value_clip: Positive | None = None
    target_kl: Positive | None = None  # no further epoch once the mean KL of one exceeds this; read once per epoch
    normalize_advantage: Literal["none", "batch", "minibatch"] = "minibatch"  # pyright: ignore[reportIncompatibleVariableOverride]

    def validate(self, collector: Collector) -> None:
        super().validate(collector)
        check_split(collector.horizon, collector.env.num_envs, self.minibatches, columns=self.policy.sequential)

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        objective = objectives.clipped_surrogate(ratio, advantage, self.clip, self.clip_high or self.clip)
        return objective if self.dual_clip is None else objectives.dual_clipped(objective, advantage, self.dual_clip)

    def value_error(self, value: Tensor, batch: Batch) -> Tensor:
        if self.value_clip is None:
            return super().value_error(value, batch)
        return objectives.clipped_squared_error(value, batch.value, batch.target, self.value_clip, self.huber)

    def update(self, batch: Batch) -> Metrics:
        steps: list[Metrics] = []
        for epoch in range(self.epochs):
            for part in minibatches(batch, self.minibatches, columns=self.policy.sequential, generator=self.generator):
                steps.append(self.step(part))  # noqa: PERF401
            if self.target_kl is not None and epoch + 1 < self.epochs:
                kl = average(steps[-self.minibatches :])["kl"]
                if bool(parallel.mean(kl) > self.target_kl):
                    break
        return average(steps) | {"epochs": batch.mask.new_tensor(len(steps) / self.minibatches, dtype=batch.logp.dtype)}

    def step(self, batch: Batch) -> Metrics:
        if self.normalize_advantage == "minibatch":
            batch = replace(batch, advantage=standardize(batch.advantage, batch.mask))
        return super().step(batch)

    def watch_ratio(self, ratio: Tensor) -> Metrics:
        outside = (ratio < 1 - self.clip) | (ratio > 1 + (self.clip_high or self.clip))
        return {"clip_fraction": outside.to(ratio.dtype)}
