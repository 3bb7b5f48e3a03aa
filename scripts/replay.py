"""Repeat the update that a run gave up at: python scripts/replay.py crash=runs/ppo-HalfCheetah/.../crash.pt"""

from pgsuite.app import cli
from pgsuite.app.replay import replay

if __name__ == "__main__":
    cli.main(replay, "replay")
