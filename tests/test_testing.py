"""Checks of a user's own methods and tasks: ours pass them, and each fault is named."""

import random
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Generator, Tensor, nn
from toys import ALL, BRIEF, mostly_long

from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, Reinforce
from pgsuite.envs import make
from pgsuite.envs.tasks import Task
from pgsuite.nn.optim import Adam
from pgsuite.settings import NonNegative
from pgsuite.testing import check_algorithm, check_task
from pgsuite.testing.worlds import Point
from pgsuite.types import Batch, Metrics, Rollout, masked_mean

# Methods


@pytest.mark.parametrize(
    ("cls", "settings"),
    mostly_long(
        [
            *(brief := [(cls, BRIEF[cls]) for cls in ALL]),
            (Reinforce, BRIEF[Reinforce] | {"baseline": "critic"}),
            (TRPO, BRIEF[TRPO] | {"backtracking": "batched"}),
            (PPO, BRIEF[PPO] | {"target_kl": 0.02, "early_stop": "masked", "recompute_advantage": True}),
        ],
        *brief,
    ),
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_every_method_does_what_the_suite_relies_on(cls: type[Algorithm], settings: dict[str, Any]) -> None:
    check_algorithm(cls, **settings)


def test_a_method_that_says_what_it_reads_may_read_it() -> None:
    check_algorithm(Reads, reason="the loss is looked at", learns=False)


def test_what_cannot_learn_is_asked_to_only_where_it_should() -> None:
    check_algorithm(Descends, learns=False)


@dataclass(kw_only=True, eq=False)
class Reads(A2C):
    reason: str | None = None

    @property
    def host_sync_reason(self) -> str | None:
        return self.reason

    def update(self, batch: Batch) -> Metrics:
        metrics = super().update(batch)
        return metrics | {"loss": metrics["loss"] * (metrics["loss"].item() < 1e9)}


class Chooses(A2C):
    """Reads a shape that depends on data."""

    def update(self, batch: Batch) -> Metrics:
        return super().update(batch) | {"best": batch.advantage[batch.mask].amax()}


class Reassigns(NPG):
    def update_policy(self, batch: Batch) -> Metrics:
        metrics = super().update_policy(batch)
        for p in self.policy.parameters():
            p.data = p.data.clone()
        return metrics


class Replaces(NPG):
    def update_policy(self, batch: Batch) -> Metrics:
        metrics = super().update_policy(batch)
        self.policy.out.bias = nn.Parameter(self.policy.out.bias.detach().clone())
        return metrics


class DrawsGlobally(A2C):
    def update(self, batch: Batch) -> Metrics:
        return super().update(replace(batch, advantage=batch.advantage + torch.randn_like(batch.advantage)))


class DrawsInPython(A2C):
    def update(self, batch: Batch) -> Metrics:
        return super().update(replace(batch, advantage=batch.advantage * random.random()))


@dataclass(kw_only=True, eq=False)
class DrawsUnseeded(A2C):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.own = Generator()
        self.own.seed()

    def update(self, batch: Batch) -> Metrics:
        noise = torch.empty_like(batch.advantage).normal_(generator=self.own)
        return super().update(replace(batch, advantage=batch.advantage + noise))


class TouchesEarly(A2C):
    def preprocess(self, rollout: Rollout) -> Rollout:
        self.policy.update_statistics(rollout)
        return super().preprocess(rollout)


class NeverTakesIn(A2C):
    def update_statistics(self, rollout: Rollout) -> None:
        pass


class MovesEarly(A2C):
    def learn(self, rollout: Rollout) -> Metrics:
        with torch.no_grad():
            self.policy.out.bias.add_(0.1)
        return super().learn(rollout)


class WrongLogp(A2C):
    def _compute_advantages(self, rollout: Rollout) -> Batch:
        batch = super()._compute_advantages(rollout)
        return replace(batch, logp=batch.logp - 0.1)


@dataclass(kw_only=True, eq=False)
class Says(A2C):
    """A metric that is none."""

    what: str = "number"

    def update(self, batch: Batch) -> Metrics:
        entropy = self.policy.dist(batch).entropy()
        said: dict[str, Any] = {
            "number": 1.0,
            "many": entropy.detach(),
            "attached": entropy.mean(),
            "infinite": entropy.detach().mean() / 0,
        }
        return super().update(batch) | {"mine": said[self.what]}


@dataclass(kw_only=True, eq=False)
class SaysSometimes(A2C):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.count = 0

    def update(self, batch: Batch) -> Metrics:
        self.count += 1
        return super().update(batch) | ({} if self.count % 2 else {"even": batch.advantage.mean()})


class SaysNothing(A2C):
    def iterate(self, collector: Any) -> Any:
        super().iterate(collector)


class Diverges(A2C):
    def update_statistics(self, rollout: Rollout) -> None:
        super().update_statistics(rollout)
        with torch.no_grad():
            self.critic.out.bias.fill_(torch.nan)


class IgnoresMasks(A2C):
    """Its loss is a mean over all cells."""

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        ratio = (self.policy.dist(batch).log_prob(batch.action) - batch.logp).exp()
        loss = -(ratio * batch.advantage).mean() + (self.critic(batch) - batch.target).square().mean()
        return loss, {"loss": loss.detach()}


class SaysOfMasked(A2C):
    """Its metric is a mean over all cells."""

    def update(self, batch: Batch) -> Metrics:
        return super().update(batch) | {"reward": batch.target.mean()}


@dataclass(kw_only=True, eq=False)
class Forgets(A2C):
    """What it remembers is a tensor that nobody saves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trace = torch.zeros(())

    def update(self, batch: Batch) -> Metrics:
        self.trace = 0.5 * self.trace + masked_mean(batch.target, batch.mask)
        return super().update(replace(batch, advantage=batch.advantage + self.trace))


@dataclass(kw_only=True, eq=False)
class HidesAnOptimizer(A2C):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.tools = SimpleNamespace(optimizers=[Adam([nn.Linear(1, 1)], 1e-3)])


@dataclass(kw_only=True, eq=False)
class HidesAModule(A2C):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.tools = SimpleNamespace(net=nn.Linear(1, 1))


@dataclass(kw_only=True, eq=False)
class HidesInTheEstimator(A2C):
    """Estimators save their schedules, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self.estimator)["net"] = nn.Linear(1, 1)


