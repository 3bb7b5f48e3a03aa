"""Train: python scripts/train.py algo=ppo env=HalfCheetah"""

from pgsuite.app.train import main

if __name__ == "__main__":
    main()
