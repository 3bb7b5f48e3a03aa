"""The modes of execution, and the choice among them.  The requirements of a mode are imported only if it is chosen."""

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
    """Why nothing can be compiled on this machine, with a remedy; None if it can."""
    if distributed.size() > 1:
        return "is for one process: leave torchrun"
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "needs triton on a GPU: pip install triton"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(compiler) is not None
    return None if found else f"needs a C++ compiler, and there is no {compiler}: install it"


def missing_in_torch() -> str | None:
    """Which private module of torch, required for compilation, is missing in the installed version; None if none is."""
    try:
        importlib.import_module("pgsuite.execution.torch_private")
    except ImportError as error:
        return (
            f"needs parts of torch that torch {torch.__version__} lacks ({error.name}), and that torch 2.11 to 2.13 "
            "have: install one of those"
        )
    return None


def execute(algorithm: Algorithm, collector: Collector, how: Execution) -> Execution:
    """Choose the mode of execution of an algorithm and a collector; returns the mode in effect.

    ``auto`` compiles on a CPU if a compiler is available, and is eager otherwise.  ``cuda_graph`` is only validated
    here: ``cuda_graphs.capture`` needs the trainer too.  Raises ValueError if ``compile`` is asked for without a
    compiler or with several processes, and for ``cuda_graph`` without a GPU.
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
