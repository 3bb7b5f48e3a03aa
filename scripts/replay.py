"""Repeat the update that a run failed at: python scripts/replay.py crash=runs/ppo-HalfCheetah/.../crash.pt"""

from pgsuite.app.replay import main

if __name__ == "__main__":
    main()
