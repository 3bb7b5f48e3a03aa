"""The start of a run from what another learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pgsuite.errors import UserError
from pgsuite.training import checkpoint
from pgsuite.training.trainer import Trainer

# Buffers that hold the state of each environment, which is no part of what was learned.
OF_ENVIRONMENTS = ("hidden_state", "discounted_return")


def initialize(trainer: Trainer, path: str, say: Callable[[str], object]) -> None:
    """Copy parameters and running statistics of the newest checkpoint of a run, or of a given checkpoint, to the parts
    of a trainer that have the same names and shapes; ``say`` is called with a line on each that was taken or not.

    A layer or statistic is taken whole or not at all.  A reference policy becomes the policy that results.  Raises
    UserError if there is no undamaged checkpoint, or nothing in it fits.
    """
    found, state = checkpoint.newest(Path(path), say)
    algorithm, taken = trainer.algorithm, 0
    reference, teacher = (getattr(algorithm, name, None) for name in ("reference", "teacher"))
    say(f"begins from {found} at {state['steps']:,} steps")
    for part, module in algorithm.parts.items():
        if module is reference or module is teacher:
            continue
        own, theirs = (layers(x) for x in (module.state_dict(), state["algorithm"].get(part) or {}))
        fitting = [name for name in own if not (why_not(own[name], theirs.get(name)))]
        for name in fitting:
            for key, x in own[name].items():
                x.copy_(theirs[name][key])  # in place: optimizers hold parameters as views
        taken += len(fitting)
        if fitting:
            say(f"  {part}: took {', '.join(name or part for name in fitting)}")
        for name in own:
            if reason := why_not(own[name], theirs.get(name)):
                say(f"  {part}: left {name or part} as it is, {reason}")
        if unused := [name for name in theirs if name not in own]:
            say(f"  {part}: did not take {', '.join(unused)}, which this run does not have")
    if not taken:
        raise UserError(f"init={path}: nothing in {found} has the name and the shape of anything in this run")
    if reference is not None:
        with torch.no_grad():
            reference.policy.load_state_dict(algorithm.policy.state_dict())


def layers(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a state by the module that holds them, and their name in it."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, x in state.items():
        module, _, name = key.rpartition(".")
        if name not in OF_ENVIRONMENTS:
            found.setdefault(module, {})[name] = x
    return found


def why_not(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor] | None) -> str:
    """Why the tensors of a module cannot take the values of others; empty if they can."""
    if theirs is None or own.keys() != theirs.keys():
        return "which is not there"
    differing = [name for name, x in own.items() if x.shape != theirs[name].shape]
    words = [f"{name} is {tuple(theirs[name].shape)} there and {tuple(own[name].shape)} here" for name in differing]
    return f"whose {', '.join(words)}" if words else ""
