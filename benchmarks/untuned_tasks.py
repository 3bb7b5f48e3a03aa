"""A task that nobody tuned: a boiler, whose heat is a Box of 5 to 35.  gymnasium's id is untuned_tasks:Boiler-v0."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class Boiler(gymnasium.Env[np.ndarray, np.ndarray]):
    """A room is to be kept at 20 degrees while it grows warmer and colder outside.

    Observation: degrees above 20 inside, degrees outside, both in tens.  Action: kilowatts.  Reward: minus a tenth of
    the distance to 20 degrees.  A step is six minutes, an episode a day of them.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(5.0, 35.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.outside = self.np_random.uniform(-12, 8)
        self.inside = self.np_random.uniform(5, 30)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        heat = float(np.clip(action[0], 5, 35))
        self.inside += 0.1 * (heat - (self.inside - self.outside))
        self.outside = float(np.clip(self.outside + self.np_random.normal(0, 0.5), -14, 14))
        return self._observe(), -abs(self.inside - 20) / 10, False, False, {}

    def _observe(self) -> np.ndarray:
        return np.array([(self.inside - 20) / 10, self.outside / 10], np.float32)


gymnasium.register("Boiler-v0", "untuned_tasks:Boiler", max_episode_steps=240)
