"""Collectives for training in several processes.  With one process every function is the identity.

No other module uses ``torch.distributed``.  ``total`` and ``mean`` reduce tensors on any device; the other functions
exchange picklable objects and are meant for rare events.  All are collective: every process must call them, in the same
order.  Each raises LostProcessError if another process has ended, or does not answer within ``PATIENCE``.
"""

from __future__ import annotations

import importlib
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=30)  # the first process may be evaluating, or recording a video


class LostProcessError(RuntimeError):
    """Another process has ended; the message is the error that revealed it."""


@contextmanager
def group() -> Iterator[None]:
    """Join the process group of torchrun, by the environment variables that it sets; do nothing without them.

    Collectives use gloo for CPU tensors and NCCL for GPU tensors.  Raises LostProcessError unless every process joins
    and stays to the end.  A process that leaves by an exception does not wait for the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # This module stores the current process group as a default argument at import.  Imported by torch.optim later, it
    # would keep our group, and with it gloo's threads, alive for ever.
    importlib.import_module("torch.distributed.nn.functional")
    with _noticing():
        store, own, count = next(rendezvous("env://", timeout=PATIENCE))
        # After a restart, the store may still hold addresses of the previous processes.
        store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=PATIENCE)
    try:
        yield
        with _noticing():
            dist.barrier()  # a process that leaves early would appear lost to the others
    except BaseException as error:
        dist.distributed_c10d._abort_process_group()
        _let_go(error)
        raise
    dist.destroy_process_group()


def _let_go(error: BaseException | None) -> None:
    """Clear the frames of an exception and of its causes.

    gloo's threads end with the last reference to the process group, and these frames hold some.  A gloo thread that
    frees a tensor during interpreter shutdown aborts the process.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextmanager
def _noticing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        where_and_what = str(error).partition("\n")[0].partition(". ")[0]
        raise LostProcessError(re.sub(r"^\[\S+:\d+\] ", "", where_and_what)) from error


def size() -> int:
    """The number of processes (world size)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process, from zero.  Only rank 0 writes files and prints."""
    return dist.get_rank() if size() > 1 else 0


def local_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if size() > 1 else 1


def local_rank() -> int:
    """The rank of this process among those on its machine, from zero."""
    return int(os.environ.get("LOCAL_RANK", rank())) if size() > 1 else 0


def total(x: Tensor) -> Tensor:
    """The sum of x over processes, without gradient."""
    if size() > 1:
        x = x.detach().clone()
        with _noticing():
            dist.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """The mean of x over processes, without gradient."""
    return total(x) / size() if size() > 1 else x


def any_of(flag: bool) -> bool:
    """Whether the flag is true in any process."""
    return bool(total(torch.tensor(float(flag))) > 0)


def _on_cpu(x: Any) -> Any:
    """Copy the tensors of a nest of dictionaries, lists and tuples to the CPU."""
    if isinstance(x, dict):
        return {key: _on_cpu(value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(map(_on_cpu, x))
    return x.cpu() if isinstance(x, Tensor) else x


def gather(x: Any) -> list[Any] | None:
    """The objects of all processes in the order of ranks, with tensors on the CPU, for rank 0; None for the others."""
    if size() == 1:
        return [x]
    x = _on_cpu(x)
    everything: list[Any] | None = [None] * size() if rank() == 0 else None
    with _noticing():
        dist.gather_object(x, everything)
    return everything


def broadcast(x: Any) -> Any:
    """The object of rank 0, for every process."""
    if size() == 1:
        return x
    box = [x]
    with _noticing():
        dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait until every process has called this."""
    if size() > 1:
        with _noticing():
            dist.barrier()


def first(occasion: str) -> bool:
    """Whether this process is the first to ask for ``occasion``; used to print a message once.  Not collective, and
    works after other processes have ended."""
    try:
        return size() == 1 or dist.distributed_c10d._get_default_store().add(occasion, 1) == 1
    except RuntimeError:
        return True
