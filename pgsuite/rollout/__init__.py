"""Collection of [T, N] rollouts, and minibatches of them."""

from pgsuite.rollout.buffer import RolloutBuffer
from pgsuite.rollout.collect import Collector, EpisodeCollector, StepCollector
from pgsuite.rollout.demonstrations import DemonstrationCollector, Demonstrations
from pgsuite.rollout.episodes import EpisodeTracker
from pgsuite.rollout.minibatches import minibatches
from pgsuite.rollout.overlap import OverlappedCollector

__all__ = [
    "Collector",
    "DemonstrationCollector",
    "Demonstrations",
    "EpisodeCollector",
    "EpisodeTracker",
    "OverlappedCollector",
    "RolloutBuffer",
    "StepCollector",
    "minibatches",
]
