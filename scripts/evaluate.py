"""Evaluate: python scripts/evaluate.py run=runs/ppo-HalfCheetah/... episodes=20"""

from pgsuite.app.evaluate import main

if __name__ == "__main__":
    main()
