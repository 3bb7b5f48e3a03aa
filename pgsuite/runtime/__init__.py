"""Everything around training: configuration, the loop, logs, checkpoints.  Hydra appears here and in scripts only."""