@dataclass(kw_only=True, eq=False)
class LeavesTheCritic(A2C):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimizer = Adam([self.policy], self.lr)


class LeavesThePolicy(NPG):
    def update(self, batch: Batch) -> Metrics:
        return self.fit_critic(self.critic, self.critic_optimizer, batch)


@dataclass(kw_only=True, eq=False)
class AsksANumber(A2C):
    bonus: NonNegative = 0.5

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss, metrics = super().loss(batch)
        return (loss + self.bonus if self.bonus else loss), metrics


@dataclass(kw_only=True, eq=False)
class AsksItsKind(A2C):
    bonus: NonNegative = 5.0

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss, metrics = super().loss(batch)
        bonus = self.bonus if isinstance(self.bonus, float) else 0.0
        return loss - bonus * masked_mean(self.policy.dist(batch).entropy(), batch.mask), metrics


class KeepsSchedulesQuiet(A2C):
    def adapt(self, rollout: Rollout) -> Metrics:
        return {}


class Descends(A2C):
    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return -super().surrogate(ratio, advantage)


FAULTY: list[tuple[type[Algorithm], dict[str, Any], str]] = [
    (Reads, {}, r"^Reads with continuous actions: .* in update \(.*test_testing.py, line \d+\): item reads a tensor"),
    (Chooses, {}, r"reads back to the host in update .*by a mask"),
    (Reassigns, {}, "policy.body.* is another tensor after an iteration: write it in place"),
    (Replaces, {}, "policy.out.bias is another tensor"),
    (DrawsGlobally, {}, "draws from the global random stream: give self.generator"),
    (DrawsInPython, {}, "draws from the global random stream"),
    (DrawsUnseeded, {}, "two runs of one seed differ in algorithm.policy"),
    (TouchesEarly, {}, "the statistics policy.body.obs_norm.moments.mean move before the update"),
    (NeverTakesIn, {}, r"do not move in an iteration: update_statistics must call super\(\)"),
    (MovesEarly, {}, "begins with an importance ratio of .*, and not 1"),
    (WrongLogp, {}, "begins with an importance ratio of 1.105.*, and not 1"),
    (Says, {}, "the metric 'mine' is float, and not a zero-dimensional tensor"),
    (Says, {"what": "many"}, r"the metric 'mine' has shape \(16, 16\)"),
    (Says, {"what": "attached"}, "the metric 'mine' keeps the graph .* alive: detach it"),
    (Says, {"what": "infinite"}, "the metric 'mine' is -?inf, which is not finite"),
    (SaysSometimes, {}, "the metric 'even' is not there in every iteration"),
    (SaysNothing, {}, "iterate returns NoneType, and not a dictionary of metrics"),
    (Diverges, {}, "not finite"),
    (IgnoresMasks, {}, r"what masked cells hold changes .*: take means by masked_mean"),
    (SaysOfMasked, {}, "what masked cells hold changes the metric reward"),
    (Forgets, {}, "took up a saved state goes on otherwise, in algorithm.policy"),
    (HidesAnOptimizer, {}, "self.tools.optimizers.0 is not saved with the method"),
    (HidesAModule, {}, "self.tools.net is not saved with the method"),
    (HidesInTheEstimator, {}, "self.estimator.net is not saved with the method"),
    (LeavesTheCritic, {}, "critic neither moves nor has an optimizer"),
    (LeavesThePolicy, {}, "two iterations do not move the policy at all"),
    (AsksANumber, {}, r"bonus is a zero-dimensional tensor if it is given as a schedule, and loss \(.*__bool__"),
    (AsksItsKind, {}, "is another one if .*bonus.* are given as constant schedules"),
    (KeepsSchedulesQuiet, {}, r"the schedule of gamma is not in the metrics: adapt must call super\(\)"),
    (Descends, {}, "and not up by 3: it does not learn"),
    (PPO, {"minibatches": 7}, "cannot be made for continuous actions: 7 minibatches do not divide"),
    (A2C, {"lrr": 1.0}, "A2C with continuous actions: A2C cannot be made .*lrr"),
]


