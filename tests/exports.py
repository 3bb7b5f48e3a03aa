"""Exports a policy of every kind in every format and holds each file against its policy.

    python tests/exports.py --out benchmarks/results/robustness/export.json

The policies are untrained.  Their normalizers, biases and last layers are drawn at random, so that outputs are of the
size that those of trained ones are, and no statistic is where it began.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from pgsuite.app.build import build_policy
from pgsuite.app.policy_io import Restored, restore
from pgsuite.app.schema import Run
from pgsuite.envs.spaces import tensor_space, to_data
from pgsuite.export.command import SUFFIXES, TOLERANCE, compare, quiet, runner, write
from pgsuite.export.command import Run as File
from pgsuite.export.portable import Portable
from pgsuite.nn.configs import CriticConfig, MLPPolicyConfig
from pgsuite.training import checkpoint

BOX = spaces.Box(-np.inf, np.inf, (5,), np.float64)
TORQUE = spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([0.1, 2.0], np.float32))
IMAGE = spaces.Box(0, 255, (12, 14, 3), np.uint8)
MIXED = spaces.Dict(
    {
        "camera": IMAGE,
        "joints": BOX,
        "inner": spaces.Dict({"gear": spaces.Discrete(3, start=1)}),
        "critic_obs": spaces.Box(-1, 1, (2,)),
    }
)
TUPLE = spaces.Tuple([BOX, spaces.MultiDiscrete([2, 3], start=[1, 0])])
MASKED = spaces.Dict({"state": BOX, "action_mask": spaces.MultiBinary(4)})
HIDDEN = spaces.Dict({"state": BOX, "critic_obs": BOX})
GRU, LSTM = ({"recurrent": kind, "recurrent_size": 8} for kind in ("gru", "lstm"))
WINDOW = {"recurrent": {"_target_": "transformer", "window": 4, "layers": 2}, "recurrent_size": 8}
SHARED = {"critic": CriticConfig(shared=True)}
Spaces = tuple[spaces.Space[Any], spaces.Space[Any]]
KINDS: dict[str, tuple[Spaces, dict[str, Any], dict[str, Any]]] = {  # spaces, the policy's settings, the run's
    "gaussian": ((BOX, TORQUE), {}, {}),
    "gaussian-state": ((BOX, spaces.Box(-1, 1, (2, 3))), {"sigma": "state"}, {}),
    "gaussian-raw": ((BOX, TORQUE), {}, {"standardize_obs": False}),
    "squashed": ((BOX, TORQUE), {"distribution": "squashed"}, {}),
    "squashed-state": ((BOX, TORQUE), {"distribution": "squashed", "sigma": "state"}, {}),
    "beta": ((BOX, TORQUE), {"distribution": "beta"}, {}),
    "categorical": ((BOX, spaces.Discrete(4, start=2)), {}, {}),
    "multicategorical": ((BOX, spaces.MultiDiscrete([2, 3, 4], start=[1, 0, 5])), {}, {}),
    "bernoulli": ((BOX, spaces.MultiBinary(3)), {"activation": "elu"}, {}),
    "joined": ((BOX, spaces.Tuple([spaces.Discrete(3, start=1), TORQUE])), {}, {}),
    "discrete": ((spaces.Discrete(6), spaces.Discrete(2)), {"activation": "silu"}, {}),
    "images": ((IMAGE, spaces.Discrete(3)), {"activation": "relu"}, {}),
    "normalized": ((BOX, TORQUE), {"norm": "layer"}, {}),
    "residual-gru": ((BOX, TORQUE), {"block": "residual", "norm": "layer"} | GRU, {}),
    "images-lstm": ((IMAGE, spaces.Discrete(3)), LSTM, {"standardize_obs": False}),
    "masks": ((MASKED, spaces.Discrete(4)), {}, {}),
    "masks-multicategorical": ((MASKED, spaces.MultiDiscrete([2, 2])), {}, {}),
    "masks-bernoulli": ((MASKED, spaces.MultiBinary(4)), {}, {}),
    "hidden": ((HIDDEN, TORQUE), {}, {}),
    "tuple": ((TUPLE, TORQUE), {}, {}),
    "dictionary-gru": ((MIXED, TORQUE), GRU, {}),
    "gru": ((BOX, TORQUE), GRU, {}),
    "transformer": ((BOX, TORQUE), WINDOW, {}),
    "lstm": ((BOX, spaces.Discrete(4)), LSTM, {}),
    "shared": ((BOX, TORQUE), {}, SHARED),
    "shared-lstm": ((BOX, TORQUE), LSTM, SHARED),
}
ENV = {"_target_": "pgsuite.envs.Gym", "id": "Somewhere-v0"}


def save(folder: Path, kind: str, hidden: tuple[int, ...] = (16,)) -> Path:
    """A checkpoint of a policy of a kind, with everything in it far from where it began."""
    (observation, action), options, settings = KINDS[kind]
    run = Run(policy=MLPPolicyConfig(hidden=list(hidden), **options), **settings)
    generator = torch.Generator().manual_seed(0)
    policy = build_policy(tensor_space(observation), action, run, generator)
    state = {name: x.clone() for name, x in policy.state_dict().items()}
    for name, x in state.items():
        if name.endswith(("moments.center", "log_sigma", "bias")):
            x.normal_(generator=generator)
        elif name.endswith("out.weight"):
            x.normal_(std=x.shape[1] ** -0.5, generator=generator)
        elif name.endswith("moments.scale"):
            x.uniform_(0.2, 3.0, generator=generator)
    data = {"observation": to_data(observation), "action": to_data(action)}
    facts = {"config": nested(run) | {"env": ENV, "algo": {}}, "spaces": data, "choices": {}, "versions": {}}
    path = checkpoint.path_of(folder / "run", 123)
    checkpoint.save({"steps": 123, "algorithm": {"policy": state}} | facts, path)
    return path


def nested(x: Any) -> Any:
    """Settings with those that are dataclasses as dictionaries."""
    if hasattr(x, "__dataclass_fields__"):
        return nested(vars(x)) | {"_target_": f"{type(x).__module__}.{type(x).__qualname__}"}
    return {k: nested(v) for k, v in x.items()} if isinstance(x, dict) else x


def exported(folder: Path, kind: str, form: str, hidden: tuple[int, ...] = (16,)) -> tuple[Restored, Portable, File]:
    """A policy of a kind, what of it is traced, and the file that a format makes of that; ``eager`` makes none."""
    restored = restore(save(folder, kind, hidden))
    portable = Portable(restored).eval()
    if form == "eager":
        return restored, portable, portable
    path = folder / f"policy{SUFFIXES[form]}"
    with quiet():
        write(portable, portable.metadata(restored), path, form)
    return restored, portable, runner(path, form)


def row(kind: str, form: str, seeds: int) -> dict[str, Any]:
    """How near a file comes to its policy, over random observations of several seeds."""
    with tempfile.TemporaryDirectory() as folder:
        restored, portable, run = exported(Path(folder), kind, form, hidden=(64, 64))
        found = [compare(portable, restored, run, seed) for seed in range(seeds)]
    worst = max(found, key=lambda x: x.worst)
    numbers = {"largest_difference": worst.worst, "in": worst.where}
    return (
        {"kind": kind, "format": form}
        | numbers
        | {key: sum(getattr(x, key) for x in found) for key in ("observations", "choices", "others")}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="of the random observations, 240 each")
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for kind in KINDS:
        for form in SUFFIXES:
            results.append(row(kind, form, wanted.seeds))
            print(results[-1], flush=True)
    near = sum(result["largest_difference"] <= TOLERANCE for result in results)
    print(f"{near} of {len(results)} within {TOLERANCE}")
    if wanted.out is not None:
        sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
        from record import keep, source  # pyright: ignore[reportMissingImports]

        packages = {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
        record = source()
        record["versions"] |= packages
        record |= {"tolerance": TOLERANCE, "within": near, "files": results}
        keep(record, wanted.out)
    sys.exit(near < len(results))


if __name__ == "__main__":
    main()
