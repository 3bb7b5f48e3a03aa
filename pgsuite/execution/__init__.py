"""How tensor code runs: as written, compiled, or as CUDA graphs."""
