"""Critics of actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from gymnasium import spaces
from torch import Generator, Tensor

from pgsuite.nn.distributions import Distribution
from pgsuite.nn.heads import continuous, normalization
from pgsuite.nn.layers import BLOCKS, Block, Norm, linear
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.types import Batch, Rollout

NEXT_ACTION = "next_action"  # [T, N, A] in a rollout's ``extra``: an action in each successor state


class ActionCritic(Critic):
    """Action values Q(s, a) [...] of observations [..., *O] and actions [..., A] of a Box.

    The body computes features of the observation, and keeps the hidden state of a memory; the hidden layers take these
    features and the action, in units of half the width of the Box from its middle.

    Raises ValueError for a shared body, and for actions other than a Box of floats.
    """

    middle: Tensor
    half_width: Tensor

    def __init__(
        self,
        obs_norm: Standardize,
        action_space: spaces.Space[Any],
        *,
        shared: Policy | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        norm: Norm = "none",
        block: Block = "plain",
        zero_init: bool = False,
        generator: Generator | None = None,
        **options: Any,
    ) -> None:
        if shared is not None:
            raise ValueError("critic.shared=true is for values of states, and this critic's are of actions")
        space = continuous(action_space)
        if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
            raise ValueError(f"values that are differentiated by the action are for a Box, and actions are {space}")
        super().__init__(obs_norm, hidden=(), activation=activation, generator=generator, **options)
        middle, half_width = normalization(space)
        self.register_buffer("middle", middle, persistent=False)
        self.register_buffer("half_width", half_width, persistent=False)
        sizes = (self.body.size + len(middle), *hidden)
        self.hidden = BLOCKS[block](sizes, activation, generator, norm=norm)
        self.out = linear(sizes[-1], self.head.outputs, 0.0 if zero_init else 1.0, generator)
        kind = ["normalized "] * (norm == "layer") + ["residual "] * (block == "residual")
        layers = "".join(kind) + "-".join(map(str, [*hidden, self.head.outputs]))
        self.shape = f"{self.body.shape} and {len(middle)} of the action > {layers}"  # for display

    def predict(self, seen: Rollout | Batch) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.joint_prediction(self.body.sequence(seen)[0], seen.action)

    def joint_prediction(self, features: Tensor, action: Tensor) -> Tensor:
        """Predictions [..., K] from features [..., size] of the body and actions [..., A]."""
        unit = (action - self.middle) / self.half_width
        return self.prediction(self.hidden(torch.cat([features, unit], -1)))

    def on_policy(
        self, policy: Policy, rollout: Rollout, generator: Generator | None
    ) -> tuple[Tensor, Tensor, Distribution]:
        """The values [T, N] of the actions of a rollout, those of actions that the policy draws in the true successor
        states, and its distributions there.  Values of terminal successors are arbitrary."""
        dist = policy.distribution(policy.body.successors(rollout)[1], rollout.next_obs)
        drawn = rollout.extra | {NEXT_ACTION: dist.sample(generator)}
        value, next_value = self.values_and_next_values(replace(rollout, extra=drawn))
        return value, next_value, dist

    def read_both(self, rollout: Rollout, features: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        pairs = ((features, rollout.action), (following, rollout.extra[NEXT_ACTION]))
        value, next_value = (self.value(self.joint_prediction(*pair)) for pair in pairs)
        return value, next_value
