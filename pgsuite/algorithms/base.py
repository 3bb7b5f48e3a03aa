"""Base classes of all methods: the steps of an iteration, and an actor-critic with an advantage estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from pgsuite import distributed
from pgsuite.algorithms.channels import Channel, Channels, critic_loss
from pgsuite.algorithms.estimators import GAE, Estimator
from pgsuite.algorithms.reference import Reference
from pgsuite.algorithms.symmetry import Symmetry
from pgsuite.components import Component
from pgsuite.envs.base import VectorEnv, channels_of
from pgsuite.functional import objectives
from pgsuite.kernel import Kernel, is_phase, phase
from pgsuite.nn.normalize import RewardScale
from pgsuite.nn.optim import Accumulated, Objective, Optimizer, make_optimizer
from pgsuite.nn.policy import Critic, Policy, log_prob
from pgsuite.nn.schedules import Scheduled
from pgsuite.rollout import Collector, StepCollector, minibatches
from pgsuite.rollout.minibatches import check_split
from pgsuite.settings import Count, Fraction, Positive, closest
from pgsuite.types import (
    LIFE_LOST,
    Batch,
    Metrics,
    Rollout,
    average,
    explained_variance,
    masked_mean,
    moments,
    standardize,
)

PLAIN = (bool, int, float, str, type(None))


@dataclass(kw_only=True, eq=False)
class Algorithm(Scheduled, ABC):
    """A policy gradient method: it collects rollouts with a policy and updates the policy on them.

    Hyperparameters are dataclass fields.  A subclass adds its own, and the configuration schema is derived from them.
    Each number among them may be given as a schedule.  The fields ``policy``, ``reference``, ``symmetry``,
    ``reward_scale`` and ``generator`` are objects that the runtime supplies.
    """

    collector: ClassVar[type[Collector]] = StepCollector
    unused_settings: ClassVar[tuple[str, ...]] = ()  # fields of base classes without effect, left out of the schema
    supports_off_policy: ClassVar[bool] = False  # whether it corrects rollouts of an earlier policy (overlap=true)
    action_values: ClassVar[bool] = False  # whether its critic is an ActionCritic: Q(s, a) rather than V(s)

    policy: Policy
    reference: Reference | None = None
    symmetry: Symmetry | None = None
    reward_scale: RewardScale | None = None
    generator: Generator | None = None  # random stream of minibatches

    gamma: Fraction = 0.99  # discount factor of rewards, per step
    micro_batches: Count = 1  # pieces of each gradient step, of which one at a time is in memory; the step is the same

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.scheduled.values():
            part.to(self.device)
        self.training_step = Kernel("learn", self.train_on)
        self.fit = Kernel("fit", self._fit)

    @property
    def device(self) -> torch.device:
        """Where the policy is, and what the method keeps."""
        return next(self.policy.parameters()).device

    def make_collector(self, env: VectorEnv, horizon: int, seed: int) -> Collector:
        """The collector of rollouts of up to ``horizon`` steps in the environments."""
        return self.collector(env, horizon, seed)

    def iterate(self, collector: Collector) -> Metrics:
        """One iteration: collect a rollout and train on it."""
        return self.training_step(collector.collect(self.policy))

    def train_on(self, rollout: Rollout) -> Metrics:
        """Update the policy, and the critics if there are any, on a rollout.

        Running statistics of observations and the critics' hidden states move last, so the importance ratio is exactly
        1 when the update begins.
        """
        prepared = self.preprocess(rollout)
        metrics = self.learn(prepared)
        metrics |= self.learn_channels(prepared)
        metrics |= self.adapt(prepared)
        self.update_statistics(rollout)
        return metrics

    @is_phase("preprocess")
    def preprocess(self, rollout: Rollout) -> Rollout:
        """The rollout with the reference's log-probabilities and KL penalty, with rewards scaled by statistics that
        include it, if these are configured, and with the critics' hidden states.  Lost lives are terminal in it."""
        if LIFE_LOST in rollout.extra:
            rollout = replace(rollout, terminated=rollout.terminated | rollout.extra[LIFE_LOST])
        if self.reward_scale is not None:
            self.reward_scale.update(rollout.reward, rollout.start, rollout.mask, self.gamma)
        if self.reference is not None:
            rollout = self.reference.compare(rollout, self.micro_batches)
        if self.symmetry is not None:
            reference = None if self.reference is None else self.reference.policy
            rollout = self.symmetry.compare(self.symmetry.attach(rollout), self.policy, reference, self.micro_batches)
            self.symmetry.follow(self.policy.body, rollout)  # as the policy that acted
        if self.reward_scale is not None:
            rollout = replace(rollout, reward=self.reward_scale(rollout.reward, rollout.mask))
        for critic in self.critics:
            rollout = critic.attach_critic_state(rollout)
        return rollout

    def learn(self, rollout: Rollout) -> Metrics:
        """Compute advantages and update on them."""
        batch = self.compute_advantages(rollout)
        with phase("update"):
            metrics = self.update(batch)
        return metrics | self.metrics(batch)

    def learn_channels(self, rollout: Rollout) -> Metrics:
        """Learn from a rollout what belongs to the channels beside the reward: nothing without a critic."""
        return {}

    @is_phase("compute_advantages")
    @torch.no_grad()
    def compute_advantages(self, rollout: Rollout) -> Batch:
        """Advantages and value targets [T, N] of a rollout, and beside it of its mirror image if that is trained on."""
        batch = self._compute_advantages(rollout)
        return batch if self.symmetry is None else self.symmetry.augment(batch)

    @abstractmethod
    def _compute_advantages(self, rollout: Rollout) -> Batch:
        """Compute advantages and value targets, each [T, N]; called without gradient."""

    def policy_objective(self, gain: Tensor, logp: Tensor, batch: Batch) -> Tensor:
        """Policy objective per cell [...], to maximize: the surrogate objective ``gain``, minus the KL penalty of the
        reference if that belongs to the loss, importance-weighted for rollouts of an earlier policy, and minus the
        mirror loss."""
        if self.reference is not None:
            gain = gain - self.reference.kl_penalty(logp, batch)
        gain = self.importance_weighted(gain, batch)
        return gain if self.symmetry is None else gain - self.symmetry.penalty(self.policy, batch)

    @staticmethod
    def importance_weighted(x: Tensor, seen: Rollout | Batch) -> Tensor:
        """x [...] times the importance weights of rollouts of an earlier policy, so that its means estimate those under
        the policy at the start of the update; x itself if the rollout is on-policy."""
        return seen.extra["weight"] * x if "weight" in seen.extra else x

    @abstractmethod
    def update(self, batch: Batch) -> Metrics:
        """Update the policy on a batch, and return metrics."""

    @is_phase("adapt")
    def adapt(self, rollout: Rollout) -> Metrics:
        """Adapt coefficients and adaptive schedules to the KL of this update; the metrics are that KL and the present
        value of every schedule."""
        metrics: Metrics = {} if self.reference is None else self.reference.adapt(rollout)
        scheduled = self.scheduled
        if adaptive := [schedule for part in scheduled.values() for schedule in part.adaptive]:
            metrics["kl"] = kl = self.kl_from_behavior(rollout)
            for schedule in adaptive:
                schedule.react(kl)
        for prefix, part in scheduled.items():
            metrics |= {f"{prefix}{name}": schedule.value.clone() for name, schedule in part.schedules.items()}
        return metrics

    @is_phase("update_statistics")
    def update_statistics(self, rollout: Rollout) -> None:
        """Update the running statistics of observations and the critics' hidden states; called after the update,
        before the next rollout."""
        self.policy.update_statistics(rollout if self.symmetry is None else self.symmetry.both(rollout))
        for critic in self.critics:
            if self.symmetry is not None and critic.remembers:
                self.symmetry.follow(critic.body, critic.attach_critic_state(rollout))
            critic.update_statistics(rollout)

    @is_phase("metrics")
    def metrics(self, batch: Batch) -> Metrics:
        """Metrics common to all methods: learning rates, explained variance, effective sample size as a fraction, and
        those of the policy."""
        metrics = {
            f"{name.removesuffix('optimizer')}learning_rate": part.lr * part.lr_scale
            for name, part in self.held.items()
            if isinstance(part, Optimizer)
        }
        metrics["explained_variance"] = explained_variance(batch.value, batch.target, batch.mask)
        if (weight := batch.extra.get("weight")) is not None:  # Kish, 1965
            mean, variance = moments(weight, batch.mask)
            metrics["effective_sample_fraction"] = mean**2 / (mean**2 + variance)
        return metrics | self.policy.metrics(batch.action, batch.mask)

    @torch.no_grad()
    def kl_from_behavior(self, seen: Rollout | Batch) -> Tensor:
        """Mean KL(behavior policy || policy) [] over real cells, in nats, estimated from the actions.  For rollouts of
        an earlier policy, the behavior policy is that at the start of the update."""
        log_ratio = objectives.log_ratio(log_prob(self.policy, seen, self.micro_batches), seen.logp)
        return distributed.mean(
            masked_mean(self.importance_weighted(objectives.sampled_kl(log_ratio), seen), seen.mask)
        )

    def rank(self, evaluation: Mapping[str, float]) -> tuple[float, ...]:
        """What tells the best of several evaluations, by the names of their means: the greatest is the best."""
        return (evaluation["return"],)

    @property
    def host_sync_reason(self) -> str | None:
        """Why an update reads from the device, and the setting that avoids it; None if it does not."""
        pieces = self.policy.body.pieces_sync_reason if self.micro_batches > 1 else None
        return pieces or next(filter(None, (optimizer.host_sync_reason for optimizer in self.optimizers)), None)

    @property
    def scheduled(self) -> dict[str, Scheduled]:
        """The method and its parts with schedules, by the prefix of their metrics."""
        return {"": self} | {f"{name}_": part for name, part in self.held.items() if isinstance(part, Scheduled)}

    @property
    def critics(self) -> list[Critic]:
        found: list[nn.Module] = []
        for part in self.parts.values():
            found += part.children() if isinstance(part, nn.ModuleList | nn.ModuleDict) else [part]
        return [part for part in found if isinstance(part, Critic)]

    @property
    def sequential(self) -> bool:
        """Whether minibatches must be whole columns in time order, as for recurrent networks."""
        return any(network.sequential for network in (self.policy, *self.critics))

    def split(self, batch: Batch, count: int) -> Iterator[Batch]:
        """Random minibatches of a batch: whole columns if ``sequential``, single cells otherwise."""
        return map(self.prepared, minibatches(batch, count, columns=self.sequential, generator=self.generator))

    def prepared(self, batch: Batch) -> Batch:
        """A minibatch as its gradient step takes it."""
        return batch

    def gradient_step(self, optimizer: Optimizer, objective: Objective, *seen: Any, mean: str = "cells") -> Metrics:
        """A step of the optimizer on the loss objective(*seen)[0], a mean over the real cells or over the ``columns``
        of a batch, which is the last of ``seen``.  With ``micro_batches`` its gradient is accumulated over pieces."""
        if self.micro_batches == 1:
            return optimizer.step(objective, *seen)
        *others, batch = seen
        pieces = [part for _, part in self.policy.body.pieces(batch, self.micro_batches)]
        sizes = [x.mask.sum() if mean == "cells" else torch.ones_like(x.mask[0]).sum() for x in pieces]
        size = distributed.mean(torch.stack(sizes).to(batch.logp.dtype))
        weights = (size / size.sum().clamp(min=1.0)).unbind()
        return optimizer.step(
            Accumulated(objective), *((weight, (*others, x)) for weight, x in zip(weights, pieces, strict=True))
        )

    def _fit(
        self, optimizer: Optimizer, objective: Objective, given: tuple[Any, ...], batch: Batch, epochs: int, parts: int
    ) -> Metrics:
        """Minimize objective(*given, minibatch) in several passes over a batch, each of so many parts.  The metrics are
        means over the steps."""
        steps: list[Metrics] = []
        for _ in range(epochs):
            steps += [self.gradient_step(optimizer, objective, *given, part) for part in self.split(batch, parts)]
        return average(steps)

    def validate(self, collector: Collector) -> None:
        """Raise ValueError if this method cannot train on rollouts of the collector."""
        for name, part in self.held.items():
            if isinstance(part, torch.optim.Optimizer):
                path = f"{type(part).__module__}.{type(part).__qualname__}"
                raise ValueError(
                    f"{type(self).__name__}.{name} is a {path}, and must be a pgsuite.nn.optim.Optimizer: write "
                    f"self.{name} = pgsuite.nn.optim.make_optimizer([self.policy], self.lr, '{path}')"
                )
        if self.symmetry is not None:
            for network in filter(None, (self.policy, getattr(self, "critic", None))):
                self.symmetry.check(network.body)
        if collector.is_off_policy and not self.supports_off_policy:
            raise ValueError(
                f"overlap=true has an earlier policy act, and {type(self).__name__} is right only about what its own "
                "policy did: leave it out, or take algo=a2c, npg, trpo, ppo, ppo_penalty, spo or vmpo"
            )

    def update_schedules(self, fraction: float) -> None:
        """Set every schedule to its value at a fraction of the run; called before each iteration."""
        for part in self.scheduled.values():
            part.set_progress(fraction)

    def slow_down(self) -> None:
        """Halve all learning rates for the rest of the run, whatever their schedules."""
        for optimizer in self.optimizers:
            optimizer.lr_scale.mul_(0.5)

    def finite(self) -> Tensor:
        """Whether all parameters and statistics are finite []."""
        tensors = [x for part in self.parts.values() for x in part.state_dict().values()]
        tensors = [x for x in tensors if x.numel() and x.is_floating_point()]  # others are always finite
        return nn.utils.get_total_norm(tensors, torch.inf).isfinite()

    @property
    def held(self) -> dict[str, Any]:
        """Every object but numbers and strings that this method holds as an attribute, in order and once, by name:
        "critic"; within lists, tuples, dictionaries and channels with its index, key or attribute: "twins.0",
        "heads.left"."""
        found: dict[int, tuple[str, Any]] = {}

        def walk(name: str, x: Any) -> None:
            if id(x) in found or x is self:
                return
            found[id(x)] = name, x
            inside = x.items() if isinstance(x, Mapping) else enumerate(x) if isinstance(x, list | tuple) else ()
            for key, value in vars(x).items() if isinstance(x, Channel) else inside:
                if key != "schedules" and type(value) not in PLAIN:  # Scheduled saves schedules and moves them
                    walk(f"{name}.{key}", value)

        for name, x in vars(self).items():
            if name != "schedules" and type(x) not in PLAIN:
                walk(name, x)
        return dict(found.values())

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.held.items() if isinstance(part, nn.Module)}

    @property
    def optimizers(self) -> list[Optimizer]:
        return [part for part in self.held.values() if isinstance(part, Optimizer)]

    @property
    def stateful(self) -> dict[str, Any]:
        """The parts whose state is saved: those with a ``state_dict``, and random generators."""
        return {
            name: part for name, part in self.held.items() if isinstance(part, Generator) or hasattr(part, "state_dict")
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of every part in ``stateful``, and of the schedules; parts that a subclass assigns as attributes
        are included."""
        state = {
            name: part.get_state() if isinstance(part, Generator) else part.state_dict()
            for name, part in self.stateful.items()
        }
        return state | {"schedules": super().state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, weights_only: bool = False) -> None:
        """Load a state.  With ``weights_only``, random streams and tensors of other shapes, which belong to the
        environments, are left out."""
        super().load_state_dict(state["schedules"])
        parts = self.stateful
        for name in state.keys() - {"schedules"}:
            part, part_state = parts[name], state[name]
            if isinstance(part, nn.Module) and weights_only:
                own = part.state_dict()
                part.load_state_dict(
                    {key: x for key, x in part_state.items() if x.shape == own[key].shape}, strict=False
                )
            elif not isinstance(part, Generator):
                part.load_state_dict(part_state)
            elif not weights_only:
                part.set_state(part_state)


@dataclass(kw_only=True, eq=False)
class ActorCritic(Algorithm):
    """Advantages from a critic, and a surrogate objective of importance ratios to maximize.

    For rollouts of an earlier policy (overlap=true), importance ratios are relative to the policy at the start of the
    update, around which clip ranges and trust regions lie; the objective of each cell is weighted by the ratio of
    that policy to the behavior policy (for PPO, Hilton et al., 2022).
    """

    supports_off_policy = True

    critic: Critic
    estimator: Estimator = field(default_factory=GAE)
    channels: Channels = field(default_factory=Channels)
    normalize_advantage: Literal["none", "batch"] = "batch"  # standardize advantages to zero mean and unit variance
    ratio: Literal["token", "sequence"] = "token"  # importance ratio of each action, or of whole episodes

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, channel in self.channels.items():
            channel.setup(name, self.critic)

    def validate(self, collector: Collector) -> None:
        super().validate(collector)
        self.validate_channels(collector)
        if self.ratio == "sequence" and not (self.sequential and collector.whole_episodes):
            raise ValueError("algo.ratio=sequence is for whole episodes of policies that see them as such: env=rlhf")
        if collector.is_off_policy and not self.estimator.supports_off_policy:
            raise ValueError(
                f"overlap=true has an earlier policy act, and {type(self.estimator).__name__} counts what it was paid "
                "as it came: leave it out, or take algo/estimator=gae, td_lambda or vtrace"
            )

    def _compute_advantages(self, rollout: Rollout) -> Batch:
        value, next_value = self.values_and_next_values(rollout)
        ratio = weight = rollout.extra.get("weight")
        if self.estimator.off_policy:
            since = objectives.log_ratio(self.policy.dist(rollout).log_prob(rollout.action), rollout.logp).exp()
            ratio = since if weight is None else weight * since
        advantage, target = self.estimator(rollout, value, next_value, ratio, gamma=self.gamma)
        self.critic.observe_targets(target, rollout.mask)
        if weight is not None:
            clipped = weight.clamp(max=self.estimator.rho_clip)
            rollout = replace(rollout, extra=rollout.extra | {"weight": clipped})
        elif ratio is not None:
            advantage = ratio.clamp(max=self.estimator.rho_clip) * advantage
        channels = {name: x["advantage"] for name, x in rollout.estimates.items()}
        advantage = self.combine(advantage, channels, rollout.mask)
        return Batch.of(rollout, value=value, advantage=advantage, target=target)

    def values_and_next_values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The critic's values [T, N] of each observation and of its true successor."""
        return self.critic.values_and_next_values(rollout)

    def combine(self, advantage: Tensor, channels: dict[str, Tensor], mask: Tensor) -> Tensor:
        """The advantage [T, N] that the policy is to gain: that of the reward and those of ``channels``, each by its
        weight, standardized if that is configured."""
        for name, x in channels.items():
            advantage = advantage + self.channels[name].weight * x
        return standardize(advantage, mask) if self.normalize_advantage == "batch" else advantage

    def preprocess(self, rollout: Rollout) -> Rollout:
        rollout = super().preprocess(rollout)
        return replace(rollout, estimates={name: x.estimate(rollout) for name, x in self.channels.items()})

    def learn_channels(self, rollout: Rollout) -> Metrics:
        """Fit the critics of the channels; the metrics of each have its name before them."""
        metrics: Metrics = {}
        for name, channel in self.channels.items():
            with phase("channels"):
                metrics |= {f"{name}_{key}": x for key, x in channel.learn(rollout, self.fit).items()}
            found = rollout.estimates[name]
            metrics[f"{name}_explained_variance"] = explained_variance(found["value"], found["target"], rollout.mask)
        return metrics

    def update_statistics(self, rollout: Rollout) -> None:
        super().update_statistics(rollout)
        for channel in self.channels.values():
            channel.update_statistics(rollout)

    def validate_channels(self, collector: Collector) -> None:
        """Raise ValueError for a channel that the environments do not have, and for minibatches that do not divide."""
        known = channels_of(collector.env)
        for name, channel in self.channels.items():
            if channel.from_env and name not in known:
                example = f"env=SafetyHalfCheetahVelocity, or env=gym env.channels=[{name}]"
                remedy = closest(name, known) if known else f"take an environment with it, such as {example}"
                raise ValueError(
                    f"{type(self).__name__} learns from the channel {name!r}, and {collector.env.name} has "
                    f"{'others' if known else 'none'}: {remedy}"
                )
            check_split(collector.horizon, collector.env.num_envs, channel.minibatches, columns=self.sequential)

    def ratio_of(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """Importance ratio per cell [...]: of each action, or of its whole episode."""
        return (objectives.sequence_log_ratio(log_ratio, mask) if self.ratio == "sequence" else log_ratio).exp()

    def surrogate_objective(self, logp: Tensor, batch: Batch) -> Tensor:
        """Policy objective per cell [...] at a policy with the log-probabilities ``logp`` [...] of the actions."""
        ratio = self.ratio_of(objectives.log_ratio(logp, batch.logp), batch.mask)
        return self.policy_objective(self.surrogate(ratio, batch.advantage), logp, batch)

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """Surrogate objective per cell [...], to maximize."""
        return objectives.surrogate(ratio, advantage)


@dataclass(kw_only=True, eq=False)
class CriticRegressionMixin(Algorithm):
    """Fits critics by regression on the value targets of a batch, over several epochs, with a separate optimizer."""

    critic_optim: Component = "adam"  # adam, rmsprop, or a class by its dotted path, as torch.optim.AdamW
    critic_lr: Positive = 1e-3  # learning rate of the critic's optimizer
    critic_epochs: Count = 10  # passes of the critic over each batch
    critic_minibatches: Count = 4  # gradient steps of the critic in each pass

    def validate(self, collector: Collector) -> None:
        super().validate(collector)
        if self.critics:
            split = self.critic_minibatches
            check_split(collector.horizon, collector.env.num_envs, split, columns=self.sequential)

    def make_critic_optimizer(self, critic: Critic) -> Optimizer:
        return make_optimizer([critic.own], self.critic_lr, self.critic_optim, where="algo.critic_optim")

    @is_phase("critic")
    def fit_critic(self, critic: Critic, optimizer: Optimizer, batch: Batch) -> Metrics:
        metrics = self.fit(optimizer, critic_loss, (critic,), batch, self.critic_epochs, self.critic_minibatches)
        return metrics | {"critic_grad_norm": metrics.pop("grad_norm")}
