"""The environments of several runs as one vector environment, each run with its own random stream.

S  runs      N  environments of each
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgsuite import seeding
from pgsuite.envs.base import NotFiniteError, VectorEnv, channels_of
from pgsuite.envs.task_env import TaskEnv
from pgsuite.envs.tasks import Task
from pgsuite.errors import counted
from pgsuite.functional.trust_region import map_tensors, tensors
from pgsuite.many.stack import Generators
from pgsuite.seeding import DrawingMode, in_place
from pgsuite.types import Obs, Step, map_obs


def joined(xs: Sequence[Any]) -> Any:
    """Corresponding tensors of nests, concatenated along their first axis."""
    columns = zip(*map(tensors, xs), strict=True)
    return map_tensors(lambda _: torch.cat(next(columns)), xs[0])


class JointEnv(ABC):
    """S x N environments as a VectorEnv; those of run s are the columns s N to (s + 1) N.

    A run that is not ``running`` neither steps nor draws; what it returns is of no meaning.
    """

    is_resumable = False  # the runs' own environments hold the state

    # Steps between which it is asked which runs' episodes have all ended since the last reset: these run no longer.
    ahead = 1  # steps of the rollout
    poll: int | None = None  # None where episodes continue from one rollout to the next

    def __init__(self, runs: Sequence[VectorEnv]) -> None:
        first = runs[0]
        self.runs, self.count, self.each = list(runs), len(runs), first.num_envs
        self.name, self.backend, self.device = first.name, first.backend, first.device
        self.description = f"{first.description} in each of {counted(self.count, 'run')}"
        self.num_envs, self.max_episode_steps = self.count * self.each, first.max_episode_steps
        self.observation_space, self.action_space = first.observation_space, first.action_space
        self.channels = channels_of(first)
        self.live = [True] * self.count  # runs that go on
        self.running = list(self.live)
        self.errors: dict[int, NotFiniteError] = {}  # by run, of the rollout in progress

    def begin(self) -> None:
        """Begin a rollout."""
        self.errors, self.running = {}, list(self.live)
        self.over, self.steps = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device), 0

    def reset(self) -> Obs:
        """Restart the environments of every run; returns obs [S N, *O]."""
        return joined(self.restart(self.running))

    @abstractmethod
    def restart(self, wanted: Sequence[bool]) -> list[Obs]:
        """Restart the environments of the wanted runs; returns obs [N, *O] of each run."""

    def step(self, action: Tensor) -> Step:
        step = self._step(action)
        self.steps += 1
        if self.poll is not None:
            self.over |= step.done
            if self.steps % self.poll == 0:
                going = (~self.over).view(self.count, -1).any(1).tolist()
                self.running = [run and goes for run, goes in zip(self.running, going, strict=True)]
        return step

    def settle(self) -> None:
        """End a rollout: bring random generators to where they would be without drawing ``ahead``."""

    @abstractmethod
    def _step(self, action: Tensor) -> Step: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SideBySide(JointEnv):
    """Vector environments of any kind, stepped one after the other."""

    def restart(self, wanted: Sequence[bool]) -> list[Obs]:
        found = [env.reset() if want else None for env, want in zip(self.runs, wanted, strict=True)]
        like = next(obs for obs in found if obs is not None)
        return [map_obs(torch.zeros_like, like) if obs is None else obs for obs in found]

    def _step(self, action: Tensor) -> Step:
        found: list[Step | None] = []
        for s, (env, mine) in enumerate(zip(self.runs, action.split(self.each), strict=True)):
            try:
                found.append(env.step(mine) if self.running[s] else None)
            except NotFiniteError as error:
                found.append(None)
                self.errors[s], self.running[s] = error, False
        like = next((step for step in found if step is not None), None)
        if like is None:
            raise next(iter(self.errors.values()))
        blank = map_tensors(torch.zeros_like, like)
        return joined([blank if step is None else step for step in found])


class RowDraws(DrawingMode):
    """Within this mode, each run draws its rows of what is drawn from ``Generators`` [S N, ...] by its own generator,
    as it would alone; those that are not ``drawing`` draw nothing."""

    kind = Generators

    def __init__(self, count: int, each: int) -> None:
        super().__init__()
        self.count, self.each = count, each

    def draw(self, func: Any, generators: Generators, args: Any, kwargs: dict[str, Any]) -> Any:
        if any(len(x) != self.count * self.each for x in tensors([args, kwargs])):
            raise ValueError(f"{func.__name__} draws numbers that are not of single worlds")
        if args and isinstance(args[0], Tensor) and in_place(func):
            generators.fill(args[0].unflatten(0, (self.count, self.each)), func, *args[1:], **kwargs)
            return args[0]
        streams = list(zip(generators.each, generators.drawing, strict=True))

        given: dict[Any, Any] = dict(enumerate(args)) | kwargs
        sized = next((key for key, x in given.items() if isinstance(x, tuple | list)), None)  # as in rand((8, 2))
        if sized is None and not tensors([args, kwargs]):
            sized = 0  # as in rand(8, 2)
        size = given.get(sized)
        if size is not None and (size[0] if isinstance(size, tuple | list) else size) != self.count * self.each:
            raise ValueError(f"{func.__name__} draws numbers that are not of single worlds")

        def share(key: Any, x: Any, s: int) -> Any:
            if isinstance(x, Tensor):
                return x[s * self.each : (s + 1) * self.each]
            if key != sized:
                return x
            return (self.each, *x[1:]) if isinstance(x, tuple | list) else self.each

        def own(s: int, generator: torch.Generator) -> Any:
            mine = [share(i, x, s) for i, x in enumerate(args)]
            return func(*mine, **{key: share(key, x, s) for key, x in kwargs.items()} | {"generator": generator})

        drawn = [own(s, generator) if draws else None for s, (generator, draws) in enumerate(streams)]
        like = next(x for x in drawn if x is not None)
        return torch.cat([torch.zeros_like(like) if x is None else x for x in drawn])


class JointTaskEnv(TaskEnv):
    """A task with the worlds of all runs, of which each run's start anew by its own generator."""

    generator: Generators

    def __init__(self, task: Task, seeds: Sequence[int], **options: Any) -> None:
        super().__init__(task, **options)
        self.generator = Generators.of([seeding.generator(seed, "environment", task.device) for seed in seeds])
        self.draws = RowDraws(len(seeds), self.num_envs // len(seeds))
        self.running = [True] * len(seeds)

    def restart(self, mask: Tensor) -> None:
        drawing = self.running
        if self.task.on_host:
            ends = mask.view(len(drawing), -1).any(1).tolist()
            drawing = [run and end for run, end in zip(drawing, ends, strict=True)]
        if any(drawing):
            self.generator.drawing = drawing
            super().restart(mask)


class SharedTask(JointEnv):
    """One task with the worlds of all runs, stepped as one."""

    def __init__(self, whole: JointTaskEnv) -> None:
        self.whole = whole
        count = len(whole.running)
        super().__init__([Share(whole, s, whole.num_envs // count) for s in range(count)])

    def restart(self, wanted: Sequence[bool]) -> list[Obs]:
        whole = self.whole
        mask = torch.tensor(wanted, device=whole.clock.device).repeat_interleave(self.each)
        whole.running = list(wanted)
        return list(whole.reset_where(mask).split(self.each))

    def settle(self) -> None:
        self.whole.generator.settle()

    def _step(self, action: Tensor) -> Step:
        self.whole.generator.ahead = 1 if self.whole.task.on_host else self.ahead
        self.whole.running = self.running
        if not all(self.live):  # whose policies may be anything
            live = torch.tensor(self.live, device=action.device).repeat_interleave(self.each)
            action = action.where(live.view(-1, *[1] * (action.ndim - 1)), 0)
        return self.whole.step(action)


class Share:
    """The environments of one run within a ``SharedTask``: what they are, and their state."""

    is_resumable = True

    def __init__(self, whole: JointTaskEnv, index: int, each: int) -> None:
        self.whole, self.index, self.num_envs = whole, index, each
        self.name, self.backend, self.device, self.dtype = whole.name, whole.backend, whole.device, whole.dtype
        self.max_episode_steps = whole.max_episode_steps
        self.observation_space, self.action_space = whole.observation_space, whole.action_space
        self.channels = whole.channels
        self.description = whole.description.replace(
            counted(whole.num_envs, "environment"), counted(each, "environment")
        )
        self.generator = whole.generator.each[index]

    def mine(self, x: Tensor) -> Tensor:
        """This run's worlds of a tensor [S N, ...]; all of one that has no worlds."""
        if x.ndim == 0 or len(x) != self.whole.num_envs:
            return x
        return x[self.index * self.num_envs : (self.index + 1) * self.num_envs]

    def reset(self) -> Obs:
        raise NotImplementedError("the environments of all runs restart together")

    def step(self, action: Tensor) -> Step:
        raise NotImplementedError("the environments of all runs step together")

    def state_dict(self) -> dict[str, Any]:
        state = map_tensors(lambda x: self.mine(x).clone(), self.whole.task.state_dict())
        return {"task": state, "clock": self.mine(self.whole.clock).clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        task = self.whole.task.state_dict()
        for x, new in zip(tensors(task), tensors(state["task"]), strict=True):
            self.mine(x).copy_(new)
        self.whole.task.load_state_dict(task)
        self.mine(self.whole.clock).copy_(state["clock"])
        self.generator.set_state(state["generator"])
