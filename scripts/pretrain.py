"""Pretrain a language model on generated reviews: python scripts/pretrain.py"""

from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pgsuite.app import cli
from pgsuite.app.build import instantiate, to_dict
from pgsuite.rlhf.pretraining import pretrain
from pgsuite.training.callbacks import console


def task(cfg: DictConfig) -> None:
    folder, say = Path(HydraConfig.get().runtime.output_dir), partial(console().print, highlight=False, markup=False)
    pretrain(instantiate(to_dict(cfg), "the pretraining"), folder, say)


if __name__ == "__main__":
    cli.main(task, "pretrain")
