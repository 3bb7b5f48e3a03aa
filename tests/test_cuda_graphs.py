"""Iterations that are captured and replayed are the iterations that they were captured from.

Without a GPU a tape of operations stands in for CUDA's graphs, and everything around it is the same.
"""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from tape import Tape, failing
from toys import ALL, PointMass, build, collector, mostly_long

from pgsuite import distributed
from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, PPOPenalty, Reinforce
from pgsuite.app import schema
from pgsuite.app.build import build as build_run
from pgsuite.app.build import parse_run_config, to_dict
from pgsuite.app.cli import CONFIGS
from pgsuite.envs import make
from pgsuite.execution.cuda_graphs import PATIENCE, Graphs, TensorState, capture
from pgsuite.rollout import EpisodeCollector
from pgsuite.testing.reads import NothingRead
from pgsuite.training.recovery import Recovery, clone
from pgsuite.training.trainer import Trainer
from pgsuite.transfer import as_on_accelerator

ITERATIONS = 6  # one allocates, two show that they are alike, and the next is recorded
PARTS = 3  # collecting, learning and packing the host data
SHORT: dict[type[Algorithm], dict[str, Any]] = {
    PPO: {"epochs": 2},
    PPOPenalty: {"epochs": 2},
    NPG: {"critic_epochs": 2, "cg_iters": 3},
    TRPO: {"critic_epochs": 2, "cg_iters": 3, "max_backtracks": 3, "backtracking": "batched"},
}
ADAPTIVE = {"adaptive": {"start": 3e-3, "kl": 1e-3}}


def trainer(cls: type[Algorithm], env: Any, record: type[Graphs] | None, **settings: Any) -> Trainer:
    algorithm = build(cls, env, **SHORT.get(cls, {}) | settings)
    rollouts = collector(algorithm, env, horizon=8)
    if isinstance(rollouts, EpisodeCollector):
        rollouts.poll = rollouts.horizon
    made = Trainer(algorithm, rollouts, 1_000)
    if record is not None:
        capture(made, record)
    return made


@pytest.fixture(autouse=True)
def accelerator() -> Iterator[None]:
    with as_on_accelerator():
        yield


def run_alike(runs: list[Trainer]) -> None:
    """One iteration of each, with the same outcome to the last bit."""
    eager, replayed = (run.iterate() for run in runs)
    check(vars(eager), vars(replayed))


def check(x: Any, y: Any) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@contextlib.contextmanager
def replays(least: int) -> Iterator[None]:
    """With at least so many recordings played, and not a warning."""
    before = Tape.replays
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    assert Tape.replays - before >= least


@pytest.mark.parametrize("cls", ALL)
def test_what_is_replayed_is_what_was_written(cls: type[Algorithm]) -> None:
    """For every number that the next iteration depends on, which all stay at their addresses; and what a failure
    handler keeps between iterations reads nothing back either."""
    with replays(PARTS * (ITERATIONS - 4)):
        runs = [trainer(cls, make("CartPole", 8, max_episode_steps=16), record) for record in (None, Tape)]
        run_alike(runs)
        first = addresses(runs[1])
        for _ in range(ITERATIONS - 1):
            run_alike(runs)
        assert addresses(runs[1]) == first
        with NothingRead():
            clone(runs[1].training_state())
    check(*(run.training_state() for run in runs))


def test_graphs_are_told_of_the_generators_that_are_drawn_from() -> None:
    """Each that a graph is told of costs launches at every replay."""
    told: list[set[torch.Generator]] = []

    class Noted(Tape):
        def record(self, work: Any) -> Any:
            told.append(set(self.generators))
            return super().record(work)

    run = trainer(PPO, make("CartPole", 8, max_episode_steps=16), Noted)
    for _ in range(ITERATIONS):
        run.iterate()
    env: Any = run.collector.env
    acting, restarts, minibatches = run.collector.generator, env.generator, run.algorithm.generator
    assert told == [{acting, restarts}, {minibatches}, set()]  # collecting, learning, packing the host data


