"""Mirror symmetries of tasks, for all methods: training on mirrored rollouts, and the mirror loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from gymnasium import spaces
from torch import Tensor, nn

from pgsuite.envs.mirrors import Mirror
from pgsuite.functional import objectives
from pgsuite.nn.network import Body
from pgsuite.nn.policy import Policy, log_prob
from pgsuite.types import Batch, Rollout

E = TypeVar("E", Rollout, Batch)
LOGP, REFERENCE = "mirrored_logp", "mirrored_reference"  # of a rollout's ``extra``
MIRRORED = "mirrored "  # before the names of the hidden states of a mirror image


class MirroredMemory(nn.Module):
    """The hidden states [N, H] of a network with memory in the mirror images of the environments."""

    hidden_state: Tensor

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.register_buffer("hidden_state", initial.clone())


class Symmetry(nn.Module):
    """What a method makes of a mirror symmetry: with ``augment`` it trains on each rollout and on its mirror image, and
    with ``coef`` the policy objective is reduced by coef times the mirror loss.

    The mirror loss is |mode(s) - mirrored mode(mirrored s)|^2, summed over the components of an action (Yu et al.,
    2018).  Raises ValueError for it with actions other than a Box.

    Networks with memory remember the mirrored episode as well: the hidden states of their ``bodies`` in the mirror
    images of ``num_envs`` environments are kept from rollout to rollout.
    """

    def __init__(
        self,
        mirror: Mirror,
        action_space: spaces.Space[Any],
        *,
        augment: bool,
        coef: float,
        bodies: Iterable[Body] = (),
        num_envs: int = 0,
    ) -> None:
        super().__init__()
        self.mirror, self.augments, self.coef = mirror, augment, coef
        states = {body.name: body.initial_state(num_envs)[body.name] for body in bodies if body.carries}
        self.memory: Any = nn.ModuleDict({name: MirroredMemory(x) for name, x in states.items()})
        if coef > 0 and not isinstance(action_space, spaces.Box):
            raise ValueError(f"symmetry.coef is for a Box of actions, not {action_space}: take symmetry.augment=true")

    def image(self, seen: E) -> E:
        """The mirror image of a rollout or a batch: of its observations, its actions and what is remembered."""
        states = {name: seen.hidden_state.get(opposite(name), x) for name, x in seen.hidden_state.items()}
        obs, action = self.mirror.observation(seen.obs), self.mirror.action(seen.action)
        return replace(seen, obs=obs, action=action, hidden_state=states)

    def attach(self, rollout: Rollout) -> Rollout:
        """The rollout with the hidden states of its mirror image at its start."""
        states = {MIRRORED + name: x.hidden_state.unsqueeze(0).clone() for name, x in self.memory.items()}
        return replace(rollout, hidden_state=rollout.hidden_state | states)

    @torch.no_grad()
    def follow(self, body: Body, rollout: Rollout) -> None:
        """Advance the hidden state of a body in the mirror image to the end of a rollout that has its own."""
        if body.name in self.memory:
            after = body.sequence(self.image(self.attach(rollout)))[1][body.name][-1]
            self.memory[body.name].hidden_state.copy_(after)

    def check(self, body: Body) -> None:
        """Raise ValueError for a body whose memory of the mirror image is not kept."""
        if body.sequential and body.name not in self.memory:
            raise ValueError(
                f"Symmetry keeps no memory of mirrored episodes for the {body.name}'s {body.shape}: give that as one "
                "of its bodies; language models have none"
            )

    @torch.no_grad()
    def compare(self, rollout: Rollout, policy: Policy, reference: Policy | None, pieces: int = 1) -> Rollout:
        """The rollout with the log-probabilities [T, N] of the mirrored actions, under the policy at the start of the
        update and under a reference."""
        if not self.augments:
            return rollout
        image = self.image(rollout)
        found = {LOGP: log_prob(policy, image, pieces)}
        if reference is not None:
            found[REFERENCE] = log_prob(reference, image, pieces)
        found = {name: x.where(rollout.mask, 0.0) for name, x in found.items()}
        return replace(rollout, extra=rollout.extra | found)

    def augment(self, batch: Batch) -> Batch:
        """A batch [T, N] and its mirror image, as [T, 2 N].

        ``logp`` of a mirrored action is that of the policy at the start of the update, so that all importance ratios
        begin at 1.  The action was not drawn from that policy but from its mirror image, under which its probability is
        that of the original action: its importance weight is the ratio of the two, truncated at 1, and is 1 if the
        policy is symmetric.
        """
        if not self.augments:
            return batch
        extra = dict(batch.extra)
        logp, reference = extra.pop(LOGP), extra.pop(REFERENCE, None)
        weight = extra.get("weight", torch.ones_like(batch.logp))
        drawn = objectives.log_ratio(logp, batch.logp).clamp(max=0.0).exp()
        own = replace(batch, extra=extra | {"weight": weight})
        extra |= {"weight": weight * drawn} | ({} if reference is None else {"reference": reference})
        image = replace(self.image(batch), logp=logp, extra=extra)
        return join(own, image)

    def both(self, rollout: Rollout) -> Rollout:
        """A rollout and its mirror image, of which running statistics are symmetric."""
        return join(rollout, self.image(rollout)) if self.augments else rollout

    def penalty(self, policy: Policy, batch: Batch) -> Tensor | float:
        """The mirror loss per cell [...], times its coefficient."""
        if self.coef == 0:
            return 0.0
        mode, image = (policy.dist(x).mode() for x in (batch, self.image(batch)))
        return self.coef * (mode - self.mirror.action(image)).square().sum(-1)


def opposite(name: str) -> str:
    """The name of the hidden state of the mirror image of the one that is named, and the reverse."""
    return name.removeprefix(MIRRORED) if name.startswith(MIRRORED) else MIRRORED + name


def join(one: E, other: E) -> E:
    """Two rollouts or batches side by side, as [T, 2 N]."""
    rest: list[Tensor] = []
    other.map(lambda x: rest.append(x) or x)
    each = iter(rest)
    return one.map(lambda x: torch.cat([x, next(each)], 1))
