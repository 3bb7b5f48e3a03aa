"""Files of recorded episodes: our own, which ``evaluate record=`` writes, and those of Minari datasets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from pgsuite.envs import VectorEnv
from pgsuite.envs.spaces import first_action, is_joined, leaves, tensors, to_device
from pgsuite.errors import UserError, install
from pgsuite.files import replacing
from pgsuite.rollout import Demonstrations
from pgsuite.types import Obs, Step

OBSERVATIONS = "observations"


class Recording:
    """The steps of episodes, one in each environment, for a file.

    The arrays of the file hold the steps of all episodes, one after the other: ``observations`` [L, *O] as the policy
    sees them, or ``observations/<entry>`` of each entry; ``actions`` [L, *A] as the policy chose them, before they are
    clipped to a Box; ``rewards``, ``terminations`` and ``truncations`` [L].
    """

    def __init__(self, path: str) -> None:
        """Raises UserError if there is no directory for the file."""
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise UserError(f"record={path}: there is no directory {self.path.parent}")
        self.rows: list[dict[str, np.ndarray]] = []

    def __call__(self, obs: Obs, action: Tensor, step: Step, live: Tensor) -> None:
        row = {"actions": action, "rewards": step.reward, "terminations": step.terminated, "live": live}
        row |= {"truncations": step.truncated} | dict(named(obs))
        self.rows.append({name: x.cpu().numpy().copy() for name, x in row.items()})

    def write(self) -> None:
        """Write the file.  Raises UserError if that is not possible; a former file is then intact."""
        columns = {name: np.stack([row[name] for row in self.rows], 1) for name in self.rows[0]}  # [N, T, ...]
        live = columns.pop("live")
        last = live & ~np.roll(live, -1, 1)
        last[:, -1] |= live[:, -1]
        columns["truncations"] |= last & ~columns["terminations"]  # episodes that were cut
        try:
            with replacing(self.path) as temporary:
                np.savez_compressed(temporary, allow_pickle=False, **{name: x[live] for name, x in columns.items()})
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error


def named(obs: Obs, name: str = OBSERVATIONS) -> Iterator[tuple[str, Any]]:
    """The tensors of observations, or the parts of a space, by the names of their arrays."""
    if isinstance(obs, dict | spaces.Dict):
        for key, x in obs.items():
            yield from named(x, f"{name}/{key}")
    else:
        yield name, obs


def load(path: str, env: VectorEnv) -> Demonstrations:
    """The demonstrations of a file, as tensors of a policy in the environments.  Raises UserError for a file that
    cannot be read, or whose episodes are not of such environments."""
    where = f"demonstrations={path}"
    if not Path(path).is_file():
        raise UserError(f"{where}: no such file")
    try:
        read = _read_minari if Path(path).suffix in (".hdf5", ".h5") else _read
        obs, action, done = read(path, env)
    except UserError:
        raise
    except Exception as error:  # a crafted file can cause any exception
        raise UserError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
    size = () if isinstance(env.action_space, spaces.Discrete) else (_numbers(env.action_space),)
    found = [(name, tuple(part.shape or ())) for name, part in named(env.observation_space)] + [("actions", size)]
    arrays = [x for _, x in named(obs)] + [action]
    for (name, wanted), x in zip(found, arrays, strict=True):
        if tuple(x.shape[1:]) != wanted:
            raise UserError(f"{where}: {name} have the shape {tuple(x.shape[1:])}, and those of {env.name} {wanted}")
        if not len(x) == len(done) > 0:
            raise UserError(f"{where}: there are {len(done)} steps, and {len(x)} {name}")
        if not bool(x.isfinite().all()):
            raise UserError(f"{where}: not all {name} are finite")
    real = isinstance(env.action_space, spaces.Box) or is_joined(env.action_space)
    action = action.float() if real else action.long()
    if not real and not bool(((action >= 0) & (action < (counts := _counts(env.action_space)))).all()):
        raise UserError(f"{where}: actions must be from 0 to {(counts - 1).tolist()}")
    start = torch.cat([torch.ones(1, dtype=torch.bool), done[:-1]])
    return Demonstrations(to_device(obs, torch.device("cpu"), torch.float32), action, start)


def _counts(space: spaces.Space[Any]) -> Tensor:
    """The number of values of a discrete action, or of each of its components [A]."""
    if isinstance(space, spaces.Discrete):
        return torch.tensor(int(space.n))
    counts = space.nvec if isinstance(space, spaces.MultiDiscrete) else np.full(space.shape or (), 2)
    return torch.from_numpy(np.asarray(counts, np.int64).reshape(-1))


def _numbers(space: spaces.Space[Any]) -> int:
    return sum(math.prod(part.shape or ()) for _, part, _ in leaves(space))


def _read(path: str, env: VectorEnv) -> tuple[Obs, Tensor, Tensor]:
    """Observations, actions and ends of episodes of a file of ``Recording``."""
    with np.load(path, allow_pickle=False) as file:

        def nested(space: spaces.Space[Any], name: str) -> Obs:
            if isinstance(space, spaces.Dict):
                return {key: nested(part, f"{name}/{key}") for key, part in space.items()}
            return torch.from_numpy(file[name])

        done = file["terminations"] | file["truncations"]
        return nested(env.observation_space, OBSERVATIONS), torch.from_numpy(file["actions"]), torch.from_numpy(done)


def _read_minari(path: str, env: VectorEnv) -> tuple[Obs, Tensor, Tensor]:
    """The same of a Minari dataset, whose episodes have one observation more than actions."""
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"files of Minari need h5py: {install('minari')}") from error
    space = getattr(env, "space", env.observation_space)
    if is_joined(env.action_space):
        raise UserError(f"demonstrations={path}: actions of Minari that are dictionaries or tuples are not read")

    def nested(space: spaces.Space[Any], group: Any, steps: int) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: nested(part, group[key], steps) for key, part in space.items()}
        if isinstance(space, spaces.Tuple):
            return tuple(nested(part, group[f"_index_{i}"], steps) for i, part in enumerate(space))
        return group[:steps]

    found: list[tuple[Obs, Tensor, Tensor]] = []
    with h5py.File(path) as file:
        for name in sorted(map(str, file), key=lambda name: int(name.removeprefix("episode_"))):
            episode: Any = file[name]
            actions = episode["actions"][:]
            obs = tensors(space, nested(space, episode[OBSERVATIONS], len(actions)))
            action = torch.from_numpy(actions - first_action(env.action_space))
            shape = (len(action), _numbers(env.action_space)) if env.action_space.shape else (len(action),)
            done = torch.zeros(len(action), dtype=torch.bool)
            done[-1:] = True
            found.append((obs, action.reshape(shape), done))
    parts, actions, ends = zip(*found, strict=True)
    return _joined(parts), torch.cat(actions), torch.cat(ends)


def _joined(parts: Any) -> Obs:
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    return torch.cat(parts)
