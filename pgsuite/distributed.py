"""The one file that knows there may be other processes.  Alone, every function is the identity.

``total`` and ``mean`` are for tensors, on any device; the other functions are for whatever can be pickled, and for what
happens now and then.  All of them are collective: every process must call them, in the same order.  Each raises
LostProcessError where another process has ended, or stays silent for longer than ``PATIENCE``.
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

PATIENCE = timedelta(minutes=30)  # the first process may be evaluating, or filming, while the others wait


class LostProcessError(RuntimeError):
    """Another process is gone; says how that was noticed."""


@contextmanager
def group() -> Iterator[None]:
    """Membership among the processes that torchrun started, by the variables it sets; alone where there are none.

    Tensors on a CPU go through gloo, and those on a GPU through NCCL.  Raises LostProcessError if not all of them come,
    or not all of them stay to the end.  Who leaves by an exception waits for nobody.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # The defaults of its functions are the group that there is when it is imported, which torch.optim would have done
    # while ours is; they would hold ours for ever, and with it gloo's threads.
    importlib.import_module("torch.distributed.nn.functional")
    with _noticing():
        store, own, count = next(rendezvous("env://", timeout=PATIENCE))
        # Restarted processes may meet where the ones before them left their addresses.
        store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=PATIENCE)
    try:
        yield
        with _noticing():
            dist.barrier()  # who left early would look lost
    except BaseException as error:
        dist.distributed_c10d._abort_process_group()
        _let_go(error)
        raise
    dist.destroy_process_group()


def _let_go(error: BaseException | None) -> None:
    """Clear the frames that an exception came through, with what led to it.

    gloo's threads end with the last reference to the group, and these hold some.  One that drops a tensor while Python
    shuts down aborts the process.
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
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from zero.  The first one alone writes and speaks."""
    return dist.get_rank() if size() > 1 else 0


def local_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if size() > 1 else 1


def local_rank() -> int:
    """Which of those this is, from zero."""
    return int(os.environ.get("LOCAL_RANK", rank())) if size() > 1 else 0


def total(x: Tensor) -> Tensor:
    """x summed over processes, without gradient."""
    if size() > 1:
        x = x.detach().clone()
        with _noticing():
            dist.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """x averaged over processes, without gradient."""
    return total(x) / size() if size() > 1 else x


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    return bool(total(torch.tensor(float(flag))) > 0)


def _on_cpu(x: Any) -> Any:
    """A nest of dictionaries, lists and tuples, with its tensors on the CPU."""
    if isinstance(x, dict):
        return {key: _on_cpu(value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(map(_on_cpu, x))
    return x.cpu() if isinstance(x, Tensor) else x


def gather(x: Any) -> list[Any] | None:
    """What each process holds, by rank, for the first one, its tensors on the CPU; None for the others."""
    if size() == 1:
        return [x]
    x = _on_cpu(x)
    everything: list[Any] | None = [None] * size() if rank() == 0 else None
    with _noticing():
        dist.gather_object(x, everything)
    return everything


def broadcast(x: Any) -> Any:
    """What the first process holds, for all of them."""
    if size() == 1:
        return x
    box = [x]
    with _noticing():
        dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait for all."""
    if size() > 1:
        with _noticing():
            dist.barrier()


def first(occasion: str) -> bool:
    """Whether no other process has asked for this occasion before: what is to be said once, the first one says.  Not
    collective, and works among those that are left."""
    try:
        return size() == 1 or dist.distributed_c10d._get_default_store().add(occasion, 1) == 1
    except RuntimeError:
        return True
