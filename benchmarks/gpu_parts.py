"""The parts of benchmarks/gpu.py.  Each is a generator of results, most telling first, for a job, a device and as many
seconds as it may take."""

from __future__ import annotations

import gc
import importlib
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from gpu_job import Line, Unavailable, guarded
from gymnasium import spaces
from hydra import compose, initialize_config_dir
from parity import compare
from record import ROOT, source
from torch import Tensor

from pgsuite.app import schema
from pgsuite.app.build import build, parse_run_config, to_dict
from pgsuite.app.cli import CONFIGS
from pgsuite.envs import make
from pgsuite.execution.cuda_graphs import STEADY, Graphs, capture
from pgsuite.rollout import EpisodeCollector
from pgsuite.training import checkpoint
from pgsuite.training.recovery import Recovery, clone
from pgsuite.training.trainer import Trainer

CAPTURED = STEADY + 3  # iterations after which a captured run is replayed
TASKS = {"cuda": ("CartPole", "HalfCheetah"), "cpu": ("CartPole",)}  # of methods; HalfCheetah on Warp
PPO = {  # workloads of speeds
    "CartPole": "algo.epochs=1 horizon=64 policy.hidden=[128] critic.hidden=[128]",  # and minibatches of 32,768
    "MuJoCo": "algo.epochs=5 horizon=32 algo.minibatches=4",
}
PEER = (  # the workload of jax_peer.py
    "algo=ppo env=CartPole horizon=128 algo.epochs=4 algo.minibatches=4 algo.entropy_coef=0.01 algo.value_clip=0.2 "
    "standardize_obs=false scale_reward=false"
)
# Chosen on a CPU, where one seed of two million steps reached the target.
TARGET = (
    "algo=ppo env=HalfCheetah tuned=ppo-HalfCheetah num_envs=1024 horizon=16 algo.epochs=8 algo.minibatches=16 "
    "total_steps=8_000_000 algo.lr={linear:[8e-4,0]}"
)
RETURN, EPISODES = 5_000, 100


def versions(job: str, device: str, seconds: float) -> Iterator[Line]:
    """What is measured, and on what."""
    yield {key: x for key, x in source().items() if key != "command"}
    if (smi := shutil.which("nvidia-smi")) is None:
        yield {"nvidia-smi": "not installed"}
    else:
        asked = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"
        run = subprocess.run([smi, asked, "--format=csv,noheader"], capture_output=True, text=True, check=False)
        yield {"nvidia-smi": (run.stdout or run.stderr).strip()}
    if device == "cuda":
        require(device)
        card = torch.cuda.get_device_properties(0)
        facts = {"card": card.name, "memory": card.total_memory, "capability": f"{card.major}.{card.minor}"}
        yield facts | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def warp(task: str, device: str, seconds: float) -> Iterator[Line]:
    """The seconds that Warp takes to compile a model, and one step of it beside MuJoCo's in double precision."""
    require(device, "mujoco_warp")
    began = perf_counter()
    env: Any = make(task, 1024 if device == "cuda" else 8, device=device, backend="warp")
    env.reset()
    env.step(some_actions(env))
    synchronize(device)
    yield {"compile seconds": perf_counter() - began}
    found = compare(task, "warp", device)
    rounds = found["claim"] == "rounds"  # where a robot can lie, Warp only approximates MuJoCo
    close = found["observation"]["99%"] < 1e-3 and found["reward"]["99%"] < 1e-3
    close = close and found["terminations that differ"] <= found["steps"] / 1_000
    yield {"check": "one step is MuJoCo's", "holds": close if rounds else None} | found


def methods(method: str, device: str, seconds: float) -> Iterator[Line]:
    for task in TASKS[device]:
        yield from guarded(checks(method, task, device), env=task)


def checks(method: str, task: str, device: str) -> Iterator[Line]:
    """Is a method the same when it is replayed, does it wait once, does its memory stay, does it outlive a failure?"""
    settings = f"algo={method} env={task} num_envs={64 if device == 'cuda' else 8} horizon=16 env.max_episode_steps=12"
    settings += {"ppo": " algo.epochs=2", "trpo": " algo.backtracking=batched"}.get(method, "")
    require(device)
    if task != "CartPole":
        require(device, "mujoco_warp")
        settings += " backend=warp"
    kind = tape_or_graphs(device)
    with uncaptured() as left:
        eager, replayed = trainer(settings, device), trainer(settings, device, kind)
        for _ in range(CAPTURED):
            eager.iterate()
            replayed.iterate()
    left += not_replayed(replayed)
    yield {"check": "everything is captured", "holds": not left, "left eager": left}
    yield {"check": "replay equals eager"} | alike(eager, replayed, device)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        checkpoint.save(eager.state_dict(), path)
        resumed = trainer(settings, device)
        resumed.load_state_dict(checkpoint.load(path))
        yield {"check": "resumed equals uninterrupted"} | alike(eager, resumed, device, copied=True)

    with uncaptured() as left:
        fallen = trainer(settings, device, failing(kind, device))
        for _ in range(CAPTURED):
            fallen.iterate()
    found = alike(eager, fallen, device)
    yield {"check": "a capture that fails falls back", "holds": found.pop("holds") and len(left) == 3} | found

    guard(replayed)
    for _ in range(CAPTURED):
        replayed.step()
    turns, known = (100, True) if device == "cuda" else (3, None)  # a CPU has neither
    gc.collect()
    held = memory(device)
    most = max(waits_of(replayed.step, device) for _ in range(turns))
    grown = memory(device) - held
    yield {"check": "at most one wait an iteration", "holds": known and most <= 1, "most": most}
    yield {"check": "memory is flat", "holds": known and grown <= 0, "turns": turns, "bytes grown": grown}


