"""Environments on the host give networks on a device what they give networks on the host, in one copy each way.

Without a GPU, a link that takes the CPU for a device makes all of the copies that it would make for one.
"""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from toys import mostly_long

from pgsuite.envs import Gym, make
from pgsuite.envs.envpool_env import EnvPool
from pgsuite.transfer import HostLink
from pgsuite.types import Step, leaves

PARTS: dict[str, Any] = {
    "bools": torch.tensor([True, False, True]),
    "bytes": torch.arange(30, dtype=torch.uint8).reshape(1, 2, 3, 5),
    "inner": {"doubles": torch.linspace(0, 1, 7, dtype=torch.float64), "none": torch.zeros(3, 0)},
    "floats": torch.randn(3, 4),
    "whole": torch.tensor(2**40),
    "halves": torch.ones(3, dtype=torch.bfloat16),
    "columns": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
}


class Link(HostLink):
    """Takes the CPU for a device, and counts what passes."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.local = False
        self.down = self.up = 0

    def to_host(self, x: Tensor) -> Tensor:
        self.down += 1
        return super().to_host(x)

    def to_device(self, obs: Any) -> Any:
        self.up += 1
        return super().to_device(obs)


def same(x: Any, y: Any) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_what_arrives_is_what_was_sent_in_new_memory() -> None:
    link = Link()
    first = link.to_device(PARTS)
    same(first, PARTS)
    second = link.to_device({"other": torch.full((200,), 7.0)})  # into more memory, and
    third = link.to_device({"floats": torch.full((3, 4), 9.0)})  # into the same again
    same(first, PARTS)
    assert (second["other"] == 7).all() and (third["floats"] == 9).all()


def test_what_occurs_twice_is_copied_once() -> None:
    link, obs = Link(), torch.randn(1000, 8)
    flags = torch.zeros(1000, dtype=torch.bool)
    step = link.step_to_device(Step(obs, obs, torch.ones(1000), flags, flags))
    assert step.obs is not obs and step.obs.data_ptr() == step.next_obs.data_ptr() and step.mask is None
    assert len(link.outgoing) < 1.2 * obs.nbytes


def test_actions_arrive_on_the_host() -> None:
    link = Link()
    for action in (torch.randn(4, 3), torch.arange(4), torch.randn(6, 2, dtype=torch.float64).T):
        same(link.to_host(action), action)


class Rich(gymnasium.Env[Any, Any]):
    """Observes an image and numbers, masks actions, and ends after a few steps."""

    observation_space = spaces.Dict(
        camera=spaces.Box(0, 255, (8, 8, 3), np.uint8),
        place=spaces.Box(-9, 9, (3,), np.float64),
        action_mask=spaces.MultiBinary(4),
    )
    action_space = spaces.Discrete(4)

    def look(self) -> dict[str, Any]:
        mask = self.np_random.random(4) < 0.5
        mask[0] = True
        camera = self.np_random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return {"camera": camera, "place": self.np_random.normal(size=3), "action_mask": mask.astype(np.int8)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.look(), {}

    def step(self, action: Any) -> Any:
        return self.look(), float(action), bool(self.np_random.random() < 0.3), bool(self.np_random.random() < 0.1), {}


gymnasium.register("Rich-v0", Rich)  # pyright: ignore[reportArgumentType]
WORLDS: dict[str, Any] = {
    "MuJoCo's batch": lambda: make("HalfCheetah", 4, max_episode_steps=5, seed=3),
    "MuJoCo's batch, falling": lambda: make("Hopper", 4, max_episode_steps=30, seed=3),
    "gymnasium": lambda: make(Gym(id="CartPole-v1"), 4, seed=3),
    "gymnasium, of many parts": lambda: make(Gym(id="Rich-v0"), 4, seed=3),
    "gymnasium, next step": lambda: make(Gym(id="CartPole-v1", native=True), 4, seed=3),
    "envpool": lambda: make(pool(), 4, seed=3),
}


def pool() -> Any:
    pytest.importorskip("envpool")
    return EnvPool(id="CartPole-v1")


@pytest.mark.parametrize("name", mostly_long(list(WORLDS), *list(WORLDS)[::2]))
def test_environments_on_the_host_step_with_one_copy_each_way(name: str) -> None:
    """With a host's and with a device's tensors, they play the same."""
    near, far = WORLDS[name](), WORLDS[name]()
    far.link = link = Link()
    same(far.reset(), near.reset())
    assert (link.down, link.up) == (0, 1)
    generator, ended = torch.Generator().manual_seed(0), 0
    box = isinstance(near.action_space, spaces.Box)
    for t in range(1, 40):
        shape = (4, *near.action_space.shape)
        action = torch.randn(shape, generator=generator) if box else torch.randint(0, 2, (4,), generator=generator)
        mine, theirs = far.step(action), near.step(action)
        same([x for x in mine if x is not None], [x for x in theirs if x is not None])
        kept = {x.untyped_storage().data_ptr() for part in mine if part is not None for x in leaves(part)}
        assert len(kept) == 1 and (link.down, link.up) == (t, t + 1)
        ended += int(mine.done.sum())
    assert ended
