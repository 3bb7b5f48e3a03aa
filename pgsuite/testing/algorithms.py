"""Check of the ``Algorithm`` contract, for users' tests."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from types import MethodType
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from pgsuite import seeding
from pgsuite import settings as types
from pgsuite.algorithms import Algorithm
from pgsuite.envs.make import make
from pgsuite.kernel import Kernel
from pgsuite.nn.action_critic import ActionCritic
from pgsuite.nn.normalize import RewardScale, RunningMoments, Standardize
from pgsuite.nn.optim import Optimizer
from pgsuite.nn.policy import Critic, Policy
from pgsuite.nn.schedules import Scheduled
from pgsuite.rollout import Collector, EpisodeCollector
from pgsuite.testing.blame import blame, place
from pgsuite.testing.reads import NothingRead
from pgsuite.testing.worlds import Point
from pgsuite.transfer import as_on_accelerator
from pgsuite.types import Batch, Metrics, Rollout

ENVS, LIMIT, HORIZON = 16, 12, 16  # episodes extend over rollout boundaries


class World(NamedTuple):
    """Variant of the task and of the networks on which a method is checked."""

    actions: Literal["continuous", "discrete"]
    recurrent: Literal["none", "gru"] = "none"

    def __str__(self) -> str:
        return f"{self.actions} actions" + (" and a memory" if self.recurrent != "none" else "")


WORLDS = (World("continuous"), World("discrete"), World("continuous", "gru"))


class Run:
    """A new instance of a method with networks and environments, all from one seed."""

    def __init__(
        self,
        cls: type[Algorithm],
        world: World,
        settings: Mapping[str, Any],
        *,
        seed: int = 0,
        envs: int = ENVS,
        hidden: int = 16,
    ) -> None:
        env = make(Point(max_episode_steps=LIMIT, actions=world.actions), envs, seed=seed)
        generator = seeding.generator(seed, "algorithm")
        norm = Standardize(env.observation_space)
        shape: Any = {"hidden": (hidden,), "recurrent": world.recurrent, "recurrent_size": 16, "generator": generator}
        critic = partial(ActionCritic, action_space=env.action_space) if cls.action_values else Critic
        parts: dict[str, Any] = {
            "policy": Policy(norm, env.action_space, **shape),
            "critic": critic(norm, num_envs=envs, **shape),
            "reward_scale": RewardScale(envs),
            "generator": generator,
        }
        known = {f.name for f in fields(cls)}
        try:
            self.algorithm: Any = cls(**{k: x for k, x in parts.items() if k in known} | _copied(settings))
            horizon = LIMIT if cls.collector.whole_episodes else HORIZON
            self.collector: Collector = self.algorithm.make_collector(env, horizon, seed)
            self.algorithm.validate(self.collector)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"{cls.__name__} cannot be made for {world}: {error}") from error
        if isinstance(self.collector, EpisodeCollector):
            self.collector.poll = self.collector.horizon  # steps between its reads from the device

    def iterate(self) -> Metrics:
        return self.algorithm.iterate(self.collector)

    def state(self) -> dict[str, Any]:
        """A copy of the state on which the next iteration depends."""
        return copy.deepcopy({"algorithm": self.algorithm.state_dict(), "collector": self.collector.state_dict()})

    def load(self, state: dict[str, Any]) -> None:
        self.algorithm.load_state_dict(copy.deepcopy(state["algorithm"]))
        self.collector.load_state_dict(copy.deepcopy(state["collector"]))

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters of all parts of the method, by name."""
        return {name: x.detach().clone() for name, x in _tensors(self.algorithm, buffers=False).items()}


