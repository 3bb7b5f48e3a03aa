"""Make preference pairs and train a reward model on them: python scripts/reward_model.py

With pairs=<file>, preferences of your own: lines of {"prompt": "...", "chosen": "...", "rejected": "..."}.
"""

from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pgsuite.app import cli
from pgsuite.app.build import instantiate, to_dict
from pgsuite.rlhf.reward_training import train_reward
from pgsuite.training.callbacks import console


def task(cfg: DictConfig) -> None:
    folder, say = Path(HydraConfig.get().runtime.output_dir), partial(console().print, highlight=False, markup=False)
    train_reward(instantiate(to_dict(cfg), "the training"), folder, say)


if __name__ == "__main__":
    cli.main(task, "reward_model")
