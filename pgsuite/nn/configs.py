"""Settings of policies and critics, and their construction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from gymnasium import spaces
from torch import Generator

from pgsuite.components import Component
from pgsuite.nn.action_critic import ActionCritic
from pgsuite.nn.heads import Sigma
from pgsuite.nn.layers import Block, Norm
from pgsuite.nn.network import Shape, make_body
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.settings import Checked, Count


@dataclass(kw_only=True)
class NetworkConfig(Checked):
    """A multilayer perceptron, with convolutions before it where observations have images."""

    hidden: list[Count] = field(default_factory=lambda: [64, 64])  # units of each hidden layer
    activation: Literal["tanh", "relu", "elu", "silu"] = "tanh"  # of hidden layers
    norm: Norm = "none"  # layer normalization: before each activation, or before each residual block and after the last
    block: Block = "plain"  # residual: each hidden layer is a block that adds to its input, through 4 times its units
    convolutions: list[tuple[Count, Count, Count]] | None = None  # channels, kernel, stride; null goes by image size
    recurrent_size: Count = 64  # units of the recurrent layer
    body: Component | None = None  # in place of all these layers, by its dotted path: my_package.MyBody

    def shape(self, recurrent: Component | None, generator: Generator) -> Shape:
        """The arguments of ``Features`` for these settings."""
        return Shape(
            hidden=self.hidden,
            activation=self.activation,
            norm=self.norm,
            block=self.block,
            convolutions=self.convolutions,
            recurrent=recurrent or "none",
            recurrent_size=self.recurrent_size,
            generator=generator,
        )


@dataclass(kw_only=True)
class PolicyConfig(Checked, ABC):
    """Settings that build a policy; those of a custom one are a subclass, chosen by ``policy=<name of its config>``."""

    @abstractmethod
    def build(self, obs_norm: Standardize, action_space: spaces.Space[Any], generator: Generator) -> Policy:
        """Build a policy for observations of ``obs_norm.space``, with initial parameters drawn from the generator.
        Raises ValueError for unsupported spaces."""


@dataclass(kw_only=True)
class MLPPolicyConfig(NetworkConfig, PolicyConfig):
    """A multilayer perceptron, and the action distribution that it parameterizes."""

    recurrent: Component = "none"  # before the hidden layers: none, gru, lstm, transformer, or by dotted path
    distribution: Component = "auto"  # by the action space; gaussian, squashed, beta, ..., or my_package.MyHead
    log_sigma: float | None = None  # initial log standard deviation of Gaussian policies; null is -0.5
    sigma: Sigma = "free"  # of Gaussian policies: a free parameter, or state-dependent
    normalize_actions: bool = True  # Gaussian policies in units of half the width of the Box, from its middle

    def build(self, obs_norm: Standardize, action_space: spaces.Space[Any], generator: Generator) -> Policy:
        body = None if self.body is None else make_body(self.body, obs_norm, "policy", generator)
        return Policy(
            obs_norm,
            action_space,
            body=body,
            distribution=self.distribution,
            log_sigma=self.log_sigma,
            sigma=self.sigma,
            normalize_actions=self.normalize_actions,
            **self.shape(self.recurrent, generator),
        )


@dataclass(kw_only=True)
class CriticConfig(NetworkConfig):
    """The network of a critic."""

    recurrent: Component | None = None  # a layer before the hidden ones; null takes the policy's, as for body
    head: Component = "scalar"  # a value fitted by squared error; categorical: a histogram fitted by cross-entropy
    normalize_values: bool | None = None  # fit targets in their running deviations from their mean; null goes by head
    shared: bool = False  # share the policy's network; the other settings then have no effect
    zero_init: bool = False  # initial values are zero

    def like(self, policy: object) -> CriticConfig:
        """These settings, with ``recurrent`` and ``body`` taken from a policy's settings where they are null."""
        recurrent = self.recurrent or getattr(policy, "recurrent", "none")
        return replace(self, recurrent=recurrent, body=self.body or getattr(policy, "body", None))

    def build(
        self,
        policy: Policy,
        num_envs: int,
        generator: Generator,
        action_space: spaces.Space[Any] | None = None,
    ) -> Critic:
        """Build the critic for a policy, with initial parameters drawn from the generator; one of actions, if their
        space is given.  Raises ValueError for a shared body if observations have a part for the critic only, and for
        actions of which there is no critic."""
        body = None
        if not self.shared:
            body = policy.critic_body()
            if body is None and self.body is not None:
                body = make_body(self.body, policy.obs_norm, "critic", generator)
        kind = Critic if action_space is None else partial(ActionCritic, action_space=action_space)
        return kind(
            policy.obs_norm,
            shared=policy if self.shared else None,
            body=body,
            num_envs=num_envs,
            zero_init=self.zero_init,
            head=self.head,
            normalize_values=self.normalize_values,
            **self.shape(self.recurrent, generator),
        )
