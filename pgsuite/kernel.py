"""Kernels: named functions of tensors, which ``execution`` compiles or captures and ``profiling`` times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Around = Callable[[str], AbstractContextManager[Any]]


class Kernel(Generic[P, R]):
    """A named function of tensors whose implementation can be replaced.

    Calling a kernel calls ``run``.  Initially ``run`` is ``function``; ``execution`` replaces it by a compiled function
    or a captured graph, and ``surrounded`` by one that times the current ``run``.  ``reset`` restores ``function``.  A
    kernel adds neither state nor device reads, so ``torch.compile`` and ``torch.vmap`` apply to it as to the function.

    Deep-copying an object that holds kernels of its own methods yields kernels of the copy's methods, run eagerly.
    """

    def __init__(self, name: str, function: Callable[P, R]) -> None:
        self.name, self.function = name, function
        self.run: Callable[..., R] = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.run(*args, **kwargs)

    def reset(self) -> None:
        self.run = self.function

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernel[P, R]:
        memo[id(self)] = twin = copy.copy(self)
        twin.function = copy.deepcopy(self.function, memo)
        twin.reset()
        return twin


def kernels_of(**owners: object) -> dict[str, Kernel[..., Any]]:
    """The kernels among the attributes of some objects, under the names ``owner.attribute``."""
    attributes = [(f"{name}.{key}", x) for name, owner in owners.items() for key, x in vars(owner).items()]
    return {name: x for name, x in attributes if isinstance(x, Kernel)}


_around: list[Around] = []
_NOTHING = nullcontext()


def phase(name: str) -> AbstractContextManager[Any]:
    """A context around a coarse part of an iteration, timed by a profiler if one is active."""
    return _around[-1](name) if _around else _NOTHING


def is_phase(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: make each call of a function a phase."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with phase(name):
                return function(*args, **kwargs)

        return inside

    return decorate


@contextmanager
def surrounded(kernels: dict[str, Kernel[..., Any]], around: Around) -> Iterator[None]:
    """Within the context, enter ``around(name)`` for every phase and every call of these kernels."""

    def timed(kernel: Kernel[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with around(kernel.name):
                return run(*args, **kwargs)

        return inside

    before = [(kernel, kernel.run) for kernel in kernels.values()]
    for kernel, run in before:
        kernel.run = timed(kernel, run)
    _around.append(around)
    try:
        yield
    finally:
        _around.remove(around)
        for kernel, run in before:
            kernel.run = run
