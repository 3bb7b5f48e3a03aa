"""Modules: distributions, policies, critics, running statistics, optimizers."""
