"""Rollouts of tasks in torch as one graph, which repeats a step of policy and task without Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, Protocol, TypeGuard

import torch
from torch import Generator, Tensor

from pgsuite.envs.task_env import TaskEnv
from pgsuite.envs.tasks import Task
from pgsuite.execution.graph_split import warn_of
from pgsuite.execution.loops import Loop, as_written
from pgsuite.functional.trust_region import map_tensors, tensors
from pgsuite.nn.policy import Policy, PolicyOutput
from pgsuite.rollout import Collector, StepCollector
from pgsuite.seeding import DrawingMode, draw_alike, in_place
from pgsuite.types import Rollout, map_obs

WHAT = "a rollout as a whole, and takes the task's steps as written"
SEEDED = torch.Tag.nondeterministic_seeded  # of an operation that draws random numbers
Draw = Callable[..., Tensor]  # of a keyword: generator


def in_a_row(one: Draw, at_once: Draw, count: int, device: torch.device) -> Draw:
    """What draws ``count`` times as ``one`` does, [count, ...]: ``at_once`` if it gives the same numbers, which few
    normal ones are not."""

    def each(generator: Generator) -> Tensor:
        return torch.stack([one(generator=generator) for _ in range(count)])

    return at_once if draw_alike(each, at_once, device) else each


class Acting(Protocol):
    """Acting with random numbers that are given."""

    def distribution(self, policy: Policy) -> Any:
        """An action distribution, for the shape of its noise; None if it is not reparameterized."""
        ...

    def noise(self, policy: Policy, count: int) -> Tensor:
        """The random numbers of the next ``count`` decisions, [count, ...]."""
        ...

    def decide(self, policy: Policy, noise: Tensor) -> PolicyOutput:
        """The decision for the current observations."""
        ...


def is_one_graph(collector: Collector, env: TaskEnv) -> TypeGuard[StepCollector]:
    """Whether a collector's rollouts can be one graph: those of a task whose whole state is its tensors, on a CPU."""
    kind = type(env.task)
    plain = kind.state_dict is Task.state_dict and kind.load_state_dict is Task.load_state_dict
    plain &= kind.simulate is Task.simulate and type(collector) is StepCollector
    return plain and env.device.type == "cpu" and not env.task.on_host


