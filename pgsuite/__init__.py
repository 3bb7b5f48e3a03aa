"""Policy gradient methods in PyTorch: REINFORCE, A2C, NPG, TRPO and PPO.

>>> run = pgsuite.train("ppo", "CartPole", total_steps=50_000, seed=1, **{"algo.clip": 0.1})
>>> run.folder, run.metrics["episode/return"], run.evaluate(episodes=10)["return_mean"]
>>> action = run.policy.act(obs)
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgsuite.errors import UserError
from pgsuite.version import __version__ as __version__

if TYPE_CHECKING:
    from pgsuite.app.api import Run, evaluate, report, train, train_many
    from pgsuite.app.policy_io import Actor
    from pgsuite.envs.make import make
    from pgsuite.trust import Trust

__all__ = ["Run", "UserError", "evaluate", "load", "make", "report", "train", "train_many"]
# Imported when they are first used, so that importing the package stays cheap.
_HOMES = {"make": "pgsuite.envs.make"} | dict.fromkeys(
    ("Run", "evaluate", "report", "train", "train_many"), "pgsuite.app.api"
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(
    run: str | Path, *, deterministic: bool = True, seed: int = 0, device: str = "cpu", trust: Trust = False
) -> Actor:
    """The trained policy of a run directory's newest checkpoint, or of one checkpoint, to act with in any environment
    of the same spaces.

    With ``deterministic=False`` actions are sampled, from ``seed`` on.  Raises ``pgsuite.UserError`` if
    there is no checkpoint, or one that names code from elsewhere than pgsuite, such as a head, unless this user trained
    it, or ``trust`` is true or names those classes or their packages (docs/howto/security.md).
    """
    from pgsuite.app.policy_io import Actor, restore

    return Actor(restore(run, trust=trust), deterministic=deterministic, seed=seed, device=device)
