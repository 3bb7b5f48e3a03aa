"""Measurement of the fastest numbers of threads of a run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from time import perf_counter
from typing import Any

import torch

from pgsuite import distributed
from pgsuite.app.build import build
from pgsuite.app.schema import Run

WARM, ROUNDS = 2, 5  # warm-up and timed iterations of each combination


def counts(cores: int) -> list[int]:
    """1, 2, 4, ... up to ``cores``, and ``cores`` itself."""
    return sorted({2**i for i in range(cores.bit_length())} | {cores})


def measured(run: Run, say: Callable[[str], None]) -> Run:
    """The settings, with ``torch_threads=measure`` replaced by the number with the shortest median iteration.  With
    env_threads=0 on MuJoCo, every number for torch is combined with every number for the physics.

    Iterations are those of copies of the run, which are discarded.  The combinations alternate, so that other load of
    the machine affects all of them alike.
    """
    from pgsuite.envs.physics.mujoco_batch import usable_cores

    if run.torch_threads != "measure":
        return run
    some = counts(usable_cores())

    def having(torch_threads: int, env_threads: int) -> Run:
        return replace(run, torch_threads=torch_threads, env_threads=env_threads)

    copies = {run.env_threads: build(having(1, run.env_threads))}
    if not run.env_threads and copies[0].collector.env.backend == "mujoco":
        copies = {count: build(having(1, count)) for count in some}
    seconds: dict[tuple[int, int], list[float]] = {pair: [] for pair in product(some, copies)}
    for _ in range(WARM + ROUNDS):
        for (torch_threads, env_threads), found in seconds.items():
            torch.set_num_threads(torch_threads)
            began, trainer = perf_counter(), copies[env_threads]
            trainer.iterate()
            trainer.collector.wait()
            found.append(perf_counter() - began)
    took = {pair: statistics.median(found[WARM:]) for pair, found in seconds.items()}
    chosen: Any = distributed.broadcast(min(took, key=lambda pair: took[pair]))
    table = " | ".join(f"{name(*pair)} {1e3 * x:,.1f} ms" for pair, x in took.items())
    say(f"an iteration with torch{' + physics' * (len(copies) > 1)} threads: {table}; takes {name(*chosen)}")
    return having(*chosen)


def name(torch_threads: int, env_threads: int) -> str:
    return f"{torch_threads} + {env_threads}" if env_threads else str(torch_threads)
