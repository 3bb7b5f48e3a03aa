"""Rollouts of tasks in torch as one graph are those of steps that are taken one by one."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from toys import build, collector

from pgsuite.algorithms import A2C
from pgsuite.envs.task_env import TaskEnv
from pgsuite.envs.tasks import Acrobot, CartPole, Cruise, MountainCarContinuous, Pendulum, Task, TMaze
from pgsuite.execution.modes import execute
from pgsuite.execution.rollouts import Filled, in_a_row
from pgsuite.functional.trust_region import tensors

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def collecting(task: Task, look: dict[str, Any], how: Any, num_envs: int = 6) -> tuple[Any, Any]:
    task.place(num_envs, torch.device("cpu"), "torch", 1)
    env = TaskEnv(task, device=torch.device("cpu"), dtype=torch.float64, seed=3)
    algorithm = build(A2C, env, look=look)
    made = collector(algorithm, env, horizon=12)
    execute(algorithm, made, how)
    return algorithm, made


def same(one: Any, two: Any) -> bool:
    pairs = list(zip(tensors(one), tensors(two), strict=True))
    return all(torch.allclose(x.double(), y.double(), rtol=1e-9, atol=1e-10) for x, y in pairs)


@dataclass(kw_only=True, eq=False)
class Gusts(Pendulum):
    """Draws in several ways, and keeps tensors that never change and that are written in place."""

    max_episode_steps: Any = 5

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        self.scale = torch.tensor([0.5, 2.0], dtype=self.dtype)
        self.wind, self.age = (torch.zeros(num_envs, dtype=self.dtype) for _ in range(2))

    def initial_state(self, generator: Generator) -> Tensor:
        state = torch.rand((self.num_envs, 2), generator=generator, dtype=self.dtype) * self.scale
        self.wind.copy_(torch.empty_like(self.wind).uniform_(-1, 1, generator=generator))
        return state + torch.randint(2, (self.num_envs, 1), generator=generator)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        self.age += 1
        return super().advance(action + self.wind.unsqueeze(-1) * self.age.unsqueeze(-1) / 100)


@pytest.mark.parametrize(
    ("task", "look"),
    [
        (CartPole(max_episode_steps=7), {}),
        pytest.param(Gusts(), {}, marks=pytest.mark.long),
        pytest.param(Acrobot(max_episode_steps=7), {}, marks=pytest.mark.long),
        pytest.param(MountainCarContinuous(max_episode_steps=7), {"sigma": "state"}, marks=pytest.mark.long),
        pytest.param(TMaze(length=3, max_episode_steps=9), {"recurrent": "gru"}, marks=pytest.mark.long),
        pytest.param(Cruise(max_episode_steps=5), {}, marks=pytest.mark.long),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Task) else "",
)
def test_a_rollout_of_a_task_is_one_graph(task: Task, look: dict[str, Any]) -> None:
    """After the first, no step is called; what is collected, the state in between and the generators are those of the
    collector."""
    (eager, ours), (algorithm, graphed) = (collecting(type(task)(**vars_of(task)), look, how) for how in HOW)
    called = []
    for i in range(3):
        if i == 1:
            graphed.env.step = lambda action: called.append(action)
        wanted, found = ours.collect(eager.policy), graphed.collect(algorithm.policy)
        assert wanted.done.any()
        for name in vars(wanted):
            assert same(getattr(wanted, name), getattr(found, name)), name
        for x, y in zip(ours.env.state_dict().items(), graphed.env.state_dict().items(), strict=True):
            assert same(x[1], y[1]), x[0]
        assert torch.equal(ours.env.generator.get_state(), graphed.env.generator.get_state())
        assert torch.equal(ours.generator.get_state(), graphed.generator.get_state())
        for parameters in (eager.policy.parameters(), algorithm.policy.parameters()):
            with torch.no_grad():
                for x in parameters:
                    x.mul_(0.9)  # in place, as an update does
    assert not called


@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize("name", ["uniform_", "exponential_", "normal_"])
def test_numbers_drawn_at_once_are_those_drawn_one_after_the_other(name: str, size: int) -> None:
    """Or they are not drawn at once, as three normal ones."""
    one = Filled(getattr(Tensor, name), (), {}, torch.empty(size))
    at_once, (first, second) = one.times(6), (Generator().manual_seed(1) for _ in range(2))
    draw = in_a_row(one, at_once, 6, torch.device("cpu"))
    wanted = torch.stack([one(generator=first) for _ in range(6)])
    assert torch.equal(draw(generator=second), wanted) and torch.equal(first.get_state(), second.get_state())
    assert (draw is at_once) == ((name, size) != ("normal_", 3))


HOW = ("eager", "compile")


def vars_of(task: Task) -> dict[str, Any]:
    return {name: getattr(task, name) for name in ("max_episode_steps", "length") if hasattr(task, name)}


class Reads(Pendulum):
    """Decides on the host."""

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        return super().advance(action if bool((action > 0).any()) else -action)


class Depends(Pendulum):
    """Draws numbers whose distribution depends on the state."""

    def initial_state(self, generator: Generator) -> Tensor:
        return torch.normal(self.state, 0.1, generator=generator)


@dataclass(kw_only=True, eq=False)
class Counts(Pendulum):
    """Has a number in its state that is no tensor."""

    steps: int = field(default=0, init=False)

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        self.steps += 1
        return super().advance(action * self.steps)


class Shares(Pendulum):
    """Has attributes that share memory."""

    def place(self, num_envs: int, device: torch.device, backend: str, threads: int) -> None:
        super().place(num_envs, device, backend, threads)
        self.wind, self.age = torch.zeros(2, num_envs, dtype=self.dtype).unbind()


class DrawsGlobally(Pendulum):
    """Draws from torch's own stream, whose numbers a graph would draw in another order."""

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        return super().advance(action + 0 * torch.rand_like(action))