@pytest.mark.parametrize(
    ("cls", "settings", "message"), mostly_long(FAULTY, *FAULTY[::2]), ids=lambda x: getattr(x, "__name__", "")
)
def test_a_faulty_method_is_told_what_is_wrong(cls: type[Algorithm], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_algorithm(cls, **settings)


def test_an_error_of_the_methods_own_says_whose_it_is() -> None:
    class Breaks(A2C):
        def update(self, batch: Batch) -> Metrics:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        check_algorithm(Breaks)
    assert caught.value.__notes__ == ["raised while Breaks with continuous actions was checked"]


# Tasks


@dataclass(kw_only=True, eq=False)
class Line(Task):
    """Stay near the middle of a line.  It has what a task must have, and nothing else."""

    observation_space = spaces.Box(-3.0, 3.0, (1,))
    action_space = spaces.Discrete(2)

    max_episode_steps: int = 20

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        self.x = torch.zeros(num_envs, 1, device=device)

    def reset(self, mask: Tensor, generator: Generator) -> None:
        fresh = torch.empty_like(self.x).uniform_(-1, 1, generator=generator)
        self.x = torch.where(mask.unsqueeze(-1), fresh, self.x)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        self.x = self.x + 0.2 * (2 * action - 1).unsqueeze(-1)
        return 1 - self.x.squeeze(-1).abs(), self.x.squeeze(-1).abs() > 1.5

    def observe(self) -> Tensor:
        return self.x.clone()


def test_observation_reward_termination_and_reset_make_a_task() -> None:
    check_task(Line)
    env = make(Line(), 3)
    assert env.name == "Line" and env.description == "Line | torch float32 | 3 environments"
    assert env.state_dict()["task"].keys() == {"x"}


@pytest.mark.parametrize("actions", ["continuous", "discrete"])
def test_the_world_that_methods_are_tried_in_is_sound(actions: Any) -> None:
    check_task(partial(Point, actions=actions))


def test_a_task_that_draws_nothing_is_not_asked_for_other_seeds() -> None:
    class Fixed(Line):
        def reset(self, mask: Tensor, generator: Generator) -> None:
            self.x = torch.where(mask.unsqueeze(-1), 0.5, self.x)

    check_task(Fixed)


class Bare(Task):
    def observe(self) -> Tensor:
        return torch.zeros(self.num_envs, 1)


class Spaceless(Bare):
    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        self.observation_space = spaces.Box(-1.0, 1.0, (1,))

    def reset(self, mask: Tensor, generator: Generator) -> None:
        pass

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Column(Line):
    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        reward, terminated = super().advance(action)
        return reward.unsqueeze(-1), terminated


class Whole(Line):
    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        reward, terminated = super().advance(action)
        return reward.long(), terminated


class Floats(Line):
    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        reward, terminated = super().advance(action)
        return reward, terminated.float()


class Alone(Line):
    def advance(self, action: Tensor) -> Any:
        return super().advance(action)[0]


class Number(Line):
    def advance(self, action: Tensor) -> Any:
        return 1.0, super().advance(action)[1]


class Infinite(Line):
    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        reward, terminated = super().advance(action)
        return reward / 0, terminated


class Flat(Line):
    def observe(self) -> Tensor:
        return self.x.squeeze(-1)


class Beyond(Line):
    observation_space = spaces.Box(-1.0, 1.0, (1,))


class Dictionary(Line):
    def observe(self) -> Any:
        return {"x": self.x}


class Restless(Line):
    def observe(self) -> Tensor:
        self.x = self.x + 0.01
        return self.x.clone()


class Aliased(Line):
    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        self.x.add_(0.2 * (2 * action - 1).unsqueeze(-1))
        return 1 - self.x.squeeze(-1).abs(), self.x.squeeze(-1).abs() > 1.5

    def observe(self) -> Tensor:
        return self.x


class ResetsAll(Line):
    def reset(self, mask: Tensor, generator: Generator) -> None:
        super().reset(torch.ones_like(mask), generator)


class ResetsNone(Line):
    def reset(self, mask: Tensor, generator: Generator) -> None:
        torch.empty_like(self.x).uniform_(generator=generator)


class DrawsFromAnywhere(Line):
    def reset(self, mask: Tensor, generator: Generator) -> None:
        self.x = torch.where(mask.unsqueeze(-1), torch.rand_like(self.x), self.x)


class AsksAnyone(Line):
    def reset(self, mask: Tensor, generator: Generator) -> None:
        if mask.any():
            super().reset(mask, generator)


class Lists(Line):
    def reset(self, mask: Tensor, generator: Generator) -> None:
        fresh = torch.empty_like(self.x).uniform_(-1, 1, generator=generator)
        self.x[mask] = fresh[mask]


class Counts(Line):
    """What it counts is saved by nobody."""

    wind = 0.0

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        self.wind = 0.3 - self.wind
        reward, terminated = super().advance(action)
        return reward + self.wind, terminated


class SavesItself(Line):
    """Its state is what it goes on to write to."""

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        x = self.x.add_(0.2 * (2 * action - 1).unsqueeze(-1)).squeeze(-1)
        return 1 - x.abs(), x.abs() > 1.5

    def reset(self, mask: Tensor, generator: Generator) -> None:
        fresh = torch.empty_like(self.x).uniform_(-1, 1, generator=generator)
        self.x.copy_(torch.where(mask.unsqueeze(-1), fresh, self.x))

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x}


