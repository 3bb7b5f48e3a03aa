"""Applications: from a configuration to a run directory, and what can be done with one."""
