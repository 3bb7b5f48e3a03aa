"""Compare runs: python scripts/report.py runs/ppo-CartPole runs/trpo-CartPole"""

from pgsuite.app.report import main

if __name__ == "__main__":
    main()