def speeds(job: str, device: str, seconds: float) -> Iterator[Line]:
    """Environment steps/s of whole iterations and of the physics alone."""
    require(device, *simulator(job, device))
    if job == "width 512":
        for precision in ("float32", "bf16", *(["tf32"] if device == "cuda" else [])):
            settings = f"{workload('HalfCheetah', 4096 if device == 'cuda' else 8)} precision={precision} "
            settings += "policy.hidden=[512,512] critic.hidden=[512,512]"
            yield from guarded(end_to_end(settings, device, seconds / 40), precision=precision)
        return
    if job == "compiled":  # kernels inside captured graphs
        settings = f"{workload('CartPole', 4096)} execution=compile"
        yield from guarded(end_to_end(settings, device, seconds / 20, ("captured",)), worlds=4096)
        return
    worlds = (4096, 16384, 1024) if device == "cuda" else (16,)
    window = seconds / len(worlds) / 20  # nine of them, and what comes before the first
    for n in worlds:
        yield from guarded(end_to_end(workload(job, n), device, window), worlds=n)
        yield from guarded(physics(job, n, device, window), worlds=n)


def end_to_end(
    settings: str, device: str, window: float, ways: tuple[str, ...] = ("captured", "eager")
) -> Iterator[Line]:
    """Captured and eager: an iteration ends when the host has read its results."""
    for way in ways if device == "cuda" else ("eager",):
        with uncaptured() as left:
            run = trainer(settings, device, Graphs if way == "captured" else None)
            guard(run)
            for _ in range(CAPTURED if way == "captured" else 2):
                run.step()
        left += not_replayed(run) if way == "captured" else []
        steps = run.collector.horizon * run.collector.env.num_envs
        yield {"what": way, "left eager": left} | rate(run.step, steps, window, device)
        del run
        gc.collect()  # its memory is the next one's


def physics(task: str, worlds: int, device: str, window: float) -> Iterator[Line]:
    """Steps of the simulator, as many as one step of the environment has; CartPole's, which is torch, of the task."""
    env: Any = make(task, worlds, device=device)
    env.reset()
    actions = [some_actions(env) for _ in range(10)]

    def advance() -> None:
        for action in actions:
            env.task.simulate(action)
            if task == "CartPole":
                env.task.advance(action)
        synchronize(device)

    yield {"what": "physics", "back end": env.description.split(" | ")[1]} | rate(advance, 10 * worlds, window, device)


def peer(job: str, device: str, seconds: float) -> Iterator[Line]:
    """PPO on CartPole in the shape of jax_peer.py, which is timed in a process of its own."""
    require(device)
    for n in (64, 1024, 4) if device == "cuda" else (4,):
        settings = f"{PEER} num_envs={n} policy.hidden=[64,64] critic.hidden=[64,64]"
        yield from guarded(end_to_end(settings, device, seconds / 40), worlds=n)


def target(task: str, device: str, seconds: float) -> Iterator[Line]:
    """Train until the mean return of the last hundred training episodes is 5,000; ``seconds`` of the line says when."""
    require(device, *simulator(task, device))
    began, returns, told = perf_counter(), deque[float](maxlen=EPISODES), 0.0
    run = trainer(TARGET, device, Graphs if device == "cuda" else None)
    mean, reached, end = math.nan, False, began + (0.8 * seconds if device == "cuda" else 3)
    while not reached and run.steps < run.total_steps and perf_counter() < end:
        returns.extend(run.iterate().returns)
        mean = statistics.fmean(returns) if len(returns) == EPISODES else math.nan
        reached = mean >= RETURN
        if perf_counter() - told > 2:
            told = perf_counter()
            yield {"steps": run.steps, "return": None if math.isnan(mean) else mean}
    yield {"target": RETURN, "reached": reached, "steps": run.steps, "return": None if math.isnan(mean) else mean}


