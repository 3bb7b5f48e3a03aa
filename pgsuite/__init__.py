"""Policy gradient methods in PyTorch: REINFORCE, A2C, NPG, TRPO and PPO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgsuite.app.policy_io import Actor

__version__ = "0.1.0"


def load(run: str | Path, *, deterministic: bool = True, seed: int = 0, device: str = "cpu") -> Actor:
    """The trained policy of a run directory's newest checkpoint, or of one checkpoint, to act with in any environment
    of the same spaces.

    With ``deterministic=False`` actions are sampled, from ``seed`` on.  Raises ``pgsuite.errors.UserError`` if
    there is no checkpoint, or none that can be trusted: nothing in it is ever executed.
    """
    from pgsuite.app.policy_io import Actor, restore  # here, so that importing the package stays cheap

    return Actor(restore(run), deterministic=deterministic, seed=seed, device=device)
