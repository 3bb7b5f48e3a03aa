"""Precision of the matrix products in networks.  Parameters, and everything outside layers, stay float32."""

from __future__ import annotations

from typing import Any

import torch

from pgsuite.algorithms.base import Algorithm
from pgsuite.execution.modes import Precision
from pgsuite.nn.network import Body


def lower(algorithm: Algorithm, device: torch.device, precision: Precision) -> None:
    """Set the precision of an algorithm's networks.

    ``bf16`` applies to the convolutions and hidden layers of ``Features``, and to the transformer of a language model:
    output layers, and with them log-probabilities, importance ratios, losses and advantages, are float32.  ``tf32``
    rounds the factors of every float32 matrix product in the process.  Raises ValueError for tf32 without a GPU.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ValueError("precision=tf32 is for a GPU: use float32, or bf16")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    for part in algorithm.parts.values():
        bodies: list[Any] = [x for x in part.modules() if isinstance(x, Body) and hasattr(x, "dtype")]
        for body in bodies:
            body.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
