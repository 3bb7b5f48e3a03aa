"""Policies and critics.

Their input provides obs [..., *O], hidden_state and start [...].  Feedforward networks use obs only; recurrent ones
need [T, N] cells in time order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import torch
from gymnasium import spaces
from torch import Generator, Tensor, nn

from pgsuite.components import Component, make_component
from pgsuite.functional.trust_region import flatten
from pgsuite.kernel import Kernel
from pgsuite.nn.distributions import Distribution
from pgsuite.nn.heads import Head, Sigma, make_head
from pgsuite.nn.network import Body, Features, Network, PolicyInput, Sequencer, Shape
from pgsuite.nn.normalize import RunningMoments, Standardize
from pgsuite.nn.stateless import functional_in_parameters
from pgsuite.nn.value_heads import VALUE_HEADS, SquaredError, ValueHead
from pgsuite.transfer import reads_freely
from pgsuite.types import ACTION_MASK, PRIVILEGED, Batch, HiddenState, Metrics, Obs, Rollout


class PolicyOutput(NamedTuple):
    """A policy's decision for one observation of each environment."""

    action: Tensor  # [N, *A]
    logp: Tensor  # [N]
    hidden_state: HiddenState  # after the observation


class Policy(Network):
    """A stochastic policy over observations [..., *O].  If ``body`` or ``head`` is None, it is made for the spaces."""

    def __init__(
        self,
        obs_norm: Standardize,
        action_space: spaces.Space[Any],
        *,
        body: Body | None = None,
        head: Head | None = None,
        distribution: Component = "auto",
        log_sigma: float | None = None,
        sigma: Sigma = "free",
        normalize_actions: bool = True,
        **shape: Unpack[Shape],
    ) -> None:
        given = {"log_sigma": log_sigma, "sigma": sigma, "normalize_actions": normalize_actions}
        head = head or make_head(action_space, distribution, **given)
        body = body or Features(obs_norm, "policy", privileged=False, **shape)
        super().__init__(body, head.inputs, 0.01, shape.get("generator"))
        self.head = head

    @property
    def obs_norm(self) -> Standardize:
        return self.body.obs_norm

    def update_statistics(self, rollout: Rollout) -> None:
        """Update the running statistics of observations, after an update and before the next rollout."""
        self.obs_norm.update(rollout.obs, rollout.mask)

    def initial_state(self, num_envs: int) -> HiddenState:
        """The initial hidden states of an episode."""
        return self.body.initial_state(num_envs)

    def dist(self, seen: PolicyInput) -> Distribution:
        return self.distribution(self.body.sequence(seen)[0], seen.obs)

    def distribution(self, features: Tensor, obs: Obs) -> Distribution:
        allowed = obs[ACTION_MASK] if isinstance(obs, dict) and ACTION_MASK in obs else None
        return self.head(self.out(features), allowed)

    @torch.no_grad()
    def act(
        self,
        obs: Obs,
        hidden_state: HiddenState,
        start: Tensor,
        generator: Generator | None = None,
        *,
        deterministic: bool = False,
    ) -> PolicyOutput:
        """Sample an action for each environment, or take the mode."""
        return self.choose(obs, hidden_state, start, lambda d: d.mode() if deterministic else d.sample(generator))

    def choose(
        self, obs: Obs, hidden_state: HiddenState, start: Tensor, select: Callable[[Distribution], Tensor]
    ) -> PolicyOutput:
        """The decision in each environment; ``select`` maps the action distribution to an action [N, *A]."""
        features, hidden_state = self.body.step(obs, hidden_state, start)
        dist = self.distribution(features, obs)
        action = select(dist)
        return PolicyOutput(action, dist.log_prob(action), hidden_state)

    def critic_body(self) -> Body | None:
        """A body for a critic that is not ``shared``; None if it is to be made for the observation space."""
        return None

    def frozen_copy(self) -> Policy:
        """A copy without gradients, which later updates of this policy do not change."""
        return copy.deepcopy(self).requires_grad_(False)

    def metrics(self, action: Tensor, mask: Tensor) -> Metrics:
        """Diagnostics of the action distribution, and of actions [..., *A] where mask [...] is true."""
        return self.head.metrics(action, mask)


