from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from pgsuite import seeding
from pgsuite.algorithms.channels import Channel, Fit
from pgsuite.nn.network import Features, Network, PolicyInput
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.optim import make_optimizer
from pgsuite.nn.policy import Critic
from pgsuite.settings import Count, Fraction, Positive
from pgsuite.types import Batch, Metrics, Rollout, masked_mean


@dataclass(kw_only=True, eq=False)
class RND(Channel):
    """Random network distillation, an intrinsic reward for observations unlike those seen before (Burda et al., 2018).

    The reward is the mean squared error by which a predictor misses the features of a fixed random network at the
    observation that an action leads to; the predictor is fitted to them, after the update of the policy.  The reward is
    divided by the running standard deviation of its discounted sums, and its returns go on from one episode to the
    next.  Observations are standardized by statistics of their own and clipped to +- ``clip_obs``.
    """

    from_env = False

    generator: Generator | None = None  # of the initial parameters, on the CPU

    weight: float = 0.5
    gamma: Fraction = 0.99
    scale: bool = True
    episodic: bool = False
    hidden: list[Count] = field(default_factory=lambda: [64, 64])  # units of each hidden layer of both networks
    features: Count = 64  # outputs of the random network, which the predictor predicts
    clip_obs: Positive = 5.0  # standardized observations are clipped to +- this
    predictor_lr: Positive = 1e-3  # learning rate of the predictor
    predictor_epochs: Count = 1  # passes of the predictor over each batch

    def setup(self, name: str, critic: Critic) -> None:
        super().setup(name, critic)
        device = next(critic.parameters()).device
        self.obs_norm = Standardize(critic.body.obs_norm.space, self.clip_obs).to(device)
        generator = self.generator or seeding.generator(0, name)
        self.random, self.predictor = (self.network(generator).to(device) for _ in range(2))
        self.random.requires_grad_(False)
        self.predictor_optimizer = make_optimizer([self.predictor], self.predictor_lr)

    def network(self, generator: Generator) -> Network:
        shape = {"hidden": self.hidden, "activation": "relu", "generator": generator}
        return Network(Features(self.obs_norm, "rnd", privileged=False, **shape), self.features, 1.0, generator)

    def error(self, seen: PolicyInput) -> Tensor:
        """The predictor's mean squared error [...] at observations [..., *O]."""
        found, wanted = (network.out(network.body.sequence(seen)[0]) for network in (self.predictor, self.random))
        return (found - wanted.detach()).square().mean(-1)

    @torch.no_grad()
    def reward(self, rollout: Rollout) -> Tensor:
        return self.error(replace(rollout, obs=rollout.next_obs))

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        error = masked_mean(self.error(batch), batch.mask)
        return error, {"predictor_loss": error.detach()}

    def learn(self, rollout: Rollout, fit: Fit) -> Metrics:
        metrics = super().learn(rollout, fit)
        reached = Batch.of(replace(rollout, obs=rollout.next_obs), **rollout.estimates[self.name])
        found = fit(self.predictor_optimizer, self.loss, (), reached, self.predictor_epochs, self.minibatches)
        return metrics | {"predictor_loss": found["predictor_loss"]}

    def update_statistics(self, rollout: Rollout) -> None:
        self.obs_norm.update(rollout.next_obs, rollout.mask)
