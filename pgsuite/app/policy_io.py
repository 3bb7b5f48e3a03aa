"""Loading of trained policies from checkpoints, without an environment."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from pgsuite import seeding
from pgsuite.app.build import build_policy, parse_run_config
from pgsuite.envs.spaces import ToSpace, leaves, nested_action, of_data, split, tensor_space, tensors, to_device
from pgsuite.errors import UserError
from pgsuite.nn.policy import Policy
from pgsuite.training import checkpoint
from pgsuite.trust import Source, Trust, source_of, within
from pgsuite.types import ACTION_MASK, PRIVILEGED, HiddenState, Obs


class Interface(nn.Module):
    """Conversion between observations and actions of an environment and tensors of a policy.

    Observations are those of ``observation_space``, which has no entries for the critic only.
    """

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        super().__init__()
        public, apart = split(observation_space)
        seen, mask = tensor_space(observation_space), {k: v for k, v in apart.items() if k == ACTION_MASK}
        # Ordered, since gymnasium sorts the keys of other dictionaries.
        both = OrderedDict({**public, **mask}) if isinstance(public, spaces.Dict) else {}
        self.observation_space = spaces.Dict(both) if both else public
        self.action_space = action_space
        bare = not isinstance(tensor_space(self.observation_space), spaces.Dict)
        self.key = None
        if bare and isinstance(seen, spaces.Dict):  # the policy's only entry of a dictionary
            self.key = next(key for key in seen if key != PRIVILEGED)
        self.action = ToSpace(action_space)

    def read(self, obs: Any, device: torch.device | str = "cpu") -> Obs:
        """A batch of observations as tensors of the policy."""
        found = to_device(tensors(self.observation_space, obs), torch.device(device), torch.float32)
        return found if self.key is None else {self.key: found}


@dataclass
class Restored:
    """A policy from a checkpoint, with its interface and configuration."""

    path: Path
    config: dict[str, Any]
    steps: int
    interface: Interface
    policy: Policy
    source: Source


def restore(run: str | Path, say: Callable[[str], object] = warnings.warn, *, trust: Trust = False) -> Restored:
    """The policy of the newest checkpoint of a run directory, or of a given checkpoint, on the CPU.

    ``say`` is called with a line on each damaged checkpoint that is skipped.  Raises UserError if no undamaged
    checkpoint exists, if it does not fit its own configuration, or if that names classes from elsewhere than pgsuite,
    this user has not trained it, and ``trust`` does not name them.
    """
    path, state = checkpoint.newest(Path(run), say)
    source = source_of(path, state, trust)
    try:
        with within(source):
            return _restore(path, state, source)
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: it is no checkpoint of a run of this version") from error
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit the networks of its own configuration: {reason}") from error


def _restore(path: Path, state: dict[str, Any], source: Source) -> Restored:
    # What watched the training is not needed to act, so it is not even built.
    config = state["config"] | {"callbacks": {}, "loggers": {}}
    settings = parse_run_config(config)
    observation_space, action_space = (of_data(state["spaces"][key]) for key in ("observation", "action"))
    interface = Interface(observation_space, action_space)
    generator = seeding.generator(settings.seed, "networks")
    policy = build_policy(tensor_space(observation_space), action_space, settings, generator)
    policy.load_state_dict(state["algorithm"]["policy"])
    return Restored(path, config, int(state["steps"]), interface, policy.requires_grad_(False).eval(), source)


class Actor:
    """A trained policy that acts on observations of an environment; ``pgsuite.load`` returns one."""

    def __init__(
        self, restored: Restored, *, deterministic: bool = True, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        self.restored, self.deterministic, self.device = restored, deterministic, torch.device(device)
        self.policy, self.interface = restored.policy.to(self.device), restored.interface.to(self.device)
        self.generator = seeding.generator(seed, "acting", self.device)
        self.hidden_state: HiddenState | None = None

    @property
    def observation_space(self) -> spaces.Space[Any]:
        """The space of one observation, without entries for the critic only."""
        return self.interface.observation_space

    @property
    def action_space(self) -> spaces.Space[Any]:
        return self.interface.action_space

    def reset(self, done: Any = None) -> None:
        """Reset the hidden state, in a batch only that of environments where done [N] is true.

        Recurrent policies require it at the start of every episode; it has no effect on others.
        """
        if done is None:
            self.hidden_state = None
        elif self.hidden_state is not None:
            keep = ~torch.as_tensor(done, dtype=torch.bool, device=self.device)
            self.hidden_state = {name: x.where(keep.unsqueeze(-1), 0.0) for name, x in self.hidden_state.items()}

    def act(self, obs: Any) -> Any:
        """The action for one observation, or the actions [N, *A] for a batch [N, *O], as ``env.step`` takes them.

        Arrays and plain numbers give arrays with the dtype of the action space, tensors give tensors on their device.
        Raises ValueError for observations that do not have the shapes of ``observation_space``.
        """
        size, like = self._measure(obs)
        batch = obs if size is not None else _each(lambda x: x[None], obs)
        count = size or 1
        if self.hidden_state is not None and any(len(x) != count for x in self.hidden_state.values()):
            raise ValueError(f"the policy remembers another number of environments than {count}: call reset() first")
        hidden_state = self.hidden_state if self.hidden_state is not None else self.policy.initial_state(count)
        start = torch.zeros(count, dtype=torch.bool, device=self.device)
        seen = self.interface.read(batch, self.device)
        choice = self.policy.act(seen, hidden_state, start, self.generator, deterministic=self.deterministic)
        self.hidden_state = choice.hidden_state
        action = self.interface.action(choice.action)
        action = action.to(like.device) if isinstance(like, Tensor) else action.cpu()

        def part(space: spaces.Space[Any], x: Tensor) -> Any:
            x = x.reshape(-1, *(space.shape or ()))
            x = x if size is not None else x[0]
            return x if isinstance(like, Tensor) else x.numpy().astype(space.dtype)[()]

        return nested_action(self.action_space, action, part)

    def _measure(self, obs: Any) -> tuple[int | None, Any]:
        """The batch size, None for a single observation, and one of the observation's arrays or tensors."""
        sizes: set[int | None] = set()
        like: Any = None
        try:
            parts = list(leaves(self.observation_space, obs))
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"observations must be those of {self.observation_space}: {error} is missing") from error
        for path, space, x in parts:
            like, shape, own = x, tuple(np.shape(x)), tuple(space.shape or ())
            if shape != own and shape[1:] != own:
                where = f"the observation's {path!r}" if path else "the observation"
                raise ValueError(f"{where} must have the shape {own}, or (N, ...) for a batch, got {shape}")
            sizes.add(shape[0] if len(shape) > len(own) else None)
        if len(sizes) != 1:
            raise ValueError(f"the parts of an observation must be of one batch, got sizes {sizes}")
        return sizes.pop(), like


def _each(fn: Any, obs: Any) -> Any:
    """Apply fn to every array or tensor of an observation."""
    if isinstance(obs, dict):
        return {key: _each(fn, x) for key, x in obs.items()}
    if isinstance(obs, tuple):
        return tuple(_each(fn, x) for x in obs)
    return fn(obs if isinstance(obs, Tensor) else np.asarray(obs))