REFUSED = {
    Reads: r"test_compiled_rollouts.py:\d+: torch cannot compile .* a tensor is read back to the host",
    Depends: r"test_compiled_rollouts.py:\d+: torch cannot compile .* normal draws from a distribution that depends on",
    Counts: "a step changes an attribute of Pendulum-v1 that is not a tensor",
    Shares: "attributes of Pendulum-v1 share memory",
    DrawsGlobally: "rand_like.default draws from the global random stream: draw from the generator of reset",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_one_graph_cannot_hold_is_collected_step_by_step(kind: type[Pendulum]) -> None:
    (eager, ours), (algorithm, graphed) = (collecting(kind(max_episode_steps=5), {}, how) for how in HOW)
    for i in range(2):
        with nullcontext() if i else pytest.warns(UserWarning, match=REFUSED[kind]):
            found = graphed.collect(algorithm.policy)
        wanted = ours.collect(eager.policy)
        assert same(wanted.obs, found.obs) and same(wanted.reward, found.reward)


@pytest.mark.long
@pytest.mark.parametrize("gravities", [(10.0, 3.0, 10.0)])
def test_a_number_of_the_task_may_change_between_rollouts(gravities: tuple[float, ...]) -> None:
    """As a curriculum changes it."""
    (eager, ours), (algorithm, graphed) = (collecting(Pendulum(max_episode_steps=5), {}, how) for how in HOW)
    for gravity in gravities:
        ours.env.task.g = graphed.env.task.g = gravity
        assert same(ours.collect(eager.policy).reward, graphed.collect(algorithm.policy).reward)
    assert len(graphed.collect.run.__self__.loops) == 2


@pytest.mark.parametrize("how", ["eager", pytest.param("compile", marks=pytest.mark.long)])
def test_a_collector_resumes_exactly(how: str) -> None:
    """From a state that was saved between rollouts, which later rollouts leave as it is."""
    task = CartPole(max_episode_steps=7)
    algorithm, graphed = collecting(task, {}, how)
    graphed.collect(algorithm.policy)
    saved = graphed.state_dict()
    graphed.collect(algorithm.policy)
    graphed.load_state_dict(copy.deepcopy(saved))
    one = [x.clone() for x in tensors(vars(graphed.collect(algorithm.policy)))]
    graphed.collect(algorithm.policy)
    graphed.load_state_dict(saved)
    two = tensors(vars(graphed.collect(algorithm.policy)))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