class Draws(DrawingMode):
    """Within this mode, what is drawn from a generator is noted, or taken from numbers that were drawn before."""

    def __init__(self, given: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.drawn: list[tuple[Draw, Tensor]] = []  # how to draw, and what was drawn
        self.given = None if given is None else iter(given)

    def draw(self, func: Any, generator: Generator, args: Any, kwargs: dict[str, Any]) -> Any:
        target = args[0] if args and isinstance(args[0], Tensor) else None  # as in x.uniform_(generator=...)
        rest = args if target is None else args[1:]
        if tensors([rest, kwargs]) or (target is not None and not in_place(func)):
            raise ValueError(f"{func.__name__} draws from a distribution that depends on the state")
        if self.given is None:
            draw = partial(func, *rest, **kwargs) if target is None else Filled(func, rest, kwargs, target)
            self.drawn.append((draw, draw(generator=generator)))
            found = self.drawn[-1][1]
        else:
            found = next(self.given)
        return found.clone() if target is None else target.copy_(found)


@dataclass
class Filled:
    """Draws as func(x, *args, **options, generator=...) does, which fills x in place."""

    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    options: dict[str, Any]
    like: Tensor

    def __call__(self, generator: Generator) -> Tensor:
        return self.func(torch.empty_like(self.like), *self.args, **self.options, generator=generator)

    def times(self, count: int) -> Filled:
        return replace(self, like=self.like.expand(count, *self.like.shape).contiguous())


class CompiledRollout:
    """``StepCollector.collect`` as one graph per policy: a loop whose body is a step of the policy and of the task.

    Random numbers are drawn outside of the graph, from the same generators and in the same order as by the collector.
    If the loop cannot be made, steps are taken one by one, with a warning.  The graph is compiled anew when a
    number among the task's attributes has changed since the last rollout.
    """

    def __init__(self, collector: StepCollector, env: TaskEnv, acting: Acting) -> None:
        self.collector, self.env, self.acting = collector, env, acting
        self.loops: dict[Any, tuple[Loop, Callable[..., list[Tensor]]]] = {}
        self.impossible = False
        self.live = torch.ones(env.num_envs, dtype=torch.bool)
        self.own: Any = None  # the state, in the memory that the graphs read and write

    @torch.no_grad()
    def __call__(self, policy: Policy) -> Rollout:
        c = self.collector
        if not c.started:
            c.reset(policy)
        key = policy, c.horizon, *self.numbers().items()
        if not self.impossible and key not in self.loops:
            self.compile(policy, key)
        if self.impossible:
            return c._collect(policy)
        loop, draws = self.loops[key]
        began = perf_counter()
        first = map_obs(lambda x: x.unsqueeze(0).clone(), c.hidden_state)
        with self.env.draws:
            drawn = draws(generator=self.env.generator)
        rows = [self.acting.noise(policy, c.horizon), *drawn]
        self.write(self.state())
        found = loop(rows)
        self.put(map_tensors(Tensor.clone, self.own))
        rollout = Rollout(hidden_state=first, **found)
        c.buffer.set(rollout)
        c.seconds["environment"] += perf_counter() - began  # and acting, in one
        return rollout

    def state(self) -> Any:
        """Everything that a step reads and writes, beside the policy."""
        c, env = self.collector, self.env
        task = {name: x for name, x in vars(env.task).items() if isinstance(x, Tensor)}
        return c.obs, c.hidden_state, c.start, env.clock, task

    def put(self, state: Any) -> None:
        """Make these tensors the state."""
        c, env = self.collector, self.env
        c.obs, c.hidden_state, c.start, env.clock, task = state
        vars(env.task).update(task)

    def write(self, state: Any) -> None:
        """Copy a state to own memory."""
        for x, new in zip(tensors(self.own), [x.clone() for x in tensors(state)], strict=True):
            x.copy_(new)

    def numbers(self) -> dict[str, Any]:
        """The attributes of the task that a graph holds as constants."""
        return {name: x for name, x in vars(self.env.task).items() if isinstance(x, bool | int | float | str)}

    def compile(self, policy: Policy, key: Any) -> None:
        c, env, numbers, dist = self.collector, self.env, self.numbers(), self.acting.distribution(policy)
        before, generator = map_tensors(Tensor.clone, self.state()), env.generator.get_state()
        attributes = dict(vars(env.task))
        self.own = self.own or map_tensors(Tensor.clone, before)
        self.impossible = True
        if dist is None:
            return
        homes = [x.untyped_storage().data_ptr() for x in tensors(self.state()[-1]) if x.numel()]
        try:
            if len(set(homes)) < len(homes):
                raise ValueError(f"attributes of {env.name} share memory")
            noise, noted = dist.noise(Generator()), Draws()
            self.step(policy, noise, noted)
            if self.numbers() != numbers:
                raise ValueError(f"a step changes an attribute of {env.name} that is not a tensor")
            rows = [x.expand(c.horizon, *x.shape).contiguous() for x in (noise, *(x for _, x in noted.drawn))]
            loop = Loop(lambda noise, *drawn: self.step(policy, noise, Draws(drawn[:-1])), rows, ())
            if drawing := [x.target for x in loop.graph.graph.nodes if SEEDED in getattr(x.target, "tags", ())]:
                raise ValueError(f"{drawing[0]} draws from the global random stream: draw from the generator of reset")
        except Exception as error:  # of whatever kind the task or a tracer raises
            warn_of(error, WHAT)
            env.step_task.reset()  # which could be no graph for the same reason
            return
        finally:
            vars(env.task).clear()
            vars(env.task).update(attributes)
            self.put(before)
            env.generator.set_state(generator)
        if loop.compiles(WHAT):
            self.loops[key] = loop, self.rows([draw for draw, _ in noted.drawn])
            self.impossible = False

    def rows(self, draws: Sequence[Draw]) -> Callable[..., list[Tensor]]:
        """What makes these draws in every step of a rollout, one step after the other: each [T, ...]."""
        if len(draws) == 1 and isinstance(draws[0], Filled):
            return self.rows_of(draws[0])

        def each(generator: Generator) -> list[Tensor]:
            steps = [[draw(generator=generator) for draw in draws] for _ in range(self.collector.horizon)]
            return [torch.stack(x) for x in zip(*steps, strict=True)]

        return each

    def rows_of(self, draw: Filled) -> Callable[..., list[Tensor]]:
        """The same of a single draw in every step."""
        count = self.collector.horizon
        rows = in_a_row(draw, draw.times(count), count, self.env.device)
        return lambda generator: [rows(generator=generator)]

    def step(self, policy: Policy, noise: Tensor, draws: Draws) -> dict[str, Any]:
        """A step from the state in own memory to that of after it; returns the transition."""
        c, env = self.collector, self.env
        around, env.draws = env.draws, draws
        act, c.act.run = c.act.run, lambda policy: self.acting.decide(policy, noise)
        self.put(self.own)
        try:
            with as_written(env.step_task):
                row = c.transition(policy, self.live).map(Tensor.clone)
        finally:
            env.draws, c.act.run = around, act
        self.write(self.state())
        return {name: x for name, x in vars(row).items() if name != "hidden_state"}
