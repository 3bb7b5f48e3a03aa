"""Train: python scripts/train.py algo=ppo env=HalfCheetah"""

from pgsuite.runtime import cli
from pgsuite.runtime.train import train

if __name__ == "__main__":
    cli.main(train, "train", processes=True)
