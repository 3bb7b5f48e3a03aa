"""A device that is not the CPU, on any machine: its tensors have shapes and no values.

Whole iterations run on it, with autograd, vmap and forward mode.  Whatever would stall or break an accelerator raises:
a value that is read, a tensor that was left on the CPU, a shape that depends on values, a generator of another device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pgsuite.kernel import Kernel
from pgsuite.testing.reads import NothingRead

NAME = "elsewhere"


class Valueless(FakeTensorMode):
    """Its tensors never have values: torch would keep those of small constants, which a device would have to read."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def may_turn_const(self, t: Tensor) -> bool:
        return False


class FakeGenerator(torch.Generator):
    """A generator that says that it is on the device; torch lets a backend in Python have none of its own."""

    def __new__(cls, where: torch.device | str = "cpu") -> torch.Generator:
        return super().__new__(cls) if torch.device(where).type == NAME else CPUGenerator(where)

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return device()


CPUGenerator = torch.Generator


def device() -> torch.device:
    return torch.device(NAME, 0)


class OnlyOurGenerators(TorchFunctionMode):
    """Forbids generators of another device.  Here, since the dispatcher hands on others of the same state."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for x in (*args, *(kwargs or {}).values()):
            ours = isinstance(x, FakeGenerator) or not isinstance(x, CPUGenerator)
            assert ours, f"{func.__name__} draws from a generator on the CPU"
        return func(*args, **(kwargs or {}))


class OnlyHere(TorchDispatchMode):
    """Forbids tensors of another device, in operations and among their results, and global generators.

    An error that is raised within a backward pass ends the process, since torch then asks the Python of this backend
    for its device while the error is pending.  So there it is raised at the end, and the operation has its way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.postponed: list[str] = []

    def __exit__(self, kind: Any, *error: Any) -> None:
        super().__exit__(kind, *error)
        assert kind is not None or not self.postponed, self.postponed[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        name, given = func._schema.name.removeprefix("aten::"), pytree.tree_leaves((args, kwargs))
        if torch.Tag.nondeterministic_seeded in func.tags:
            assert any(isinstance(x, CPUGenerator) for x in given), f"{name} draws from a global generator"
            # Without values, not every operation takes one.
            args, kwargs = pytree.tree_map_only(CPUGenerator, lambda x: None, (args, kwargs))
        if not all(map(here, given)):
            args, kwargs = pytree.tree_map_only(Tensor, partial(self.replaced, name), (args, kwargs))
        found = func(*args, **kwargs)
        if not all(map(here, pytree.tree_leaves(found))):
            found = pytree.tree_map_only(Tensor, partial(self.replaced, name), found)
        return found

    def replaced(self, name: str, x: Tensor) -> Tensor:
        if here(x):
            return x
        message = f"{name} meets a tensor on the {x.device}"
        assert torch._C._current_graph_task_id() != -1, message
        self.postponed.append(message)
        return torch.empty_like(x, device=device())


def here(x: Any) -> bool:
    """Whether an argument is on the device, or on none."""
    if not isinstance(x, Tensor):
        return True
    where = x.fake_device if isinstance(x, FakeTensor) else x.device
    # Forward mode has zeros without memory as the tangents of numbers, and finds their shapes on no device.
    return where.type in (NAME, "meta") or x._is_zerotensor()


@contextlib.contextmanager
def on_fake_device() -> Iterator[None]:
    """What is made within it is made of tensors without values."""
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME)
        # From here on torch's checkpointing asks every backend of this process for it.
        getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False), Valueless():
            patch.setattr(torch, "Generator", FakeGenerator)
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def moved(x: Tensor) -> Tensor:
    """A tensor of the CPU, on the device."""
    return x.detach().to(device())  # detached, it is a tensor without values, whose copy needs none


def place(*modules: nn.Module | None) -> None:
    """Move modules to the device, as ``Module.to`` does where tensors have values."""
    for module in filter(None, modules):
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, x in held.items():
                    if x is not None and x.device != device():
                        new: Any = moved(x)
                        held[name] = nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new


@contextlib.contextmanager
def values() -> Iterator[None]:
    """What is made within it is made of tensors of the CPU, with values."""
    with unset_fake_temporarily():
        yield


@contextlib.contextmanager
def until(last: Kernel[..., Tensor]) -> Iterator[None]:
    """Nothing is read before ``last`` is called, whose result is what the host may read: here, zeros."""
    strict, run = contextlib.ExitStack(), last.run

    def read(*args: Any) -> Tensor:
        packed = run(*args)
        strict.close()
        afterwards.enter_context(values())
        return torch.zeros(packed.shape, dtype=packed.dtype)

    last.run = read
    with contextlib.ExitStack() as afterwards, strict:
        afterwards.callback(setattr, last, "run", run)
        for part in (NothingRead(), OnlyHere(), OnlyOurGenerators()):
            strict.enter_context(part)
        yield
