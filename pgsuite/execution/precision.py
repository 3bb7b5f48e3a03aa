"""In which precision networks multiply.  The parameters, and whatever no layer computes, stay float32."""

from __future__ import annotations

import torch

from pgsuite.algorithms.base import Algorithm
from pgsuite.execution.modes import Precision
from pgsuite.nn.network import Features


def lower(algorithm: Algorithm, device: torch.device, precision: Precision) -> None:
    """Have its networks compute so from here on.

    ``bf16`` is for convolutions and hidden layers alone (``Features``): what a distribution or a value is made of, and
    with it log-probabilities, ratios, losses and credit, is float32.  ``tf32`` rounds the factors of every float32
    product of matrices, in the whole process.  Raises ValueError for tf32 where there is none.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ValueError("precision=tf32 is for a GPU: use float32, or bf16")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    for part in algorithm.parts.values():
        for body in (x for x in part.modules() if isinstance(x, Features)):
            body.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