def addresses(run: Trainer) -> dict[str, int]:
    """Of every tensor that is held between iterations."""
    state = TensorState(run.algorithm, run.collector, run.tracker)
    return {name: x.data_ptr() for *_, x, name in state.held if isinstance(x, torch.Tensor)}


CASES: list[tuple[type[Algorithm], str, dict[str, Any], int]] = [
    (PPO, "Pendulum", {"recurrent": "lstm", "lr": ADAPTIVE, "clip": {"linear": [0.3, 0.1]}}, 0),
    (PPO, "CartPole", {"target_kl": 1e-3, "early_stop": "masked", "epochs": 3, "lr": {"cosine": [1e-2, 0]}}, 0),
    (PPO, "Pendulum", {"epochs": {"piecewise": {0: 3, 0.29: 3, 0.3: 2, 1: 2}}, "look": {"distribution": "beta"}}, 1),
    (A2C, "MountainCarContinuous", {"lr": 1e-2, "look": {"distribution": "squashed"}}, 0),
    (TRPO, "Acrobot", {"recurrent": "gru", "fisher": "gauss-newton"}, 0),
]


@pytest.mark.parametrize(("cls", "task", "settings", "changes"), mostly_long(CASES, *CASES[:3]))
def test_what_is_scheduled_remembered_or_put_back_is_replayed_too(
    cls: type[Algorithm], task: str, settings: dict[str, Any], changes: int
) -> None:
    """A number that the host holds, such as that of epochs, is captured anew when it changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        runs = [trainer(cls, make(task, 8, max_episode_steps=16), record, **settings) for record in (None, Tape)]
        before = Tape.made
        for _ in range(4):
            run_alike(runs)
        kept = [clone(run.training_state()) for run in runs]
        for _ in range(3):
            run_alike(runs)
        for run, position in zip(runs, kept, strict=True):
            run.load_training_state(position, "exact")
            run.algorithm.slow_down()
            run.collector.reseed()
        for _ in range(3):
            run_alike(runs)
    check(*(run.training_state() for run in runs))
    assert Tape.made - before == PARTS + changes


@pytest.mark.parametrize("settings", [{"lr": 1e-2}, {"lr": 1e-3, "recompute_advantage": True, "optim": "rmsprop"}])
def test_a_masked_early_stop_learns_what_an_early_stop_does(settings: dict[str, Any]) -> None:
    """And its optimizer remembers the same, to the last bit."""
    stops = []
    for target in (1e-4, 3e-3, 1.0):
        states = []
        for how in ("read", "masked"):
            env = make("CartPole", 8, max_episode_steps=16)
            algorithm = build(PPO, env, epochs=6, target_kl=target, early_stop=how, **settings)
            metrics = algorithm.iterate(collector(algorithm, env, 8))
            states.append(algorithm.state_dict() | {"generator": None, "epochs": metrics["epochs"]})
        check(*states)
        stops.append(int(metrics["epochs"]))
    assert stops[0] == 1 and 1 < stops[1] < 6 and stops[2] == 6


@pytest.mark.long
def test_physics_on_warp_is_launched_between_graphs() -> None:
    envs = [make("InvertedPendulum", 4, backend="warp", max_episode_steps=6) for _ in range(2)]
    with replays(PARTS * (ITERATIONS - 4)):
        runs = [trainer(PPO, env, record) for env, record in zip(envs, (None, Tape), strict=True)]
        for _ in range(ITERATIONS):
            run_alike(runs)
    check(*(run.training_state() for run in runs))


def test_what_cannot_be_captured_is_named_and_the_rest_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make("CartPole", 8, max_episode_steps=16)
    alone = [
        (PPO, PointMass(8), {}, r"collecting is not captured: toy runs on toy, .*; a Task in torch can be captured"),
        (TRPO, env, {"backtracking": "sequential"}, r"learning is .*: the line search .*; algo.backtracking=batched"),
        (PPO, env, {"target_kl": 0.1}, r"learning is .*: target_kl .*; algo.early_stop=masked reads none"),
    ]
    for cls, world, settings, message in alone:
        with pytest.warns(UserWarning, match=f"^execution=cuda_graph: {message}"):
            run = trainer(cls, world, Tape, **settings)
        before = Tape.replays
        for _ in range(ITERATIONS):
            run.iterate()
        assert Tape.replays - before >= 2 * (ITERATIONS - 4)
    algorithm = build(Reinforce, env)
    with pytest.warns(UserWarning, match=r"collecting is .*: every 10 steps it is asked .*; with poll=16 it is not"):
        capture(Trainer(algorithm, collector(algorithm, env), 1_000), Tape)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.warns(UserWarning, match="packing the host data is not captured: 2 processes meet in it") as told:
        trainer(PPO, env, Tape)
    assert len(told) == PARTS


def test_what_the_host_counts_or_reads_is_found_and_named() -> None:
    env: Any = make("CartPole", 8)
    runs = [trainer(A2C, copy.deepcopy(env), record) for record in (None, Tape)]
    for run in runs:
        task: Any = run.collector.env.task  # pyright: ignore[reportAttributeAccessIssue]
        task.count, advance = 0, task.advance

        def counted(action: torch.Tensor, task: Any = task, advance: Any = advance) -> Any:
            task.count += 1
            return advance(action)

        task.advance = counted
    for i in range(PATIENCE + 2):
        if i == PATIENCE - 1:
            with pytest.warns(UserWarning, match=r"StepCollector.env.task.count, which the host holds, differs"):
                run_alike(runs)
        else:
            run_alike(runs)
    run = trainer(A2C, env, Tape)
    observe = env.task.observe
    env.task.observe = lambda: observe() * float(env.clock[0] < 1_000)
    with pytest.warns(UserWarning, match=r"collecting is not captured: \S*test_cuda_graphs.py:\d+: __float__"):
        for _ in range(ITERATIONS):
            run.iterate()


def test_a_generator_that_no_graph_was_told_of_is_found_and_named() -> None:
    """CUDA refuses its draws in a capture; here it is in a closure, which is not searched."""
    runs = [trainer(A2C, make("CartPole", 8, max_episode_steps=16), record) for record in (None, Tape)]
    for run in runs:
        task: Any = run.collector.env.task  # pyright: ignore[reportAttributeAccessIssue]
        observe, hidden = task.observe, torch.Generator().manual_seed(0)
        task.observe = lambda observe=observe, hidden=hidden: observe().add_(torch.rand((), generator=hidden))
    message = r"collecting is not captured: \S*test_cuda_graphs.py:\d+: rand draws from a generator that was not regist"
    with pytest.warns(UserWarning, match=message):
        for _ in range(ITERATIONS):
            run_alike(runs)
    check(*(run.training_state() for run in runs))


PLACES = ("begin", "end", 30)
FAILURES = [(cls, where) for cls in ALL for where in PLACES]
FAIL = [*zip(ALL, 2 * PLACES, strict=True)]


@pytest.mark.parametrize(("cls", "where"), mostly_long(FAILURES, *FAIL))
def test_a_capture_that_fails_leaves_the_run_as_it_is_without_one(cls: type[Algorithm], where: Any) -> None:
    """To the last bit, generators included; and says where it failed."""
    runs = [trainer(cls, make("CartPole", 8, max_episode_steps=16), record) for record in (None, failing(where))]
    fail_alike(runs, r"pgsuite/\S+.py:\d+: CUDA error" if where == 30 else "CUDA error")


@pytest.mark.parametrize("where", ["launch", pytest.param("end", marks=pytest.mark.long)])
def test_a_capture_that_fails_after_a_launch_on_warp_leaves_the_worlds_as_they_were(where: Any) -> None:
    envs = [make("InvertedPendulum", 4, backend="warp", max_episode_steps=6) for _ in range(2)]
    runs = [trainer(PPO, env, record) for env, record in zip(envs, (None, failing(where)), strict=True)]
    fail_alike(runs, r"pgsuite/envs/physics/mujoco_warp.py:\d+: CUDA error", parts=1 if where == "launch" else PARTS)


def fail_alike(runs: list[Trainer], message: str, parts: int = PARTS) -> None:
    """Eight iterations of each, of which the last but a few would be replayed, if some parts could be captured."""
    made, replayed = Tape.made, Tape.replays
    with pytest.warns(UserWarning) as told:
        for _ in range(ITERATIONS):
            run_alike(runs)
    check(*(run.training_state() for run in runs))
    assert len(told) == parts and Tape.made - made == PARTS
    assert Tape.replays - replayed == (PARTS - parts) * (ITERATIONS - 4)
    assert re.match(f"execution=cuda_graph: collecting is not captured: {message}", str(told[0].message))
    for x, what in zip(told, ["collecting", "learning", "packing the host data"], strict=False):
        assert re.match(rf"execution=cuda_graph: {what} is not captured: (pgsuite/\S+: )?CUDA error", str(x.message))


class Draws:
    """A generator on a GPU that refuses to draw while it counts as being captured, as CUDA's do."""

    device = torch.device("cuda")

    def __init__(self, device: Any = None) -> None:
        self.number, self.graph = 0, None

    def get_state(self) -> int:
        return self.number

    def set_state(self, state: int) -> None:
        self.number = state

    def graphsafe_get_state(self) -> Any:
        return self.number, self.graph

    def graphsafe_set_state(self, state: Any) -> None:
        self.number, self.graph = state

    def draw(self) -> None:
        if self.graph is not None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.number += 1


