"""Resolvers of ``configs/``, for conditional defaults, names of jobs and cores per job, and resume of Optuna studies.

Importing this module registers the resolvers; every process of a sweep does so through ``app.cli``.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from pgsuite.settings import INCIDENTAL

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


OmegaConf.register_new_resolver("label", label, replace=True)
OmegaConf.register_new_resolver("cores_each", cores_each, replace=True)


class Study(Callback):
    """Resumes an interrupted study of the Optuna sweeper: unfinished trials are repeated with the same values, and
    finished ones count towards ``n_trials``."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        import optuna
        from optuna.trial import TrialState

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # pyright: ignore[reportPrivateImportUsage]
        sweeper = config.hydra.sweeper
        os.makedirs(config.hydra.sweep.dir, exist_ok=True)  # contains the storage
        directions = [
            str(getattr(d, "name", d))
            for d in ([sweeper.direction] if not OmegaConf.is_list(sweeper.direction) else sweeper.direction)
        ]
        study = optuna.create_study(
            study_name=sweeper.study_name, storage=sweeper.storage, directions=directions, load_if_exists=True
        )
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
        finished = len(study.get_trials(states=(TrialState.COMPLETE,)))
        with read_write(config), open_dict(config):
            sweeper.n_trials = max(0, sweeper.n_trials - finished)
        if finished:
            print(f"study {sweeper.study_name}: {finished} trials are finished, {sweeper.n_trials} to go")
