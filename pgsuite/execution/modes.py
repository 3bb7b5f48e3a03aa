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
from pgsuite.rollout import Collector, OverlappedCollector

Execution = Literal["eager", "compile", "auto", "cuda_graph", "compile_cuda_graph"]
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

    ``auto`` is ``cuda_graph`` on a GPU if all of an iteration can be captured, ``compile`` on a CPU if a compiler is
    available, and eager otherwise.  What is captured is only validated here: ``cuda_graphs.capture`` needs the trainer
    too.  Raises ValueError if compilation is asked for without a compiler or with several processes, and CUDA graphs
    without a GPU or with overlapped collection.
    """
    device = collector.env.device
    if how == "auto":
        how = automatic(algorithm, collector)
    if how.endswith("cuda_graph"):
        if isinstance(collector, OverlappedCollector):
            raise ValueError(f"overlap=true and execution={how} exclude each other: leave one of them out")
        if device.type != "cuda":
            raise ValueError(f"execution={how} is for a GPU: give device=cuda, or leave it out")
    if how.startswith("compile"):
        if (why := why_not_compilable(device) or missing_in_torch()) is not None:
            raise ValueError(f"execution={how} {why}, or leave it out")
        from pgsuite.execution.compile import compile_kernels

        compile_kernels(algorithm, collector)
    return how


def automatic(algorithm: Algorithm, collector: Collector) -> Execution:
    """The mode that ``auto`` chooses."""
    device = collector.env.device
    if device.type == "cuda":
        from pgsuite.execution.cuda_graphs import why_not_captured

        whole = not isinstance(collector, OverlappedCollector) and not why_not_captured(algorithm, collector)
        return "cuda_graph" if whole else "eager"
    if why_not_compilable(device):
        return "eager"
    if (why := missing_in_torch()) is not None:
        warnings.warn(f"execution=auto is eager here, for execution=compile {why}", stacklevel=3)
        return "eager"
    return "compile"
