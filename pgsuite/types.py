"""The data types of the suite and their shapes.

T  steps per rollout      N  environments      B  a flat minibatch drawn from T * N
*O observation dims       *A action dims       [...] any leading dims

An observation is a tensor [..., *O] or a dictionary of such tensors.  The entry ``critic_obs``, if there is one, is the
critic's only input, and the policy's inputs are the others.  The entry ``action_mask`` marks the allowed discrete
actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from pgsuite import distributed

Metrics = dict[str, Tensor]  # zero-dimensional, on the device; only the trainer reads them back
Obs = Any  # Tensor, or dict[str, Obs]
HiddenState = dict[str, Tensor]  # [..., H] by name of the recurrent network; empty if there is none
PRIVILEGED, ACTION_MASK, LIFE_LOST = "critic_obs", "action_mask", "life_lost"


class Step(NamedTuple):
    """One transition of N environments.  Finished environments restart within the step."""

    obs: Obs  # [N, *O] observation to act on next: the first of a new episode where one ended
    next_obs: Obs  # [N, *O] true successor state, before any restart; equals obs where no episode ended
    reward: Tensor  # [N] finite, also where mask is false: estimators and episode returns are scans over all steps
    terminated: Tensor  # [N] bool, a terminal state was reached: its value is zero
    truncated: Tensor  # [N] bool, the time limit was reached and no terminal state: bootstrap from next_obs
    mask: Tensor | None = None  # [N] bool, false where the step only restarted the environment; None if no step does
    life_lost: Tensor | None = None  # [N] bool, terminal to the learner, though the episode goes on; None if never
    channels: dict[str, Tensor] | None = None  # [N] each: costs, or rewards beside the reward; None if there are none

    @property
    def done(self) -> Tensor:
        return self.terminated | self.truncated


def map_obs(fn: Callable[[Tensor], Tensor], obs: Obs) -> Obs:
    """Apply fn to each tensor of an observation."""
    return {key: map_obs(fn, x) for key, x in obs.items()} if isinstance(obs, dict) else fn(obs)


def write_obs(into: Obs, index: Any, obs: Obs) -> None:
    """Assign into[index] = obs for each tensor or array of an observation."""
    if isinstance(obs, dict):
        for key, x in obs.items():
            write_obs(into[key], index, x)
    else:
        into[index] = obs


def choose(mask: Tensor, x: Obs, y: Obs) -> Obs:
    """x [N, ...] where mask [N] is true and y elsewhere, for each tensor of the observations."""
    if isinstance(y, dict):
        return {key: choose(mask, x[key], y[key]) for key in y}
    return torch.where(mask.view(-1, *[1] * (y.ndim - 1)), x, y)


def leaves(x: Obs) -> list[Tensor]:
    """The tensors of an observation, in order."""
    return [part for inner in x.values() for part in leaves(inner)] if isinstance(x, dict) else [x]


def finite_cells(x: Tensor, mask: Tensor) -> Tensor:
    """Whether all of x [..., *X] is finite, in each cell [...] of mask."""
    return x.isfinite().reshape(*mask.shape, -1).all(-1)


@dataclass(frozen=True)
class Experience:
    """Tensors with common leading dims; indexing and ``map`` apply to all of them."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{f.name: map_obs(fn, getattr(self, f.name)) for f in fields(self)})

    def __getitem__(self, index: Any) -> Self:
        return self.map(lambda x: x[index])


