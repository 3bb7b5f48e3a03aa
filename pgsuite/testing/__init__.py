"""Checks of a user's own parts, for their tests."""

from pgsuite.testing.envs import check_vector_env, play, random_actions

__all__ = ["check_vector_env", "play", "random_actions"]