def workload(task: str, worlds: int) -> str:
    own = PPO.get(task, PPO["MuJoCo"])
    if task == "CartPole":
        own += f" algo.minibatches={max(1, worlds * 64 // 32_768)}"
    return f"algo=ppo env={task} num_envs={worlds} {own}"


def trainer(settings: str, device: str, record: type[Graphs] | None = None) -> Trainer:
    """A run of these settings, captured if a kind of graphs is given."""
    schema.register()
    overrides = [f"device={device}", *settings.split()]
    overrides += [] if "tuned=" in settings else ["~tuned"]
    overrides += [] if "total_steps=" in settings else [f"total_steps={10**12}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        made = build(parse_run_config(to_dict(compose("train", overrides))))
    if isinstance(made.collector, EpisodeCollector):
        made.collector.poll = made.collector.horizon  # else it reads whether an episode still runs
    if record is not None:
        capture(made, record)
    return made


def require(device: str, *packages: str) -> None:
    """Raise where a GPU is asked for and torch sees none, or where a package is not installed."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("torch sees no CUDA device")
    for name in packages:
        importlib.import_module(name)


def simulator(task: str, device: str) -> tuple[str, ...]:
    """The package that a task needs on a device: its simulator, or the compiler of its kernels."""
    if device == "cpu" or task == "CartPole":
        return ()
    return ("triton",) if task == "compiled" else ("mujoco_warp",)


def some_actions(env: Any) -> Tensor:
    """Uniform actions [N, *A], sampled on the device."""
    space, n = env.action_space, env.num_envs
    if isinstance(space, spaces.Discrete):
        return torch.randint(int(space.n), (n,), device=env.device)
    low, high = (torch.as_tensor(x, device=env.device) for x in (space.low, space.high))
    return low + (high - low) * torch.rand(n, *space.shape, device=env.device)


def guard(run: Trainer) -> None:
    """Keep the last finite state from iteration to iteration, as every run of the command line does."""
    run.failure_handler = Recovery(Path(), {}, attempts=0, say=print)
    run.failure_handler.on_start(run)


def tape_or_graphs(device: str) -> type[Graphs]:
    """CUDA's, or on a CPU the tape of operations that stands in for them in the tests."""
    if device == "cuda":
        return Graphs
    sys.path.append(str(ROOT / "tests"))
    return importlib.import_module("tape").Tape


def not_replayed(run: Trainer) -> list[str]:
    """The kernels of a captured run that are not replayed, whatever the reason."""
    kernels = (run.collector.collect, run.algorithm.training_step, run.pack_host_data)
    return [x.name for x in kernels if getattr(getattr(x.run, "__self__", None), "graphs", None) is None]


def failing(kind: Any, device: str) -> type[Graphs]:
    """Graphs whose capture fails, since the host reads from the device in it."""

    class Failing(kind):
        def record(self, work: Callable[[], Any]) -> Any:
            return super().record(lambda: (work(), torch.zeros((), device=device).item()))

    return Failing


def alike(one: Trainer, other: Trainer, device: str, copied: bool = False) -> Line:
    """Do two runs do the same from the same state?  ``off`` is the worst distance of a metric over the one allowed:
    that of rounding on a GPU, and none on a CPU."""
    if not copied:
        other.load_state_dict(clone(one.state_dict()))
    off = 0.0
    for _ in range(2):
        first, second = one.iterate().metrics, other.iterate().metrics
        for key, x in first.items():
            y, room = second[key], 1e-2 + 2e-2 * abs(x) if device == "cuda" else 0.0
            if not (x == y or (math.isnan(x) and math.isnan(y))):
                off = max(off, abs(x - y) / room if room and math.isfinite(x - y) else math.inf)
    return {"holds": off <= 1, "off": off if math.isfinite(off) else "infinitely", "bitwise": off == 0}


@contextmanager
def uncaptured() -> Iterator[list[str]]:
    """What is said not to be captured; other warnings are passed on."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield found
    for x in told:
        if str(x.message).startswith("execution=cuda_graph"):
            found.append(str(x.message))
        else:
            print(x.message, file=sys.stderr)


def waits_of(work: Callable[[], Any], device: str) -> int:
    """How often the host waits for the GPU."""
    if device == "cpu":
        work()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(x.message) for x in told)


def rate(work: Callable[[], Any], steps: int, window: float, device: str) -> Line:
    """Steps/s of work that makes so many, in three windows of as many seconds at least."""
    found = []
    for _ in range(3):
        count, began = 0, perf_counter()
        while perf_counter() - began < window or not count:
            work()
            count += 1
        synchronize(device)
        found.append(count * steps / (perf_counter() - began))
    return {"steps/s": statistics.median(found), "from": min(found), "to": max(found)}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0
