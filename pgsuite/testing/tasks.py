"""Check of the ``Task`` contract, for users' tests."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from gymnasium import spaces
from torch import Generator, Tensor

from pgsuite.envs.base import VectorEnv
from pgsuite.envs.make import make
from pgsuite.envs.tasks.base import Task
from pgsuite.testing.blame import blame, place
from pgsuite.testing.envs import check_vector_env, random_actions
from pgsuite.testing.reads import NothingRead

SPACES = ("observation_space", "action_space")


def check_task(make_task: Callable[[], Task], num_envs: int = 4, steps: int = 200) -> None:
    """Raise AssertionError, naming the fault and its location, unless tasks from ``make_task()`` satisfy the contract
    of ``Task``.  ``make_task`` may be a subclass of ``Task`` itself.

    On the CPU, and on a CUDA device if there is one, ``num_envs`` environments take ``steps`` random steps.  The check
    requires:

    - all members of a task are defined;
    - observations [N, *O] have the shape of their space, lie within it, and share no memory with the state;
    - ``advance`` returns a floating-point reward [N] and a boolean terminated [N];
    - ``reset`` restarts the environments of its mask, and leaves the others bitwise unchanged;
    - random numbers come only from the generator given to ``reset``;
    - nothing is read back to the host, unless the task is ``on_host``;
    - ``state_dict`` returns copies, and another task that loads it continues bit for bit;
    - the tasks, as environments, pass ``check_vector_env``.
    """
    _check_complete(make_task)
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):

        def environments(seed: int, device: str = device) -> VectorEnv:
            return make(make_task(), num_envs, device=device, seed=seed)

        with blame(f"{getattr(make_task, '__name__', 'the task')} on {device}"):
            draws = _check_alone(make_task, num_envs, steps, device)
            check_vector_env(environments, steps, seeded=draws)


def _check_complete(make_task: Callable[[], Task]) -> None:
    """Require all members of a task; one message names all that are missing."""
    cls = make_task if inspect.isclass(make_task) else None
    try:
        made = None if cls and inspect.isabstract(cls) else make_task()
    except TypeError as error:
        raise AssertionError(f"the task cannot be made: {error}") from error
    kind: Any = cls or type(made)
    assert issubclass(kind, Task), f"{kind.__name__} is no Task: derive it from pgsuite.envs.tasks.Task"
    missing = sorted(getattr(kind, "__abstractmethods__", ()))
    if kind.place is Task.place:  # otherwise the spaces may be set there
        missing += [name for name in SPACES if not hasattr(made or kind, name)]
    assert not missing, f"{kind.__name__} lacks {', '.join(missing)}: see Task for what each of them is"


class Play:
    """A task without ``TaskEnv``, with fixed random actions."""

    def __init__(self, make_task: Callable[[], Task], num_envs: int, steps: int, device: str, seed: int = 0) -> None:
        self.task = make_task()
        missing = "{} is missing after place: set it there, or as an attribute of the class"
        try:
            env: Any = make(self.task, num_envs, device=device, seed=seed)
        except AttributeError as error:
            assert error.name not in SPACES, missing.format(error.name)
            raise
        self.actions = [self.bounded(env, x) for x in random_actions(env, steps)]
        self.generator = Generator(self.task.device).manual_seed(seed)
        self.everywhere = torch.ones(num_envs, dtype=torch.bool, device=self.task.device)

    def bounded(self, env: Any, action: Tensor) -> Tensor:
        action = action.to(self.task.device)
        return action if env.bounds is None else action.to(self.task.dtype).clamp(*env.bounds)

    def reset(self, mask: Tensor | None = None) -> None:
        self.task.reset(self.everywhere if mask is None else mask, self.generator)

    def advance(self, t: int) -> Any:
        action = self.actions[t % len(self.actions)].clone()
        self.task.simulate(action)
        return self.task.advance(action)

    def restart(self, terminated: Tensor) -> None:
        """Restart terminated environments, as ``TaskEnv`` does after each step."""
        if not self.task.on_host or bool(terminated.any()):
            self.reset(terminated)


def _check_alone(make_task: Callable[[], Task], num_envs: int, steps: int, device: str) -> bool:
    """Check a task without ``TaskEnv``; returns whether it draws random numbers."""
    _check_reset(Play(make_task, num_envs, steps, device))
    play = Play(make_task, num_envs, steps, device)
    before = play.generator.get_state()
    with _no_other_stream(play.task.device):
        play.reset()
        for t in range(steps):
            play.restart(_check_step(play, t))
    _check_reads(Play(make_task, num_envs, steps, device))
    _check_state(*(Play(make_task, num_envs, steps, device, seed) for seed in (0, 1)))
    return not torch.equal(before, play.generator.get_state())


@contextmanager
def _no_other_stream(device: torch.device) -> Iterator[None]:
    def streams() -> list[Any]:
        cuda = [torch.cuda.get_rng_state(device).tolist()] if device.type == "cuda" else []
        return [torch.get_rng_state().tolist(), random.getstate(), *cuda]

    before = streams()
    yield
    assert before == streams(), (
        "the task draws from the global random stream: draw from the generator that reset is given"
    )


def _check_observation(task: Task, when: str) -> Tensor:
    obs, space = task.observe(), task.observation_space
    assert isinstance(obs, Tensor), f"observe returns {type(obs).__name__} {when}, and not a tensor [N, *O]"
    shape = (task.num_envs, *(space.shape or ()))
    assert obs.shape == shape, f"observe returns shape {tuple(obs.shape)} {when}, and the space says {shape}"
    assert obs.isfinite().all(), f"observe returns what is not finite {when}"
    if isinstance(space, spaces.Box):
        x = obs.float()
        low, high = (torch.as_tensor(bound).float().to(x.device) for bound in (space.low, space.high))
        slack = 1e-5 * (1 + x.abs())
        outside = (x < low - slack) | (x > high + slack)
        assert not outside.any(), (
            f"observe returns {float(x[outside][0]):.6g} {when}, which is outside observation_space: widen it, or clamp"
        )
    assert torch.equal(obs, task.observe()), f"observe returns two things in a row {when}: it must change nothing"
    return obs


def _check_step(play: Play, t: int) -> Tensor:
    """Check one step; returns the environments [N] that it terminates, before they are restarted."""
    task, where = play.task, f"at step {t}"
    before = task.observe()
    kept = before.clone()
    said = play.advance(t)
    assert isinstance(said, tuple) and len(said) == 2, f"advance returns no pair (reward, terminated) {where}"
    reward, terminated = said
    for name, x in (("reward", reward), ("terminated", terminated)):
        assert isinstance(x, Tensor), f"advance returns {name} as {type(x).__name__} {where}, and not as a tensor [N]"
        assert x.shape == (task.num_envs,), (
            f"advance returns {name} of shape {tuple(x.shape)} {where}, and not {(task.num_envs,)}"
        )
    assert reward.is_floating_point(), f"advance returns rewards of {reward.dtype} {where}, and not floats"
    assert reward.isfinite().all(), f"advance returns a reward that is not finite {where}"
    assert terminated.dtype is torch.bool, f"advance returns terminated as {terminated.dtype} {where}, and not bool"
    _check_observation(task, where)
    assert torch.equal(before, kept), f"what observe returned is written to {where}: return a copy, such as x.clone()"
    return terminated


def _rows(task: Task) -> dict[str, Tensor]:
    """Copies of the observation and of the tensors of the state that have a row for each environment, by name."""
    found = {"the observation": task.observe().clone()}

    def walk(name: str, x: Any) -> None:
        if isinstance(x, dict):
            for key, inner in x.items():
                walk(f"{name}[{key!r}]", inner)
        elif isinstance(x, Tensor) and x.ndim and len(x) == task.num_envs:
            found[name] = x.clone()

    walk("state_dict()", task.state_dict())
    return found


def _check_reset(play: Play) -> None:
    """Check reset of no environments, of half of them, and of all, after a few steps."""
    play.reset()
    start = _check_observation(play.task, "after reset").clone()
    for t in range(3):
        _check_step(play, t)
    before = _rows(play.task)
    asked = torch.arange(len(play.everywhere), device=play.task.device) % 2 == 0
    for mask in (~play.everywhere, asked):
        play.reset(mask)
        for name, x in _rows(play.task).items():
            changed = name not in before or not torch.equal(x[~mask], before[name][~mask])
            assert not changed, (
                f"reset changes {name} of worlds that are not in its mask: write where mask [N] is true alone, as with "
                "torch.where"
            )
    if not torch.equal(start, before["the observation"]):
        play.reset()
        same = [name for name, x in _rows(play.task).items() if not torch.equal(x, before[name])]
        assert same, "reset changes nothing, though worlds have moved: start afresh those where mask [N] is true"


def _check_reads(play: Play) -> None:
    mask = play.everywhere.clone()
    play.reset()
    play.restart(play.advance(0)[1])
    try:
        with nullcontext() if play.task.on_host else NothingRead():
            play.task.observe()
            play.advance(1)
            play.reset(mask)
    except AssertionError as error:
        raise AssertionError(
            f"{place(error)} reads back to the host: {error}; stay on the device, with torch.where and fixed shapes, "
            "or have on_host return True"
        ) from error


def _check_state(play: Play, other: Play) -> None:
    """Load the state of a task into a second one with another seed, and require equal steps."""
    steps = min(len(play.actions), 20)
    for one in (play, other):
        one.reset()
    for t in range(7):
        play.restart(play.advance(t)[1])
    state = play.task.state_dict()
    other.task.load_state_dict(play.task.state_dict())
    other.generator.set_state(play.generator.get_state())
    kept = {name: x.clone() for name, x in state.items() if isinstance(x, Tensor)}
    for t in range(steps):
        ends = [one.advance(t) for one in (play, other)]
        for one, (_, terminated) in zip((play, other), ends, strict=True):
            one.restart(terminated)
        mine, others = (
            {"reward": reward, "terminated": terminated, **_rows(one.task)}
            for one, (reward, terminated) in zip((play, other), ends, strict=True)
        )
        differs = [name for name, x in mine.items() if name not in others or not torch.equal(x, others[name])]
        assert not differs, (
            f"a task that took up the state_dict of another differs from it in {differs[0]} {t + 1} steps later: "
            "state_dict must hold everything that the future depends on"
        )
    written = [name for name, x in kept.items() if not torch.equal(x, state[name])]
    assert not written, f"state_dict()[{written[0]!r}] is written to as the task goes on: return copies"
