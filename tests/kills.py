"""Kills training runs at random moments, goes on with them, and compares them with runs that were left alone.

    python tests/kills.py --count 200 --out benchmarks/results/robustness/kills.json

Whatever a run leaves behind must be the same bit for bit: everything in its last checkpoint, metrics.csv,
evaluation.csv and TensorBoard's curves, apart from what clocks say.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SMALL = ["num_envs=4", "total_steps=960", "checkpoint.every=160", "logging.points=20"]
CHEETAH = ["env=HalfCheetah", "env.max_episode_steps=40", "horizon=16", *SMALL, "env_threads=1"]
POLE = ["env=CartPole", "env.max_episode_steps=60", "horizon=16", *SMALL]
SCORED = ["evaluation.every=320", "evaluation.episodes=2"]
WHOLE = ["env.max_episode_steps=20", *SMALL]
CASES: dict[str, list[str]] = {
    "reinforce": ["algo=reinforce", "env=Pendulum", "algo.baseline=critic", *WHOLE],
    "a2c": ["algo=a2c", *CHEETAH, "algo.lr={adaptive: {start: 1e-3, kl: 0.01}}"],
    "npg": ["algo=npg", *CHEETAH, "algo.max_kl={linear: [0.01, 0]}", "algo.critic_epochs=2"],
    "trpo": ["algo=trpo", *POLE, "policy.recurrent=gru", "algo.critic_minibatches=2", "algo.critic_epochs=2"],
    "ppo": ["algo=ppo", *CHEETAH, "algo.lr={cosine: [3e-4, 0]}", "algo.epochs=2", *SCORED],
    "ppo_penalty": ["algo=ppo_penalty", *CHEETAH, "algo.epochs=2"],
    "ppo-overlap": ["algo=ppo", *CHEETAH, "algo.epochs=2", "overlap=true"],
    "ppo-lstm": ["algo=ppo", *POLE, "policy.recurrent=lstm", "algo.minibatches=2", "algo.epochs=2"],
    "reinforce-gru": ["algo=reinforce", "env=Pendulum", "policy.recurrent=gru", *WHOLE],
    "a2c-pendulum": ["algo=a2c", "env=Pendulum", "env.max_episode_steps=30", "horizon=16", *SMALL],
    "npg-cartpole": ["algo=npg", *POLE],
    "trpo-hopper": ["algo=trpo", "env=Hopper", "env.max_episode_steps=40", "horizon=16", *SMALL, "env_threads=1"],
    "ppo-ant": ["algo=ppo", "env=Ant", "env.max_episode_steps=40", "horizon=16", *SMALL, "env_threads=1"],
}
METHODS = ("reinforce", "a2c", "npg", "trpo", "ppo", "ppo_penalty")


def child(folder: str, arguments: list[str], dies_at_write: int | None, variables: Mapping[str, str]) -> None:
    """A training process; it may be told to die in the middle of writing a checkpoint."""
    from pgsuite.app import cli
    from pgsuite.app.train import train

    os.chdir(folder)
    os.environ.update(variables)
    with open("output.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if dies_at_write is not None:
        fsync, left = os.fsync, [dies_at_write]

        def deadly(descriptor: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = deadly
    sys.argv = ["train.py", *arguments]
    cli.main(train, "train", processes=True)


def fork(work: Callable[..., None], *arguments: Any) -> Any:
    """A process that has everything imported."""
    context = multiprocessing.get_context("forkserver")  # which imports once, for all
    context.set_forkserver_preload(["torch._dynamo", "mujoco.batch", "tensorboard", "pgsuite.app.train"])
    process = context.Process(target=work, args=arguments)
    process.start()
    return process


def start(
    folder: Path, arguments: list[str], dies_at_write: int | None = None, variables: Mapping[str, str] | None = None
) -> Any:
    return fork(child, str(folder), arguments, dies_at_write, variables or {})


def finish(folder: Path, arguments: list[str]) -> float:
    """Run to the end; the seconds that it took."""
    began, process = time.perf_counter(), start(folder, arguments)
    process.join()
    if process.exitcode:
        raise RuntimeError(
            f"{' '.join(arguments)} ended with {process.exitcode}:\n{(folder / 'output.txt').read_text()}"
        )
    return time.perf_counter() - began


def left_behind(run: Path) -> dict[str, Any]:
    """What a finished run has to show, without the times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pgsuite.training import checkpoint

    def timeless(name: str) -> bool:
        return not name.startswith("time/") and "per_second" not in name

    state = checkpoint.load(checkpoint.numbered(run)[-1])
    for part in (state, *state["others"]):
        del part["seconds"]
    found: dict[str, Any] = {"state": {key: x for key, x in state.items() if key != "config"}}
    found["checkpoints"] = sorted(path.name for path in (run / checkpoint.FOLDER).glob("*.pt"))
    for path in run.glob("*.csv"):
        with path.open(newline="") as file:
            found[path.name] = [{k: x for k, x in row.items() if timeless(k)} for row in csv.DictReader(file)]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    for tag in filter(timeless, events.Tags()["scalars"]):
        found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def differences(x: Any, y: Any, where: str = "") -> list[str]:
    """The places where two of them are not the same, bit for bit."""
    import torch

    if isinstance(x, dict) and isinstance(y, dict):
        missing = [f"{where}/{key} is in one alone" for key in x.keys() ^ y.keys()]
        return missing + [line for key in x.keys() & y.keys() for line in differences(x[key], y[key], f"{where}/{key}")]
    if isinstance(x, list | tuple) and isinstance(y, list | tuple) and len(x) == len(y):
        return [line for i, pair in enumerate(zip(x, y, strict=True)) for line in differences(*pair, f"{where}/{i}")]
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        same = x.dtype == y.dtype and x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes()
        return [] if same else [f"{where} differs"]
    return [] if x == y else [f"{where}: {x!r} is not {y!r}"]


