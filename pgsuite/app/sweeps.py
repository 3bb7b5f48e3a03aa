"""Sweeps of Hydra: names of jobs and cores per job, as resolvers of ``configs/``; and the interface of other sweeps.

Importing this module registers the resolvers; every process of a sweep does so through ``app.cli``.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from pgsuite.settings import INCIDENTAL, Checked

UNNAMED = re.compile(rf"(algo|env|seed|sweep|tuned|device|total_steps|hydra.*|({'|'.join(INCIDENTAL)})(\..*)?)$")
LONGEST = 80  # characters of a label


def label() -> str:
    """The overrides of this job, as a suffix of its directory: ``-lr=0.001,hidden=[64,64]``."""
    said = []
    for override in HydraConfig.get().overrides.task:
        key, _, value = override.lstrip("+~").partition("=")
        if not UNNAMED.match(key):
            said.append(f"{key.removeprefix('algo.').removeprefix('algo/')}={value}")
    whole = re.sub(r"[^\w.,=+@-]+", "_", ",".join(said))
    if len(whole) > LONGEST:
        whole = f"{whole[: LONGEST - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return f"-{whole}" if whole else ""


def cores_each(workers: int) -> int:
    """Cores per worker on this machine; workers < 1 means one worker per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers) if workers > 0 else 1


@dataclass
class Command:
    """A command line that trains."""

    folder: Path  # the run directory
    config: dict[str, Any]  # without the settings of the sweep
    overrides: list[str]
    choices: dict[str, Any]  # of groups


@dataclass(kw_only=True)
class Sweep(Checked, ABC):
    """Many runs of one command that ``sweep=`` chooses, each trained by ``app.api.train_with``."""

    @abstractmethod
    def start(self, command: Command) -> tuple[float | None, int]:
        """Train, and return the objective of the best run, and the number of the signal that stopped the sweep.  Raises
        UserError."""


OmegaConf.register_new_resolver("label", label, replace=True)
OmegaConf.register_new_resolver("cores_each", cores_each, replace=True)
