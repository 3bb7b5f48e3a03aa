"""Copies between the host, where some environments are stepped, and the device of the networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pgsuite.types import Obs, Step, leaves, map_obs

ALIGNMENT = 16  # bytes, a multiple of the size of each dtype's numbers
_accelerators: list[bool] = []


@contextmanager
def as_on_accelerator() -> Iterator[None]:
    """Within the context, the CPU is treated as an accelerator, from which nothing is read: for tests."""
    _accelerators.append(True)
    try:
        yield
    finally:
        _accelerators.pop()


def reads_freely(x: Tensor) -> bool:
    """Whether x can be read without waiting for a device: on a CPU, unless ``vmap`` batches x or a tracer follows
    it."""
    if _accelerators or x.device.type != "cpu":
        return False
    try:
        bool(x.any())
    except RuntimeError:
        return False
    return True


class HostLink:
    """One copy in each direction per step, through pinned memory if the device is a GPU; none if it is the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.local = device, device.type == "cpu"
        self.incoming = self.outgoing = torch.empty(0, dtype=torch.uint8)
        self.sent = torch.cuda.Event() if device.type == "cuda" else None  # outgoing may be overwritten

    def to_host(self, x: Tensor) -> Tensor:
        """x in host memory, which the next call overwrites.  Waits for the device: the only wait of a step."""
        if self.local:
            return x
        self.incoming = self._room(self.incoming, x.nbytes)
        host = piece(self.incoming, 0, x)
        host.copy_(x, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return host

    def to_device(self, obs: Obs) -> Obs:
        """The tensors of an observation, or of any dictionary, in new memory on the device.  One that occurs twice is
        copied once.  Does not wait for the device."""
        if self.local:
            return obs
        distinct = {id(x): x for x in leaves(obs)}
        offsets, size = {}, 0
        for key, x in distinct.items():
            offsets[key] = size
            size += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        if self.sent is not None:
            self.sent.synchronize()
        self.outgoing = self._room(self.outgoing, size)
        for key, x in distinct.items():
            piece(self.outgoing, offsets[key], x).copy_(x)
        received = self.outgoing[:size].to(self.device, non_blocking=True, copy=True)
        if self.sent is not None:
            self.sent.record(torch.cuda.current_stream(self.device))
        return map_obs(lambda x: piece(received, offsets[id(x)], x), obs)

    def step_to_device(self, step: Step) -> Step:
        """As ``to_device``, for a step."""
        if self.local:
            return step
        return Step(**self.to_device({key: x for key, x in step._asdict().items() if x is not None}))

    def _room(self, memory: Tensor, size: int) -> Tensor:
        """At least so many bytes of host memory."""
        if len(memory) >= size:
            return memory
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")


def piece(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """The bytes of memory from an offset on, as a tensor of the shape and dtype of another."""
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
