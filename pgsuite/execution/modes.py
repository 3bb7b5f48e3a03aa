"""The ways to run tensor code, and the choice among them.  What a way needs is imported where it is chosen."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import warnings
from typing import Literal

import torch

from pgsuite import distributed
from pgsuite.algorithms.base import Algorithm
from pgsuite.rollout import Collector

Execution = Literal["eager", "compile", "auto", "cuda_graph"]
Precision = Literal["float32", "tf32", "bf16"]


def why_not_compilable(device: torch.device) -> str | None:
    """Why nothing can be compiled here, and what would help."""
    if distributed.size() > 1:
        return "is for one process: leave torchrun"
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "needs triton on a GPU: pip install triton"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(compiler) is not None
    return None if found else f"needs a C++ compiler, and there is no {compiler}: install it"


def missing_in_torch() -> str | None:
    """Which of the parts of torch that are not public, and that compiling needs, this torch lacks."""
    try:
        importlib.import_module("pgsuite.execution.torch_private")
    except ImportError as error:
        return (
            f"needs parts of torch that torch {torch.__version__} lacks ({error.name}), and that torch 2.11 to 2.13 "
            "have: install one of those"
        )
    return None


def execute(algorithm: Algorithm, collector: Collector, how: Execution) -> Execution:
    """Have them run so from here on; returns which way that is.

    ``auto`` compiles on a CPU where that can be, and is eager elsewhere.  ``cuda_graph`` needs the trainer too, and is
    left to ``cuda_graphs.capture``.  Raises ValueError where there is nothing to compile with, or several processes.
    """
    device = collector.env.device
    if how == "cuda_graph" and device.type != "cuda":
        raise ValueError("execution=cuda_graph is for a GPU: give device=cuda, or leave it out")
    if how == "auto":
        how = "eager" if device.type == "cuda" or why_not_compilable(device) else "compile"
        if how == "compile" and (why := missing_in_torch()) is not None:
            warnings.warn(f"execution=auto runs as written, for execution=compile {why}", stacklevel=2)
            how = "eager"
    if how != "compile":
        return how
    if (why := why_not_compilable(device) or missing_in_torch()) is not None:
        raise ValueError(f"execution=compile {why}, or leave it out")
    from pgsuite.execution.compile import compile_kernels

    compile_kernels(algorithm, collector)
    return how
