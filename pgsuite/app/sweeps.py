"""What configurations need of Hydra beyond its launchers: defaults that depend on a choice, and for sweeps names,
shares of the cores, and searches that go on.

Importing it registers the resolvers that ``configs/`` uses; every process of a sweep does, through ``app.cli``.
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
    """The overrides of this job, as the end of a directory's name: ``-lr=0.001,hidden=[64,64]``."""
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
    """The cores that each of some workers on this machine has to itself; workers < 1 stands for one a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers) if workers > 0 else 1


def if_equal(value: Any, other: Any, then: Any, otherwise: Any) -> Any:
    """``then`` where two values are equal, else ``otherwise``."""
    return then if value == other else otherwise


OmegaConf.register_new_resolver("if_equal", if_equal, replace=True)
OmegaConf.register_new_resolver("label", label, replace=True)
OmegaConf.register_new_resolver("cores_each", cores_each, replace=True)


class Study(Callback):
    """Has the Optuna sweeper go on with a study that was cut off: trials that had begun are taken up again, with the
    same values, and those that are finished count."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        import optuna
        from optuna.trial import TrialState

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # pyright: ignore[reportPrivateImportUsage]
        sweeper = config.hydra.sweeper
        os.makedirs(config.hydra.sweep.dir, exist_ok=True)  # where the storage lies
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
