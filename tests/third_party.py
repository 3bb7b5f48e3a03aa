"""Environments of five packages by others, in the shapes that users meet: each is trained, evaluated and filmed.

    pip install -e '.[third-party,video]' -c constraints.txt
    python tests/third_party.py --out benchmarks/results/robustness/third-party.json

Each environment is used by the commands that a user would type, in a directory of its own.  All must end with code 0
and without a traceback; a film must have frames of several colours that differ.  Ends with code 1 if anything is wrong,
or a package is missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np

LIMIT = 600  # seconds for a command
FRAMES = 40  # of a film
FILM = [f"max_steps={FRAMES}", "deterministic=false"]  # the most likely action of an untrained policy may be to rest
SMALL = ["num_envs=4", "horizon=16", "total_steps=256"]
FLAT = "env.wrappers=[minigrid.wrappers.FlatObsWrapper]"
LINEAR = "env.wrappers=[{mo_gymnasium.wrappers.LinearReward: {weight: [0.8, 0.1, 0.1]}}]"
CASES: dict[str, list[str]] = {
    "minigrid, flat observations": ["env.import=minigrid", "env.id=MiniGrid-DoorKey-5x5-v0", FLAT],
    "minigrid, images": [
        "env.import=minigrid",
        "env.id=MiniGrid-Empty-5x5-v0",
        "env.wrappers=[minigrid.wrappers.ImgObsWrapper]",
    ],
    "minigrid, the mission left out": [
        "env.import=minigrid",
        "env.id=MiniGrid-FourRooms-v0",
        "env.wrappers=[{gymnasium.wrappers.FilterObservation: {filter_keys: [image, direction]}}]",
    ],
    "highway-env, discrete actions": ["env.import=highway_env", "env.id=highway-fast-v0"],
    "highway-env, continuous actions": ["env.import=highway_env", "env.id=parking-v0"],
    "mo-gymnasium, a weighted reward": ["env.import=mo_gymnasium", "env.id=mo-mountaincar-v0", LINEAR],
    "mo-gymnasium, MuJoCo": [
        "env.import=mo_gymnasium",
        "env.id=mo-hopper-v5",
        "env.wrappers=[{mo_gymnasium.wrappers.LinearReward: {weight: [1, 0, 1]}}]",
    ],
    "gymnasium-robotics, PointMaze": ["env.import=gymnasium_robotics", "env.id=PointMaze_UMaze-v3"],
    "gymnasium-robotics, PointMaze in workers": [
        "env.import=gymnasium_robotics",
        "env.id=PointMaze_Medium-v3",
        "env.workers=2",
    ],
    "Box2D, discrete actions": ["env.id=LunarLander-v3"],
    "Box2D, continuous actions": ["env.id=BipedalWalker-v3", "policy.distribution=squashed"],
    "Box2D, images": ["env.id=CarRacing-v3", "total_steps=128"],
}


def run(*arguments: str, folder: Path) -> dict[str, Any]:
    """A command of pgsuite: its last line, and what was wrong with it."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pgsuite", *arguments]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environ, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"wrong": f"took more than {LIMIT} s", "said": ""}
    printed = done.stdout + done.stderr
    wrong = f"exit code {done.returncode}" if done.returncode else "a traceback" if "Traceback" in printed else ""
    said = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return {"wrong": wrong, "said": said[-1] if said else "", "seconds": round(time.monotonic() - began, 1)}


def wrong_with(film: Path) -> str:
    """What is wrong with a film; nothing if it moves and shows several colours."""
    if not film.is_file():
        return "no film"
    frames = imageio.v3.imread(film)
    if min(len(np.unique(frame.reshape(-1, 3), axis=0)) for frame in frames) < 3:
        return "a frame of fewer than three colours"
    return "" if any((frame != frames[0]).any() for frame in frames) else "all frames are the same"


def attempt(case: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """What came of training, evaluating and filming."""
    film = folder / "film.gif"
    stages = {
        "train": run("train", "algo=ppo", "env=gym", *SMALL, *case, "hydra.run.dir=run", folder=folder),
        "evaluate": run("evaluate", "run=run", "episodes=2", f"max_steps={FRAMES}", folder=folder),
        "film": run("evaluate", "run=run", "episodes=1", *FILM, f"video={film.name}", folder=folder),
    }
    stages["film"]["wrong"] = stages["film"]["wrong"] or wrong_with(film)
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="beginnings of names of cases; all without")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep runs and films there")
    wanted = parser.parse_args()
    names = [name for name in CASES if name.startswith(tuple(wanted.cases) or "")]
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            folder = (wanted.keep or Path(scratch)).resolve() / name.replace(", ", "-").replace(" ", "-")
            folder.mkdir(parents=True)
            results[name] = attempt(CASES[name], folder)
            for stage, result in results[name].items():
                print(f"{name}: {stage}: {result['wrong'] or 'right'}: {result['said']}", flush=True)
    wrong = sum(bool(stage["wrong"]) for result in results.values() for stage in result.values())
    print(f"{len(results)} environments, {wrong} of {3 * len(results)} commands wrong")
    if wanted.out is not None:
        sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
        from record import keep, source  # pyright: ignore[reportMissingImports]

        keep(source() | {"wrong": wrong, "environments": results}, wanted.out)
    sys.exit(bool(wrong) or not results)


if __name__ == "__main__":
    main()
