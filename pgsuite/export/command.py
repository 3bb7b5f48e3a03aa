"""Export of a policy to one file that runs without this suite: ONNX, or a torch.export program."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from pgsuite import seeding, settings
from pgsuite.app.build import instantiate, to_dict
from pgsuite.app.policy_io import Restored, restore
from pgsuite.envs.spaces import is_joined, leaves, native_action
from pgsuite.errors import UserError, install
from pgsuite.export.portable import Named, Portable, nested, parameters, with_noise
from pgsuite.files import replacing
from pgsuite.settings import Natural, Positive
from pgsuite.training import checkpoint
from pgsuite.training.callbacks import console
from pgsuite.trust import Trust

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-5  # of every output: absolute, relative for values above one
SIZES, STEPS = (1, 7, 32), 6  # batch sizes, and steps over which the hidden state is carried, of the comparison
METADATA = "pgsuite"  # key of the metadata in the file
Run = Callable[[Named], Named]


@dataclass(kw_only=True)
class Export:
    """The settings of an export."""

    run: str = ""  # a run directory, or one checkpoint of it
    format: Literal["onnx", "torch", "transformers"] = (
        "onnx"  # an ONNX graph, a torch.export program, or a language model as a directory of transformers
    )
    to: str | None = None  # file or directory to write; null takes policy.onnx, .pt2 or model in the run directory
    seed: Natural = 0  # of the random observations on which the file is tested
    trust: Trust = False  # classes from outside pgsuite that a run of another user may name; true for any
    tolerance: Positive = TOLERANCE  # largest permitted difference between outputs of the file and of the policy

    def __post_init__(self) -> None:
        settings.check(self, label="")
        if not self.run:
            raise ValueError("run must be a run directory, such as run=runs/ppo-HalfCheetah/...")


def export(cfg: DictConfig) -> None:
    """Export the policy of the newest checkpoint of a run, and compare the file with it.  Raises UserError."""
    wanted: Export = instantiate(to_dict(cfg), "the export")
    needed = ("onnx", "onnxscript", "onnxruntime") if wanted.format == "onnx" else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"format=onnx needs {', '.join(missing)}: {install('onnx')}, or take format=torch")
    restored = restore(wanted.run, trust=wanted.trust)
    folder = checkpoint.run_of(restored.path)
    if wanted.format == "transformers":
        export_language_model(restored, Path(wanted.to) if wanted.to is not None else folder / "model")
        return
    if hasattr(restored.policy, "save_pretrained"):
        raise UserError(f"format={wanted.format} cannot express a language model: take format=transformers")
    path = Path(wanted.to) if wanted.to is not None else folder / f"policy{SUFFIXES[wanted.format]}"
    if path.suffix != SUFFIXES[wanted.format]:
        raise UserError(f"to must end in {SUFFIXES[wanted.format]} for format={wanted.format}, got {path.name!r}")
    if not path.parent.is_dir():
        raise UserError(f"no directory {path.parent} to write {path.name} in")
    portable = Portable(restored).eval()
    with replacing(path) as temporary:
        with quiet():
            write(portable, portable.metadata(restored), temporary, wanted.format)
        found = compare(portable, restored, runner(temporary, wanted.format), wanted.seed)
        if found.worst > wanted.tolerance:
            raise UserError(
                f"the file that {wanted.format} made of {restored.path} differs from it by more than tolerance="
                f"{wanted.tolerance}: {found}; nothing was written"
            )
    inputs = ", ".join(f"{name} {shape_of(x)}" for name, x in with_noise(portable, portable.example(2)).items())
    console().print(f"{path} | takes {inputs} | {restored.steps:,} steps | {found}")
    if portable.law is None:
        console().print("its samples are no function of noise: draw from the parameters that it gives")


def export_language_model(restored: Restored, to: Path) -> None:
    """Write the language model of a run, and its tokenizer, to a directory that does not exist or is empty."""
    save = getattr(restored.policy, "save_pretrained", None)
    if save is None:
        raise UserError("format=transformers is for language models: take format=onnx or torch")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} is there already: move it away, or give another to=")
    tokens = Path(restored.config["env"].get("tokens", ""))
    try:
        with quiet():
            save(to, tokens if tokens.is_dir() else None)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    console().print(f"{to} | {restored.steps:,} steps | loads with transformers' from_pretrained")


def shape_of(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}[{', '.join(['N', *map(str, x.shape[1:])])}]"


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and log messages of the exporters."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def write(portable: Portable, metadata: dict[str, Any], path: Path, form: str) -> None:
    """Write the file.  Raises UserError for a policy that cannot be traced."""
    inputs = with_noise(portable, portable.example(2))
    batch = torch.export.Dim("batch")
    try:
        program = torch.export.export(
            portable, (inputs,), dynamic_shapes=({name: {0: batch} for name in inputs},), strict=False
        )
        if form == "torch":
            torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})
            return
        with torch.no_grad():
            outputs = list(portable(inputs))
        made = torch.onnx.export(
            program, input_names=list(inputs), output_names=outputs, dynamo=True, verbose=False, optimize=True
        )
    except RuntimeError as error:
        raise UserError(f"{form} cannot express this policy: {str(error).splitlines()[0]}") from error
    assert made is not None
    for node in made.model.graph:  # an operation may have the name of an output, such as mean
        for x in node.outputs:
            if x.name in outputs and not x.is_graph_output():
                x.name = f"inner.{x.name}"
    made.model.metadata_props[METADATA] = json.dumps(metadata)
    made.save(path, external_data=False)


def runner(path: Path, form: str) -> Run:
    """Load the file as a function of named tensors."""
    if form == "torch":
        module = torch.export.load(path).module()
        return lambda inputs: module(inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    names, takes = [x.name for x in session.get_outputs()], {x.name for x in session.get_inputs()}

    def run(inputs: Named) -> Named:
        given = {name: x.numpy() for name, x in inputs.items() if name in takes}
        return {k: torch.as_tensor(x) for k, x in zip(names, session.run(None, given), strict=True)}

    return run


@dataclass
class Agreement:
    """Largest difference between the outputs of a file and of its policy."""

    worst: float = 0.0  # absolute, relative for values above one
    where: str = "nothing"
    observations: int = 0
    choices: int = 0  # discrete actions
    others: int = 0  # number of these that differ

    def note(self, name: str, mine: Tensor, theirs: Tensor) -> None:
        if mine.shape != theirs.shape:
            self.worst, self.where = np.inf, f"{name}, whose shape is {tuple(theirs.shape)} and not {tuple(mine.shape)}"
        elif not mine.is_floating_point():
            self.choices, self.others = self.choices + mine.numel(), self.others + int((mine != theirs).sum())
        elif mine.numel():
            gap = float(((mine - theirs).abs() / mine.abs().clamp(min=1)).nan_to_num(nan=np.inf).max())
            if gap > self.worst or self.where == "nothing":
                self.worst, self.where = max(gap, self.worst), name
        if self.others > 0.01 * self.choices:  # more than rounding in ties explains
            self.worst, self.where = np.inf, f"{self.others} of {self.choices} discrete actions"

    def __str__(self) -> str:
        words = f"largest difference {self.worst:.1e} in {self.where}, over {self.observations:,} random observations"
        same = f"{self.choices - self.others:,} of {self.choices:,} discrete actions the same"
        return f"{words}, {same}" if self.choices else words


@torch.no_grad()
def compare(portable: Portable, restored: Restored, run: Run, seed: int) -> Agreement:
    """Compare a file with the policy as it acts in training, with hidden states carried over several steps."""
    policy, interface, found = restored.policy, restored.interface, Agreement()
    space = interface.action_space
    for size in SIZES:
        hidden_state = policy.initial_state(size)
        carried = next(iter(hidden_state.values()), None)
        for step in range(STEPS):
            inputs = portable.example(size, seeding.number(seed, f"{size} {step}"))
            if carried is not None:
                inputs["memory"] = carried
            obs, start = (
                interface.read(nested(interface.observation_space, inputs)),
                torch.zeros(size, dtype=torch.bool),
            )
            draws = [seeding.generator(seed, f"noise {size} {step}") for _ in range(2)]
            theirs = run(with_noise(portable, inputs, draws[0]))
            choice = policy.act(obs, hidden_state, start, deterministic=True)
            expected = {"action": choice.action}
            if portable.law is not None:
                expected["sample"] = policy.act(obs, hidden_state, start, draws[1]).action
            for name, action in expected.items():
                parts = [torch.as_tensor(x) for _, _, x in leaves(space, native_action(space, action))]
                native = torch.cat([x.reshape(size, -1) for x in parts], -1) if is_joined(space) else parts[0]
                found.note(name, native, theirs[name])
            for name, x in parameters(portable.look(inputs)[0]).items():
                found.note(name, x, theirs[name])
            hidden_state = choice.hidden_state
            if carried is not None:
                carried = theirs["next_memory"]
                found.note("next_memory", next(iter(hidden_state.values())), carried)
            found.observations += size
    return found


def main() -> None:
    """The command line."""
    from pgsuite.app import cli  # which configures Hydra

    cli.main(export, "export")
