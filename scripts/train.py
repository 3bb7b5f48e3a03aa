"""Train: python scripts/train.py algo=ppo env=HalfCheetah"""

from pgsuite.app import cli
from pgsuite.app.train import train

if __name__ == "__main__":
    cli.main(train, "train", processes=True)
