"""Digests of what every method has learned after about ten iterations: a change that should change nothing keeps them.

    python tests/digests.py > before.json            # in one checkout
    python tests/digests.py --against before.json    # in the other, on the same machine and torch

Each run is a process of its own: method x {CartPole, HalfCheetah} x {eager, compile} x {MLP, GRU}.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

METHODS = ("reinforce", "a2c", "npg", "trpo", "ppo", "ppo_penalty")
ROOT = Path(__file__).parents[1]


def digest(method: str, env: str, execution: str, recurrent: str) -> str:
    """SHA-256 of the policy's and the critic's tensors at the end of a run.  Raises SystemExit where the run failed,
    since two failures would look like two equal runs."""
    horizon = [] if method == "reinforce" else ["horizon=64"]
    steps = 8_000 if method == "reinforce" else 5_120
    # So far that TRPO's search refuses full steps, without which its runs are NPG's.
    far = ["algo.max_kl=0.2", "algo.damping=0.001", "algo.critic_minibatches=4"] if method in ("npg", "trpo") else []
    far += ["algo.minibatches=4"] if method.startswith("ppo") else []  # with a memory, at most the environments
    settings = [
        *far,
        f"algo={method}",
        f"env={env}",
        f"execution={execution}",
        f"policy.recurrent={recurrent}",
        "seed=1",
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "scripts/train.py", *settings, *horizon, "num_envs=8", f"total_steps={steps}"]
        command += ["env.max_episode_steps=100", "env_threads=1", f"hydra.run.dir={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        found = sorted(Path(folder).glob("run/checkpoints/0*.pt"))
        if done.returncode or not found:
            said = (done.stderr.strip().splitlines() or [""])[-1]
            sys.exit(f"{' '.join(command)} left no checkpoint: {said}")
        state = torch.load(found[-1], weights_only=True)["algorithm"]
    sha = hashlib.sha256()
    for part in [state["policy"], state.get("critic", {})]:  # REINFORCE has no critic, as a rule
        for x in part.values():  # without names, which may change
            sha.update(x.contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--executions", default="eager,compile")
    options = parser.parse_args()
    cells = list(
        itertools.product(METHODS, ("CartPole", "HalfCheetah"), options.executions.split(","), ("none", "gru"))
    )
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(map(" ".join, cells), pool.map(lambda cell: digest(*cell), cells), strict=True))
    if options.against is None:
        print(json.dumps(found, indent=2))
        return
    before = json.loads(options.against.read_text())
    changed = [name for name, x in found.items() if before[name] != x]
    for name in changed:
        print(f"{name}: {before[name]} -> {found[name]}")
    print(f"{len(found) - len(changed)} of {len(found)} are the same")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