def check_algorithm(cls: type[Algorithm], *, learns: bool = True, **settings: Any) -> None:
    """Raise AssertionError, naming the fault and its location, unless a method satisfies the contract of ``Algorithm``.

    ``settings`` are constructor arguments of the method.  It is run on a small task with continuous actions, with
    discrete actions unless its critic is of actions, and with recurrent networks.  In each of these the check requires:

    - every update begins with an importance ratio of 1 and with the running statistics of the rollout, which move
      after the update;
    - parameters and buffers are written in place;
    - every iteration returns the same metrics: finite, zero-dimensional and detached;
    - nothing is read back to the host, unless ``host_sync_reason`` gives a reason;
    - random numbers come only from ``self.generator``, so that a seed determines a run bit for bit;
    - ``state_dict`` covers all parts, so that a new instance continues bit for bit from a saved state;
    - the policy is trained, and each critic is trained or has an optimizer.

    With feed-forward networks, results may not depend on the contents of masked cells; every number of the method may
    be given as a schedule; and, unless ``learns`` is false, sixty iterations must clearly raise the mean return.
    """
    for world in WORLDS:
        if cls.action_values and world.actions == "discrete":  # refused by its critic
            continue
        # Recurrent layers round otherwise on a CPU, where they may read.
        with blame(f"{cls.__name__} with {world}"), as_on_accelerator():
            _check_iterations(cls, world, settings)
            if world.recurrent == "none":
                _check_masks(cls, world, settings)
    with blame(f"{cls.__name__} with {WORLDS[0]}"):
        _check_schedules(cls, WORLDS[0], settings)
        if learns:
            _check_learning(cls, WORLDS[0], settings)


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Deep copies, so that instances share no objects, such as estimators."""
    return copy.deepcopy(dict(settings))


def _tensors(algorithm: Algorithm, *, buffers: bool = True) -> dict[str, Tensor]:
    """Parameters, and with ``buffers`` also buffers, of all parts by name; shared tensors appear once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for part, module in algorithm.parts.items():
        inside = [*module.named_parameters(), *(module.named_buffers() if buffers else ())]
        for name, x in inside:
            found.setdefault(id(x), (f"{part}.{name}", x))
    return dict(found.values())


def _statistics(algorithm: Algorithm, *, rewards: bool = False) -> dict[str, Tensor]:
    """Running statistics of observations, and with ``rewards`` also those of rewards, which move before an update."""
    return {
        f"{part}.{name}.{key}": x
        for part, owner in algorithm.parts.items()
        for name, module in owner.named_modules()
        if isinstance(module, RunningMoments) and (rewards or not isinstance(owner, RewardScale))
        if all(p.requires_grad for p in owner.parameters())  # those of a frozen policy do not move
        for key, x in module.named_buffers()
    }


# Iterations, seeds and resume


def _check_iterations(cls: type[Algorithm], world: World, settings: Mapping[str, Any]) -> None:
    run = Run(cls, world, settings)
    algorithm = run.algorithm
    _check_parts(algorithm)
    before, addresses = run.parameters(), {name: x.data_ptr() for name, x in _tensors(algorithm).items()}
    torch.manual_seed(1)
    first = _watched(run)
    _check_addresses(algorithm, addresses)
    _watched(run, first)
    _check_addresses(algorithm, addresses)
    assert algorithm.finite(), "parameters or statistics are not finite after two iterations"
    _check_trained(run, before)
    half = run.state()
    _check_seed(cls, world, settings, half)
    _check_reads(run, first)
    run.iterate()
    _check_resumed(cls, world, settings, half, run.state())


def _check_parts(algorithm: Algorithm) -> None:
    """Require that ``held`` contains every module and optimizer, so that ``state_dict`` saves it."""
    held = algorithm.held
    known = {id(x) for x in (*held.values(), *_tensors(algorithm).values())}
    for name, x in held.items():
        saves_itself = hasattr(x, "state_dict") and not isinstance(x, Scheduled)  # whose state is its schedules only
        if saves_itself or isinstance(x, Kernel | MethodType):
            continue
        for key, inner in _inside(x):
            tensors = (*inner.parameters(), *inner.buffers()) if isinstance(inner, nn.Module) else ()
            is_optimizer = isinstance(inner, Optimizer | torch.optim.Optimizer) and id(inner) not in known
            assert not is_optimizer and all(id(y) in known for y in tensors), (
                f"self.{name}.{key} is not saved with the method: hold it as an attribute of the method itself, or in "
                "a list, tuple or dictionary that is one"
            )


def _inside(x: Any) -> list[tuple[str, Any]]:
    """Attributes of an object, and the elements of those that are lists or dictionaries, by name."""
    found: list[tuple[str, Any]] = []
    for name, value in getattr(x, "__dict__", {}).items():
        inner = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
        )
        found += [(name, value), *((f"{name}.{key}", y) for key, y in inner if name != "schedules")]
    return found