def log_prob(policy: Policy, seen: Rollout | Batch, pieces: int = 1) -> Tensor:
    """Log-probabilities [...] of the actions, computed for so many parts of the columns one after the other; those of
    masked cells are of no meaning."""
    if pieces == 1:
        return policy.dist(seen).log_prob(seen.action)
    order, found = [], []
    for index, part in policy.body.pieces(seen, pieces):
        logp = policy.dist(part).log_prob(part.action)
        missing = len(seen.logp) - len(logp) if logp.ndim > 1 else 0
        order.append(index)
        found.append(nn.functional.pad(logp, (0, 0, 0, missing)) if missing else logp)
    return torch.cat(found, -1).index_select(-1, torch.cat(order).argsort())


class PastPolicy:
    """A policy with the parameters that it had when ``keep`` was last called."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.flat = flatten(list(policy.parameters())).detach().clone()  # [P]

    def keep(self) -> None:
        """Take the present parameters."""
        self.flat.copy_(flatten(list(self.policy.parameters())).detach())

    @torch.no_grad()
    def dist(self, seen: PolicyInput) -> Distribution:
        return functional_in_parameters(self.policy, lambda: self.policy.dist(seen))(self.flat)


def dist_and_prediction(policy: Policy, critic: Critic, seen: PolicyInput) -> tuple[Distribution, Tensor]:
    """The action distributions and the critic's predictions of cells; a body that both networks use is computed
    once."""
    if critic.body is not policy.body:
        return policy.dist(seen), critic.predict(seen)
    features = policy.body.sequence(seen)[0]
    return policy.distribution(features, seen.obs), critic.prediction(features)


class Critic(Network):
    """State values [...] of observations [..., *O].

    A ``shared`` critic uses the body of a policy; otherwise it has its own ``body``, made for the observation space if
    None.  A recurrent critic keeps its hidden state from rollout to rollout, in each of ``num_envs`` environments.
    With ``zero_init`` all initial values are zero.

    Its outputs are a prediction [..., K], whose meaning and loss are those of the ``head``.  With ``normalize_values``
    they predict targets minus their running mean, divided by their running standard deviation, and a value is what they
    say in the units of the targets; None goes by the head.

    Raises ValueError for a shared body if observations have ``critic_obs``.
    """

    hidden_state: Tensor

    def __init__(
        self,
        obs_norm: Standardize,
        *,
        shared: Policy | None = None,
        body: Body | None = None,
        num_envs: int = 0,
        zero_init: bool = False,
        head: Component = "scalar",
        normalize_values: bool | None = None,
        **shape: Unpack[Shape],
    ) -> None:
        if shared is not None and isinstance(obs_norm.space, spaces.Dict) and PRIVILEGED in obs_norm.space.spaces:
            raise ValueError(f"critic.shared=true would hide {PRIVILEGED} from the critic: give it a body of its own")
        if shared is not None:
            body = shared.body
        body = body or Features(obs_norm, "critic", privileged=True, **shape)
        made = make_component(head, VALUE_HEADS, ValueHead, "critic.head")
        super().__init__(body, made.outputs, 0.0 if zero_init else 1.0, shape.get("generator"))
        self.head = made
        normalized = made.normalizes if normalize_values is None else normalize_values
        self.moments = RunningMoments() if normalized else None  # of targets
        self.shared, self.num_envs = shared is not None, num_envs
        self.values_and_next_values = Kernel("values", self._values_and_next_values)
        self.register_buffer(
            "hidden_state", body.initial_state(num_envs)[body.name].clone() if self.remembers else torch.zeros(0)
        )

    def twin(self, name: str) -> Critic:
        """Another critic that begins with the present parameters, for other rewards.  A body that is shared stays
        shared, as do the statistics of observations; a hidden state of its own has the ``name``."""
        kept = self.body if self.shared else self.body.obs_norm
        twin = copy.deepcopy(self, {id(kept): kept})
        if not self.shared:
            twin.body.name = name
        return twin

    @property
    def remembers(self) -> bool:
        """Whether it has a hidden state of its own, rather than none or the policy's."""
        return self.body.carries and not self.shared

    @property
    def own(self) -> nn.Module:
        """The module whose parameters can be fitted without changing the policy."""
        return self.out if self.shared else self

    def forward(self, seen: PolicyInput) -> Tensor:
        return self.value(self.predict(seen))

    def predict(self, seen: PolicyInput) -> Tensor:
        """Predictions [..., K] of cells, from which ``value`` and ``loss`` are computed."""
        return self.prediction(self.body.sequence(seen)[0])

    def prediction(self, features: Tensor) -> Tensor:
        """Predictions [..., K] from features [..., size] of the body."""
        return self.out(features)

    def read(self, features: Tensor) -> Tensor:
        """Values [...] from features [..., size] of the body."""
        return self.value(self.prediction(features))

    def value(self, prediction: Tensor) -> Tensor:
        """The values [...] of predictions [..., K]."""
        value = self.head.value(prediction)
        return value if self.moments is None else self.moments.restore(value)

    def loss(self, prediction: Tensor, target: Tensor, **options: Unpack[SquaredError]) -> Tensor:
        """The loss per cell [...] of predictions [..., K] for targets [...]; see ``ValueHead.loss``.  With normalized
        values, ``clip`` and ``huber`` are in their units."""
        if self.moments is not None:
            target = self.moments.standardize(target)
            if "old_value" in options:
                options["old_value"] = self.moments.standardize(options["old_value"])
        return self.head.loss(prediction, target, **options)

    @torch.no_grad()
    def observe_targets(self, target: Tensor, mask: Tensor) -> None:
        """Include targets [...] where mask [...] is true in the statistics of normalized values, if there are any.  A
        linear head's values stay what they are (PopArt; van Hasselt et al., 2016, proposition 1)."""
        if self.moments is None:
            return
        bias, scale = self.moments.restore(self.out.bias), self.moments.scale.clone()
        self.moments.update(target, mask)
        if self.head.linear:
            self.out.weight.mul_(self.moments.scale / scale)
            self.out.bias.copy_(self.moments.standardize(bias))

    def _values_and_next_values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The values [T, N] of each observation and of its true successor.  Where reading is free, those of terminal
        successors are arbitrary."""
        if reads_freely(rollout.truncated):
            return self.values_by_need(rollout, self.body.sequence)
        return self.read_both(rollout, *self.body.successors(rollout))

    def values_by_need(self, rollout: Rollout, sequence: Sequencer) -> tuple[Tensor, Tensor]:
        """The same in half the time; see ``Body.successors_by_need``."""
        return self.read_both(rollout, *self.body.successors_by_need(rollout, sequence))

    def read_both(self, rollout: Rollout, features: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """The values [T, N] from features of each observation and of its successor."""
        return self.read(features), self.read(following)

    def attach_critic_state(self, rollout: Rollout) -> Rollout:
        """The rollout with the critic's hidden state at its start."""
        if not self.remembers:
            return rollout
        return replace(rollout, hidden_state=rollout.hidden_state | {self.body.name: self.hidden_state.unsqueeze(0)})

    @torch.no_grad()
    def update_statistics(self, rollout: Rollout) -> None:
        """Advance the hidden state to the end of a rollout."""
        if self.remembers:
            self.hidden_state.copy_(self.body.sequence(self.attach_critic_state(rollout))[1][self.body.name][-1])
