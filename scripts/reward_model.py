"""Make preference pairs and train a reward model on them: python scripts/reward_model.py"""

from pgsuite.rlhf.reward_training import main

if __name__ == "__main__":
    main()
