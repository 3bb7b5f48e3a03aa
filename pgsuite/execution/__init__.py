"""Execution of tensor code: eager, compiled, or as CUDA graphs; and the precision of networks."""
