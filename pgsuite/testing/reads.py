"""Detection of transfers between host and device, which stall an accelerator; works on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pgsuite.transfer import as_on_accelerator


class NothingAsked(TorchFunctionMode):
    """Forbids calls that read a tensor of the CPU without passing through the dispatcher."""

    FORBIDDEN = ("tolist", "numpy", "__array__", "cpu", "item", "__bool__", "__int__", "__float__", "__index__")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in self.FORBIDDEN, f"{name} reads a tensor back to the host"
        return func(*args, **(kwargs or {}))


class NothingRead(TorchDispatchMode):
    """Forbids reading values from the device, operations whose output shape depends on values, and copies of lists and
    arrays to the device.  Raises AssertionError, naming the operation.  The CPU is treated as an accelerator."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "argwhere")
    FORBIDDEN += ("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount")
    MADE = "lift_fresh"  # called by torch.tensor and new_tensor

    def __enter__(self) -> NothingRead:
        self.outer = ExitStack()
        self.outer.enter_context(as_on_accelerator())
        self.outer.enter_context(NothingAsked())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.outer.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.FORBIDDEN, f"{name} reads a tensor back to the host"
        assert name != self.MADE, "torch.tensor and new_tensor copy what Python holds to the device"
        if name.startswith(("index", "_index", "_unsafe_index")):
            for index in args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ():
                masks = index is not None and index.dtype in (torch.bool, torch.uint8)
                assert not masks, f"{name} by a mask has a shape that is read back to the host"
        if name == "_to_copy" and str((kwargs or {}).get("device", "")) == "cpu":
            assert args[0].device.type == "cpu", "a copy to the host"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, f"{name} without output_size reads one back"
        return func(*args, **(kwargs or {}))