def _watched(run: Run, names: Metrics | None = None) -> Metrics:
    """Metrics of an iteration; requires an importance ratio of 1 at its first update, and no use of the global random
    streams."""
    algorithm, seen = run.algorithm, _Watcher(run.algorithm)
    streams = torch.get_rng_state(), random.getstate()
    with seen:
        metrics = run.iterate()
    assert torch.equal(streams[0], torch.get_rng_state()) and streams[1] == random.getstate(), (
        "an iteration draws from the global random stream: give self.generator to whatever draws"
    )
    seen.check()
    still = [name for name, x in _statistics(algorithm).items() if torch.equal(x, seen.statistics[name])]
    assert not still, f"the statistics {still[0]} do not move in an iteration: update_statistics must call super()"
    _check_metrics(metrics, metrics if names is None else names)
    return metrics


class _Watcher:
    """Records importance ratios and running statistics at the start of the first update of an iteration."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.statistics = {name: x.clone() for name, x in _statistics(algorithm).items()}
        self.ratio = 1.0  # the importance ratio farthest from one
        self.moved: str | None = None

    def __enter__(self) -> None:
        for name in ("learn", "update"):
            setattr(self.algorithm, name, self.around(getattr(self.algorithm, name)))

    def __exit__(self, *error: object) -> None:
        for name in ("learn", "update"):
            delattr(self.algorithm, name)

    def around(self, function: Callable[..., Metrics]) -> Callable[..., Metrics]:
        called = False

        def inside(seen: Any, *args: Any, **kwargs: Any) -> Metrics:
            nonlocal called
            if not called and isinstance(seen, Rollout | Batch):
                self.look(seen)
            called = True
            return function(seen, *args, **kwargs)

        return inside

    @torch.no_grad()
    def look(self, seen: Rollout | Batch) -> None:
        logp = self.algorithm.policy.dist(seen).log_prob(seen.action)
        ratios = (logp - seen.logp).exp().where(seen.mask, 1.0).flatten()
        ratio = float(ratios[(ratios - 1).abs().argmax()])
        self.ratio = max(self.ratio, ratio, key=lambda x: abs(x - 1))
        now = _statistics(self.algorithm)
        self.moved = self.moved or next((name for name, x in self.statistics.items() if not x.equal(now[name])), None)

    def check(self) -> None:
        assert self.moved is None, (
            f"the statistics {self.moved} move before the update, so that the policy that learns is not the one that "
            "acted: move them in update_statistics, which comes last"
        )
        assert abs(self.ratio - 1) < 1e-4, (
            f"the first update of an iteration begins with an importance ratio of {self.ratio:.6g}, and not 1: logp "
            "must be that of the policy that acted, and this policy must not move before update"
        )


def _check_metrics(metrics: Any, names: Metrics) -> None:
    assert isinstance(metrics, dict), f"iterate returns {type(metrics).__name__}, and not a dictionary of metrics"
    for name, x in metrics.items():
        assert isinstance(x, Tensor), f"the metric {name!r} is {type(x).__name__}, and not a zero-dimensional tensor"
        assert x.ndim == 0, f"the metric {name!r} has shape {tuple(x.shape)}: take its mean, for metrics have none"
        assert not x.requires_grad, f"the metric {name!r} keeps the graph of its gradient alive: detach it"
        assert bool(x.isfinite()), f"the metric {name!r} is {x.item()}, which is not finite"
    changed = sorted(metrics.keys() ^ names.keys())
    assert not changed, f"the metric {changed[0]!r} is not there in every iteration: give the same names each time"


def _check_addresses(algorithm: Algorithm, addresses: Mapping[str, int]) -> None:
    now = _tensors(algorithm)
    for name, address in addresses.items():
        assert name in now and now[name].data_ptr() == address, (
            f"{name} is another tensor after an iteration: write it in place, with copy_ or an Optimizer"
        )


def _check_trained(run: Run, before: Mapping[str, Tensor]) -> None:
    algorithm, now = run.algorithm, run.parameters()
    still = {id(x) for name, x in _tensors(algorithm, buffers=False).items() if torch.equal(before[name], now[name])}
    owned = {id(p) for optimizer in algorithm.optimizers for p in optimizer.params}

    def lies_still(module: nn.Module) -> bool:
        trainable = {id(p) for p in module.parameters() if p.requires_grad}
        return bool(trainable) and trainable <= still

    assert not lies_still(algorithm.policy), "two iterations do not move the policy at all"
    for critic in algorithm.critics:
        name = next(name for name, part in algorithm.parts.items() if critic in part.modules())
        trained = not lies_still(critic.own) or any(id(p) in owned for p in critic.own.parameters())
        assert trained, f"{name} neither moves nor has an optimizer: train it, or set it to None if it is not needed"


def _check_seed(cls: type[Algorithm], world: World, settings: Mapping[str, Any], state: dict[str, Any]) -> None:
    torch.manual_seed(2)
    random.seed(2)
    twin = Run(cls, world, settings)
    for _ in range(2):
        twin.iterate()
    if name := _difference(state, twin.state()):
        raise AssertionError(
            f"two runs of one seed differ in {name} after two iterations: whatever draws must draw from self.generator"
        )


def _check_reads(run: Run, names: Metrics) -> None:
    """Require that an iteration reads nothing back to the host, unless ``host_sync_reason`` gives a reason."""
    if run.algorithm.host_sync_reason is not None:
        return
    with _guarded(NothingRead() if run.collector.host_sync_reason is None else nullcontext()):
        run.algorithm.update_schedules(0.5)
        metrics = run.iterate()
    _check_metrics(metrics, names)


@contextmanager
def _guarded(guard: Any) -> Iterator[None]:
    try:
        with guard:
            yield
    except AssertionError as error:
        raise AssertionError(
            f"an iteration reads back to the host in {place(error)}: {error}; stay on the device, or say in "
            "host_sync_reason what is read and why"
        ) from error


def _check_resumed(
    cls: type[Algorithm], world: World, settings: Mapping[str, Any], half: dict[str, Any], end: dict[str, Any]
) -> None:
    """Load a saved state into a new instance with another seed, and require the final state of the first run."""
    twin = Run(cls, world, settings, seed=7)
    twin.load(half)
    if twin.algorithm.host_sync_reason is None:
        twin.algorithm.update_schedules(0.5)
        twin.iterate()
    twin.iterate()
    if name := _difference(end, twin.state()):
        raise AssertionError(
            f"a fresh instance that took up a saved state goes on otherwise, in {name}: something that the future "
            "depends on is not in state_dict; hold it as a part that has one, or as a buffer of one"
        )


def _difference(x: Any, y: Any, name: str = "") -> str | None:
    """Name of the first difference between two states; None if they are bitwise equal."""
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        if x.keys() != y.keys():
            return f"{name}.{min(map(str, x.keys() ^ y.keys()))}".strip(".")
        return next(filter(None, (_difference(x[key], y[key], f"{name}.{key}".strip(".")) for key in x)), None)
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return _difference(dict(enumerate(x)), dict(enumerate(y)), name)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return None if torch.equal(x, y) else name
    return None if x == y else name


# Masks, schedules and learning


def _check_masks(cls: type[Algorithm], world: World, settings: Mapping[str, Any]) -> None:
    """Require equal results of two runs whose rollouts differ only in masked cells."""
    ends: list[tuple[dict[str, Tensor], Metrics]] = []
    for junk in (0.5, -7.0):
        run = Run(cls, world, settings)
        run.iterate()
        update = run.algorithm.update

        def spoiled(batch: Any, *args: Any, junk: float = junk, update: Any = update, **kwargs: Any) -> Metrics:
            return update(_spoil(batch, junk) if isinstance(batch, Batch) else batch, *args, **kwargs)

        run.algorithm.update = spoiled
        metrics = run.algorithm.training_step(_cut(run.collector.collect(run.algorithm.policy), junk))
        del run.algorithm.update
        ends.append(({**run.parameters(), **_statistics(run.algorithm, rewards=True)}, metrics))
    (one, metrics), (two, others) = ends
    for what, x, y in (("", one, two), ("the metric ", metrics, others)):
        if name := _difference(x, y):
            raise AssertionError(
                f"what masked cells hold changes {what}{name}: take means by masked_mean(x, batch.mask), and give "
                "batches that Batch.of made"
            )


def _cut(rollout: Rollout, junk: float) -> Rollout:
    """The rollout with the last steps of each environment masked, after the end of an episode, and filled with
    ``junk``."""
    steps, envs = rollout.mask.shape
    last = steps - 2 - torch.arange(envs, device=rollout.mask.device) % (steps // 2)
    time = torch.arange(steps, device=last.device).unsqueeze(-1)
    mask, ends = rollout.mask & (time <= last), time == last
    generator = torch.Generator().manual_seed(int(abs(junk) * 10))

    def spoil(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator).to(x)
        return torch.where(mask.view(*mask.shape, *[1] * (x.ndim - 2)), x, junk * noise)

    action = rollout.action
    if not action.is_floating_point():
        action = torch.where(mask, action, (action.flip(0) + int(junk > 0)) % 5)
    return replace(
        rollout,
        obs=spoil(rollout.obs),
        next_obs=spoil(rollout.next_obs),
        action=spoil(action) if action.is_floating_point() else action,
        reward=spoil(rollout.reward),
        channels={name: spoil(x) for name, x in rollout.channels.items()},
        logp=spoil(rollout.logp),
        terminated=(rollout.terminated & mask) | ends,
        truncated=rollout.truncated & mask & ~ends,
        mask=mask,
    )


def _spoil(batch: Batch, junk: float) -> Batch:
    spoiled = {name: getattr(batch, name).where(batch.mask, junk) for name in ("advantage", "target", "value")}
    channels = {name: x.where(batch.mask, junk) for name, x in batch.channels.items()}
    return replace(batch, **spoiled, channels=channels)


def _check_schedules(cls: type[Algorithm], world: World, settings: Mapping[str, Any]) -> None:
    """Require that a constant schedule of each number gives the results of the number."""
    hints = get_type_hints(cls, include_extras=True)
    numbers = {f.name: settings.get(f.name, f.default) for f in fields(cls) if f.init and types.number(hints[f.name])}
    constant = {name: {"constant": x} for name, x in numbers.items() if isinstance(x, int | float)}
    plain = _after_two(cls, world, settings)[0]
    try:
        scheduled, metrics = _after_two(cls, world, {**settings, **constant})
    except Exception:
        for name, schedule in constant.items():
            _check_schedule(cls, world, {**settings, name: schedule}, name)
        raise
    for name, x in plain.items():
        assert torch.allclose(x, scheduled[name], atol=1e-4), (
            f"{name} is another one if {', '.join(constant)} are given as constant schedules"
        )
    for name in constant:
        assert name in metrics, f"the schedule of {name} is not in the metrics: adapt must call super()"


def _check_schedule(cls: type[Algorithm], world: World, settings: Mapping[str, Any], name: str) -> None:
    try:
        _after_two(cls, world, settings)
    except Exception as error:
        raise AssertionError(
            f"{name} is a zero-dimensional tensor if it is given as a schedule, and {place(error)} cannot use one: "
            f"{error}"
        ) from error


def _after_two(cls: type[Algorithm], world: World, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], Metrics]:
    run = Run(cls, world, settings)
    run.iterate()
    reads = (run.algorithm.host_sync_reason, run.collector.host_sync_reason) != (None, None)
    with nullcontext() if reads else NothingRead():
        run.algorithm.update_schedules(0.3)
        metrics = run.iterate()
    return run.parameters(), metrics


def _check_learning(cls: type[Algorithm], world: World, settings: Mapping[str, Any]) -> None:
    """Require a mean return over five iterations 3 above that of the first three; the optimum is about 11."""
    run = Run(cls, world, settings, envs=32, hidden=64)
    returns: list[float] = []
    for i in range(60):
        run.algorithm.update_schedules(i / 60)
        run.iterate()
        rollout = run.collector.buffer.read()
        returns.append(float(rollout.reward.where(rollout.mask, 0.0).sum(0).mean()) * LIMIT / len(rollout.mask))
        if i >= 8 and sum(returns[-5:]) / 5 > sum(returns[:3]) / 3 + 3:
            return
    first, last = sum(returns[:3]) / 3, sum(returns[-5:]) / 5
    raise AssertionError(
        f"the mean return goes from {first:.2f} to {last:.2f} in 60 iterations, and not up by 3: it does not learn; "
        "give settings with which it does, or learns=False"
    )
