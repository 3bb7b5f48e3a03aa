"""How tensor code runs: as it is written, or compiled.  Algorithms and environments know nothing of it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from typing import Literal

import torch

from pgsuite.algorithms.base import Algorithm
from pgsuite.envs import TaskEnv, VectorEnv
from pgsuite.envs.tasks.classic import ClassicTask

Execution = Literal["eager", "compile"]


def execute(algorithm: Algorithm, env: VectorEnv, how: Execution) -> None:
    """Have them run so from here on.

    ``compile`` fuses the loss of a minibatch with its gradient, which is where A2C and PPO spend their time, and a step
    of tasks written in torch; the numbers agree with eager ones to rounding.  The methods that need second derivatives
    have no loss that it can take.  Raises ValueError where there is nothing to compile, or nothing to compile it with.
    """
    if how == "eager":
        return
    loss = getattr(algorithm, "loss", None)
    if loss is None:
        name = type(algorithm).__name__
        raise ValueError(f"execution=compile is for methods with a minibatch loss, and {name} has none: leave it out")
    if env.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("execution=compile needs triton on a GPU: pip install triton, or leave it out")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if env.device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"execution=compile needs a C++ compiler, and there is no {compiler}: install it, or leave it out"
        )
    torch.compiler.reset()  # or the runs of a sweep use up the number of times that one function may be compiled
    algorithm.loss = torch.compile(loss, dynamic=False)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(env, TaskEnv) and isinstance(env.task, ClassicTask):
        env.task.advance = torch.compile(env.task.advance, dynamic=False, fullgraph=True)
