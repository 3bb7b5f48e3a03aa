"""Repeat the update that a run gave up at: python scripts/replay.py crash=runs/ppo-HalfCheetah/.../crash.pt"""

from pgsuite.runtime import cli
from pgsuite.runtime.recovery import replay

if __name__ == "__main__":
    cli.main(replay, "replay")