class SeedsItself(Line):
    """Which only whole environments show, for nothing ends but by the clock."""

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        self.own = Generator()
        self.own.seed()

    def reset(self, mask: Tensor, generator: Generator) -> None:
        super().reset(mask, self.own)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        reward = self.x.squeeze(-1)
        return reward, torch.zeros_like(reward, dtype=torch.bool)


NO_TASKS: list[tuple[Any, str]] = [
    (Bare, "^Bare lacks advance, reset, observation_space, action_space: see Task"),
    (partial(Bare), "the task cannot be made: .*abstract.* advance"),
    (Spaceless, "^Spaceless on cpu: action_space is missing after place"),
    (lambda: object(), "object is no Task: derive it from"),
    (Column, r"reward of shape \(4, 1\) at step 0, and not \(4,\)"),
    (Whole, "rewards of torch.int64 at step 0, and not floats"),
    (Floats, "terminated as torch.float32 at step 0, and not bool"),
    (Alone, r"advance returns no pair \(reward, terminated\)"),
    (Number, r"advance returns reward as float at step 0, and not as a tensor \[N\]"),
    (Infinite, "a reward that is not finite at step 0"),
    (Flat, r"observe returns shape \(4,\) after reset, and the space says \(4, 1\)"),
    (Beyond, "which is outside observation_space: widen it, or clamp"),
    (Dictionary, r"observe returns dict after reset, and not a tensor \[N, \*O\]"),
    (Restless, "observe returns two things in a row after reset"),
    (Aliased, "what observe returned is written to at step 0: return a copy"),
    (ResetsAll, "reset changes the observation of worlds that are not in its mask"),
    (ResetsNone, "reset changes nothing, though worlds have moved"),
    (DrawsFromAnywhere, "draws from the global random stream: draw from the generator that reset is given"),
    (AsksAnyone, r"reset \(.*test_testing.py, line \d+\) reads back to the host"),
    (Lists, r"reset \(.*test_testing.py, line \d+\) reads back to the host: index.* by a mask"),
    (Counts, "took up the state_dict of another differs from it in reward .* steps later"),
    (SavesItself, r"state_dict\(\)\['x'\] is written to as the task goes on: return copies"),
    (SeedsItself, "obs of step 0 differs between equal seeds"),
]


@pytest.mark.parametrize(("make_task", "message"), NO_TASKS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_faulty_task_is_told_what_is_wrong(make_task: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_task(make_task)
