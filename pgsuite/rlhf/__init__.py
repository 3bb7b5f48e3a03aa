"""Reinforcement learning of language models: policies over tokens, environments of prompts, reward models."""

from pgsuite.rlhf.env import Language, LanguageEnv
from pgsuite.rlhf.generation import GenerationCollector
from pgsuite.rlhf.policy import LanguagePolicy, language_policy

__all__ = ["GenerationCollector", "Language", "LanguageEnv", "LanguagePolicy", "language_policy"]
