"""List the environments that env= takes: python scripts/envs.py"""

from pgsuite.app.envs import main

if __name__ == "__main__":
    main()