def trial(case: str, seed: int, folder: Path, reference: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One run, killed at least once and gone on with; how it compares."""
    draw = random.Random(f"{case} {seed}")
    arguments = [*CASES[case], "hydra.run.dir=run", "resume=auto"]
    killed: list[str] = []
    for _ in range(draw.randint(1, 3)):
        if draw.random() < 0.4:
            nth = draw.randint(0, 11)  # a checkpoint takes two: the file's, and its directory's
            process = start(folder, arguments, dies_at_write=nth)
            process.join()
            how = f"at disk write {nth}"
        else:
            process, after = start(folder, arguments), draw.uniform(0, seconds)
            process.join(after)
            process.kill()
            process.join()
            how = f"after {after:.2f} s"
        killed.append(how if process.exitcode == -signal.SIGKILL else f"{how}, when it had ended")
    finish(folder, arguments)
    different = differences(reference, left_behind(folder / "run"))
    return {"case": case, "seed": seed, "killed": killed, "differences": different[:5]}


def survive(case: str, seed: int, folder: Path) -> list[str]:
    """What differs where a run of this case is killed once and goes on, from one that was left alone."""
    for name in ("left alone", "killed"):
        (folder / name).mkdir()
    seconds = finish(folder / "left alone", [*CASES[case], "hydra.run.dir=run"])
    reference = left_behind(folder / "left alone" / "run")
    return trial(case, seed, folder / "killed", reference, seconds)["differences"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    references: dict[str, tuple[dict[str, Any], float]] = {}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(wanted.count):
            case = list(CASES)[i % len(CASES)]
            if case not in references:
                (own := Path(scratch) / case).mkdir()
                seconds = finish(own, [*CASES[case], "hydra.run.dir=run"])
                references[case] = left_behind(own / "run"), seconds
            (folder := Path(scratch) / f"{case}-{i}").mkdir()
            results.append(trial(case, i, folder, *references[case]))
            shutil.rmtree(folder)
            print(f"{i + 1:3d} {results[-1]}", flush=True)
    same = sum(not result["differences"] for result in results)
    print(f"{same} of {len(results)} identical")
    if wanted.out is not None:
        sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
        from record import keep, source  # pyright: ignore[reportMissingImports]

        keep(source() | {"identical": same, "trials": results}, wanted.out)
    sys.exit(same < len(results))


if __name__ == "__main__":
    main()
