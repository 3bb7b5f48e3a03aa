"""Steps/s of whole iterations on a GPU, as they are written and as CUDA graphs.

    python benchmarks/gpu.py [--only CartPole] [--rounds 7] [--seconds 5]

In one process, in turn: PPO on HalfCheetah, simulated by Warp (2,048 environments x 32 steps, 5 epochs x 4 minibatches,
two networks of 64-64 tanh), the same with networks of 512-512-512 in each precision, and on CartPole with PufferLib's
workload (4,096 environments x 64 steps, one epoch on minibatches of 32,768, a hidden layer of 128).  What guards a run
against numbers that are not finite is part of an iteration.  Prints steps/s of each round, then medians; writes
benchmarks/results/gpu.json with the name of the card.  ``--device cpu`` tries the script out, and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from time import perf_counter

import torch
from hydra import compose, initialize_config_dir
from record import RESULTS, keep, source

from pgsuite.app import schema
from pgsuite.app.build import build, parse_run_config, to_dict
from pgsuite.app.cli import CONFIGS
from pgsuite.training.recovery import Recovery
from pgsuite.training.trainer import Trainer

WARM_UP = 8  # iterations: some that settle, one that is captured, some that are replayed
CHEETAH = "env=HalfCheetah num_envs=2048 horizon=32 algo.epochs=5 algo.minibatches=4"
WIDE = f"{CHEETAH} policy.hidden=[512,512,512] critic.hidden=[512,512,512]"
CARTPOLE = (
    "env=CartPole num_envs=4096 horizon=64 algo.epochs=1 algo.minibatches=8 policy.hidden=[128] critic.hidden=[128]"
)
GRAPH = "execution=cuda_graph"
CONTENDERS = {
    "HalfCheetah": CHEETAH,
    "HalfCheetah, CUDA graphs": f"{CHEETAH} {GRAPH}",
    "HalfCheetah 512-512-512, CUDA graphs": f"{WIDE} {GRAPH}",
    "HalfCheetah 512-512-512, CUDA graphs, tf32": f"{WIDE} {GRAPH} precision=tf32",
    "HalfCheetah 512-512-512, CUDA graphs, bf16": f"{WIDE} {GRAPH} precision=bf16",
    "CartPole": CARTPOLE,
    "CartPole, CUDA graphs": f"{CARTPOLE} {GRAPH}",
}


def trainer(settings: str, device: str) -> Trainer:
    cfg = compose("train", [*settings.split(), f"device={device}", f"total_steps={10**12}", "~tuned"])
    made = build(parse_run_config(to_dict(cfg)))
    made.failure_handler = Recovery(Path(), {}, attempts=0, say=print)
    made.failure_handler.on_start(made)
    for _ in range(WARM_UP):
        made.step()
    return made


def speed(run: Trainer, seconds: float) -> float:
    """Steps/s; an iteration ends when the host has read what came of it."""
    steps, began = run.steps, perf_counter()
    while (now := perf_counter()) - began < seconds:
        run.step()
    return (run.steps - steps) / (now - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="contenders whose name begins so")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device; --device cpu tries the script out")
    names = [x for x in CONTENDERS if x.startswith(args.only) and (on_gpu or not {"CUDA", "tf32"} & set(x.split()))]
    schema.register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        runs = {name: trainer(CONTENDERS[name], args.device) for name in names}
    rounds = [{name: speed(run, args.seconds) for name, run in runs.items()} for _ in range(args.rounds)]
    for name in names:
        each = [x[name] for x in rounds]
        print(f"{name:<45}{statistics.median(each):>12,.0f} steps/s, from {min(each):,.0f} to {max(each):,.0f}")
    if on_gpu:
        card = torch.cuda.get_device_name(args.device)
        commands = {name: CONTENDERS[name] for name in names}
        keep(source() | {"card": card, "settings": commands, "rounds": rounds}, RESULTS / "gpu.json")


if __name__ == "__main__":
    main()
