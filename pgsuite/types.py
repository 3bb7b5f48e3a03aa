"""What flows through the suite, and in what shape.

T  steps per rollout      N  environments      B  a flat minibatch drawn from T * N
*O observation dims       *A action dims       [...] any leading dims

An observation is a tensor [..., *O] or a dictionary of such tensors.  What it holds under ``critic_obs`` is for the
critic, which sees nothing else; the policy sees the rest.  Under ``action_mask`` it says which discrete actions are
allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from pgsuite import distributed

Metrics = dict[str, Tensor]  # zero-dimensional, on the device; the trainer alone reads them back
Obs = Any  # Tensor, or dict[str, Obs]
HiddenState = dict[str, Tensor]  # [..., H] under each name of a network that remembers; empty where none does
PRIVILEGED, ACTION_MASK = "critic_obs", "action_mask"


class Step(NamedTuple):
    """What an environment returns.  Finished environments restart within the step."""

    obs: Obs  # [N, *O] what to act on next: a fresh observation where the episode ended
    next_obs: Obs  # [N, *O] the true successor, before any restart; equals obs elsewhere
    reward: Tensor  # [N]
    terminated: Tensor  # [N] bool, the task ended: nothing follows, so its value is zero
    truncated: Tensor  # [N] bool, the clock ended and the task did not: bootstrap from next_obs
    mask: Tensor | None = None  # [N] bool, false where this step was spent on restarting; None where none ever is

    @property
    def done(self) -> Tensor:
        return self.terminated | self.truncated


def map_obs(fn: Callable[[Tensor], Tensor], obs: Obs) -> Obs:
    """fn applied to an observation, entry by entry if it is a dictionary."""
    return {key: map_obs(fn, x) for key, x in obs.items()} if isinstance(obs, dict) else fn(obs)


def write_obs(into: Obs, index: Any, obs: Obs) -> None:
    """into[index] = obs, of tensors or of arrays, entry by entry if they are dictionaries."""
    if isinstance(obs, dict):
        for key, x in obs.items():
            write_obs(into[key], index, x)
    else:
        into[index] = obs


def choose(mask: Tensor, x: Obs, y: Obs) -> Obs:
    """x [N, ...] where mask [N], and y elsewhere, entry by entry if they are dictionaries."""
    if isinstance(y, dict):
        return {key: choose(mask, x[key], y[key]) for key in y}
    return torch.where(mask.view(-1, *[1] * (y.ndim - 1)), x, y)


def leaves(x: Obs) -> list[Tensor]:
    """The tensors that an observation is made of."""
    return [part for inner in x.values() for part in leaves(inner)] if isinstance(x, dict) else [x]


def finite_cells(x: Tensor, mask: Tensor) -> Tensor:
    """In which cells [...] of mask all of x [..., *X] is finite."""
    return x.isfinite().reshape(*mask.shape, -1).all(-1)


@dataclass(frozen=True)
class Experience:
    """Tensors sharing leading dims; indexing and mapping act on all of them at once."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{f.name: map_obs(fn, getattr(self, f.name)) for f in fields(self)})

    def __getitem__(self, index: Any) -> Self:
        return self.map(lambda x: x[index])


@dataclass(frozen=True)
class Rollout(Experience):
    """What happened: [T, N] experience, as the environments and the acting policy produced it."""

    obs: Obs  # [T, N, *O]
    hidden_state: HiddenState  # [T, N, H] each, what was remembered before seeing obs
    start: Tensor  # [T, N] bool, an episode begins here
    action: Tensor  # [T, N, *A]
    logp: Tensor  # [T, N] under the policy that acted; where an earlier one did, see OverlappedCollector
    reward: Tensor  # [T, N]
    next_obs: Obs  # [T, N, *O]
    terminated: Tensor  # [T, N] bool
    truncated: Tensor  # [T, N] bool
    mask: Tensor  # [T, N] bool, false where nothing real happened
    extra: dict[str, Tensor] = field(default_factory=dict)  # [T, N] each, what was found out on the way to learning

    @property
    def done(self) -> Tensor:
        return self.terminated | self.truncated

    def finite(self) -> Tensor:
        """Whether everything that really happened [] is."""
        parts = (self.action, self.reward, *leaves(self.next_obs))
        return torch.stack([(finite_cells(x, self.mask) | ~self.mask).all() for x in parts]).all()


@dataclass(frozen=True)
class Batch(Experience):
    """What to learn from: the same cells, with credit assigned."""

    obs: Obs  # [..., *O]
    hidden_state: HiddenState  # [..., H] each
    start: Tensor  # [...] bool
    action: Tensor  # [..., *A]
    logp: Tensor  # [...] as in the rollout
    value: Tensor  # [...] what the critic said when credit was assigned
    advantage: Tensor  # [...]
    target: Tensor  # [...] what the critic should have said
    mask: Tensor  # [...] bool
    extra: dict[str, Tensor] = field(default_factory=dict)  # [...] each

    @classmethod
    def of(cls, rollout: Rollout, *, value: Tensor, advantage: Tensor, target: Tensor) -> Batch:
        """A rollout with its credit; cells where nothing real happened are zero, for what is not finite there would
        reach gradients, though no mean."""
        r = rollout
        logp, value, advantage, target = (x.where(r.mask, 0.0) for x in (r.logp, value, advantage, target))
        return cls(r.obs, r.hidden_state, r.start, r.action, logp, value, advantage, target, r.mask, r.extra)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over real cells [...] of x [..., or K, ...], whatever the others hold: a number, or K of them.

    Averaged over processes it is the global mean, however unequal their shares of real cells are.
    """
    count = distributed.mean(mask.sum(dtype=torch.float32)).clamp(min=1.0)
    cells = tuple(range(x.ndim - mask.ndim, x.ndim))
    return x.where(mask, 0.0).sum(cells) / count


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the real cells of all processes."""
    mean = distributed.mean(masked_mean(x, mask))
    return mean, distributed.mean(masked_mean((x - mean) ** 2, mask))


def standardize(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Zero mean and unit deviation over the real cells of all processes; zero elsewhere."""
    mean, variance = moments(x, mask)
    return ((x - mean) / (variance.sqrt() + eps)).where(mask, 0.0)


def explained_variance(value: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(target - value) / Var(target): one for a perfect critic, zero for a constant one."""
    return 1 - moments(target - value, mask)[1] / moments(target, mask)[1].clamp(min=1e-8)


def masked_means(cells: Metrics, mask: Tensor) -> Metrics:
    """The mean over real cells of each of several quantities [...], together."""
    return dict(zip(cells, masked_mean(torch.stack(list(cells.values())), mask).unbind(), strict=True))


def average(steps: Sequence[Metrics], live: Tensor | None = None) -> Metrics:
    """Each metric's mean over steps, or over those that are ``live`` [len(steps)]."""
    names = list(steps[0])
    rows = torch.stack([step[name] for name in names for step in steps]).view(len(names), -1)
    means = rows.mean(-1) if live is None else masked_mean(rows, live)
    return dict(zip(names, means.unbind(), strict=True))
