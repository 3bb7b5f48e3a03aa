"""The training loop and what happens around it: callbacks, loggers, checkpoints, recovery."""