class Invalidated:
    """A graph whose capture CUDA has invalidated: it cannot be ended, and its generators are not told."""

    def register_generator_state(self, generator: Draws) -> None:
        generator.graph = self

    def capture_begin(self, pool: Any) -> None:
        pass

    def capture_end(self) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("fails", ["the work", "its end"])
def test_after_a_capture_that_fails_generators_draw_on_from_where_they_were(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = contextlib.nullcontext
    for name, fake in {"synchronize": nothing, "Stream": nothing, "stream": nothing, "CUDAGraph": Invalidated}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr("pgsuite.execution.cuda_graphs.Generator", Draws)
    generator: Any = Draws()
    generator.draw()

    def work() -> None:
        generator.number = 99  # what a capture counts is not drawn
        if fails == "the work":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="CUDA error"):
        Graphs([generator], ()).record(work)
    generator.draw()
    assert generator.number == 2


def train(*overrides: str) -> Trainer:
    schema.register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return build_run(parse_run_config(to_dict(compose("train", [*overrides, "device=cuda", "~tuned"]))))


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["CartPole", "HalfCheetah"])
@pytest.mark.parametrize("method", ["ppo", "trpo algo.backtracking=batched", "a2c", "npg"])
def test_on_a_gpu_replays_are_eager_iterations_that_wait_once(task: str, method: str) -> None:
    settings = [f"algo={method.split()[0]}", *method.split()[1:], f"env={task}", "num_envs=64", "horizon=16"]
    eager, captured = train(*settings), train(*settings, "execution=cuda_graph")
    for _ in range(4):
        eager.iterate()
        captured.iterate()
    captured.load_state_dict(clone(eager.state_dict()))
    for _ in range(2):
        written, replayed = eager.iterate().metrics, captured.iterate().metrics
        assert replayed == pytest.approx(written, rel=2e-2, abs=1e-2)
    captured.failure_handler = Recovery(Path(), {}, 0, print)
    captured.failure_handler.on_start(captured)
    for _ in range(4):
        captured.step()
    held = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(100):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                captured.step()
            assert sum("called a synchronizing" in str(x.message) for x in told) <= 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == held
