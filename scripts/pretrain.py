"""Pretrain a language model on generated reviews: python scripts/pretrain.py"""

from pgsuite.rlhf.pretraining import main

if __name__ == "__main__":
    main()
