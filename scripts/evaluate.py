"""Evaluate: python scripts/evaluate.py run=runs/ppo-HalfCheetah/... episodes=20"""

from pgsuite.app import cli
from pgsuite.app.evaluate import evaluate

if __name__ == "__main__":
    cli.main(evaluate, "evaluate")
