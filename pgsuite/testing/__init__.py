"""Checks of users' algorithms, tasks and vector environments, for use in their tests."""

from pgsuite.testing.algorithms import check_algorithm
from pgsuite.testing.envs import check_vector_env, play, random_actions
from pgsuite.testing.tasks import check_task

__all__ = ["check_algorithm", "check_task", "check_vector_env", "play", "random_actions"]
