"""Games of the Arcade Learning Environment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgsuite import settings
from pgsuite.envs.base import VectorEnvConfig
from pgsuite.envs.gym_env import Gym, GymEnv
from pgsuite.settings import Count, Fraction, Natural
from pgsuite.types import Step


@dataclass(kw_only=True, eq=False)
class Atari(VectorEnvConfig):
    """A game of the Arcade Learning Environment on ale-py's vector environment.

    Observations are the last screens, gray and 84 x 84.  Rewards are the game's own score and episodes whole games:
    what methods learn from may be clipped (``clip_reward``).  Sticky actions are those of Machado et al. (2018).
    """

    backends = ("gymnasium",)

    game: str = "Breakout"  # as in ALE/<game>-v5
    sticky: Fraction = 0.25  # probability that a frame repeats the action of the frame before
    frame_skip: Count = 4  # frames for each action
    stack: Count = 4  # screens in an observation
    noop_max: Natural = 30  # a game begins with up to so many frames without an action
    full_actions: bool = False  # all 18 actions, instead of those that have an effect in the game
    terminal_on_life_loss: bool = False  # for the learner; the game goes on, and scores are those of whole games
    max_episode_steps: Count = 27_000  # after which a game is truncated: half an hour at 60 frames a second

    def __post_init__(self) -> None:
        settings.check(self, label="env.")

    def build(self, num_envs: int, *, device: torch.device, dtype: torch.dtype, seed: int) -> AtariEnv:
        """Raises ValueError for an unknown game, or if ale-py is not installed."""
        options = {
            "autoreset_mode": "SameStep",
            "repeat_action_probability": self.sticky,
            "frameskip": self.frame_skip,
            "stack_num": self.stack,
            "noop_max": self.noop_max,
            "full_action_space": self.full_actions,
            "max_num_frames_per_episode": self.max_episode_steps * self.frame_skip,
            "reward_clipping": False,
        }
        gym = Gym(id=f"ALE/{self.game}-v5", import_="ale_py", native=True, options=options)
        vec = gym.vectorize(num_envs)
        env = AtariEnv(
            vec, name=gym.id, max_episode_steps=self.max_episode_steps, device=device, dtype=dtype, seed=seed
        )
        env.terminal_on_life_loss = self.terminal_on_life_loss
        return env


class AtariEnv(GymEnv):
    """Games, whose lost lives may be terminal to what learns."""

    terminal_on_life_loss = False

    def _step(self, action: Tensor) -> Step:
        if not self.terminal_on_life_loss:
            return super()._step(action)
        lives = self.info["lives"].copy()
        step = super()._step(action)
        return step._replace(life_lost=torch.from_numpy(self.info["lives"] < lives) & ~step.done)