@dataclass(frozen=True)
class Rollout(Experience):
    """[T, N] experience, as the behavior policy and the environments produced it."""

    obs: Obs  # [T, N, *O]
    hidden_state: HiddenState  # [1, N, H] each, before the first row of obs is processed
    start: Tensor  # [T, N] bool, obs is the first of an episode
    action: Tensor  # [T, N, *A]
    logp: Tensor  # [T, N] log-probability under the behavior policy; if that is stale, see OverlappedCollector
    reward: Tensor  # [T, N]
    next_obs: Obs  # [T, N, *O]
    terminated: Tensor  # [T, N] bool
    truncated: Tensor  # [T, N] bool
    mask: Tensor  # [T, N] bool, false in cells without a transition
    extra: dict[str, Tensor] = field(default_factory=dict)  # [T, N, ...] each: life_lost, and what methods compute
    channels: dict[str, Tensor] = field(default_factory=dict)  # [T, N] each: costs, or rewards beside the reward
    # value, advantage and target [T, N] in each channel from which the method learns, which preprocessing computes
    estimates: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def done(self) -> Tensor:
        return self.terminated | self.truncated

    def finite(self) -> Tensor:
        """Whether actions, rewards, channels and next observations are finite in all real cells: [] bool."""
        parts = (self.action, self.reward, *self.channels.values(), *leaves(self.next_obs))
        return (torch.stack([finite_cells(x, self.mask) for x in parts]).all(0) | ~self.mask).all()


@dataclass(frozen=True)
class Batch(Experience):
    """A rollout with advantages and value targets, from which policy and critic learn."""

    obs: Obs  # [..., *O]
    hidden_state: HiddenState  # [1, N, H] each, of sequences [T, N] only
    start: Tensor  # [...] bool
    action: Tensor  # [..., *A]
    logp: Tensor  # [...] as in the rollout
    value: Tensor  # [...] the critic's value when the advantages were computed
    advantage: Tensor  # [...]
    target: Tensor  # [...] regression target of the critic
    mask: Tensor  # [...] bool
    extra: dict[str, Tensor] = field(default_factory=dict)  # [..., *X] each
    channels: dict[str, Tensor] = field(default_factory=dict)  # [...] each: the advantage in each channel

    @classmethod
    def of(cls, rollout: Rollout, *, value: Tensor, advantage: Tensor, target: Tensor) -> Batch:
        """A rollout with its advantages.  Masked cells are set to zero: non-finite numbers there would reach gradients,
        even though no mean includes them."""
        r = rollout
        logp, value, advantage, target = (x.where(r.mask, 0.0) for x in (r.logp, value, advantage, target))
        channels = {name: x["advantage"].where(r.mask, 0.0) for name, x in r.estimates.items()}
        return cls(r.obs, r.hidden_state, r.start, r.action, logp, value, advantage, target, r.mask, r.extra, channels)


Cells = TypeVar("Cells", bound=Rollout | Batch)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x [...] or [K, ...] over the real cells of mask [...]: [] or [K].  Other cells may hold anything.

    The average of the result over processes is the global mean, however many real cells each process has.
    """
    count = distributed.mean(mask.sum(dtype=torch.float32)).clamp(min=1.0)
    cells = tuple(range(x.ndim - mask.ndim, x.ndim))
    return x.where(mask, 0.0).sum(cells) / count


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x [...] or [K, ...] over the real cells of all processes: [] or [K]."""
    mean = distributed.mean(masked_mean(x, mask))
    centred = x - mean.view(*mean.shape, *[1] * mask.ndim)
    return mean, distributed.mean(masked_mean(centred**2, mask))


def standardize(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """x with zero mean and unit standard deviation over the real cells of all processes; zero in other cells."""
    mean, variance = moments(x, mask)
    return ((x - mean) / (variance.sqrt() + eps)).where(mask, 0.0)


def explained_variance(value: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(target - value) / Var(target): one for a perfect critic, zero for a constant prediction."""
    left, total = moments(torch.stack([target - value, target]), mask)[1]
    return 1 - left / total.clamp(min=1e-8)


def masked_means(cells: Metrics, mask: Tensor) -> Metrics:
    """The mean over real cells of each quantity [...], in one reduction."""
    return dict(zip(cells, masked_mean(torch.stack(list(cells.values())), mask).unbind(), strict=True))


def average(steps: Sequence[Metrics], live: Tensor | None = None) -> Metrics:
    """The mean of each metric over gradient steps, or over the ``live`` [len(steps)] ones."""
    names = list(steps[0])
    rows = torch.stack([step[name] for name in names for step in steps]).view(len(names), -1)
    means = rows.mean(-1) if live is None else masked_mean(rows, live)
    return dict(zip(names, means.unbind(), strict=True))
