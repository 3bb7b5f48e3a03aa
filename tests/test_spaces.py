"""Observations and actions of every space that gymnasium has a fixed size for, as tensors and through networks."""

import math
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from toys import build

from pgsuite.algorithms import PPO
from pgsuite.app.build import check_memory
from pgsuite.app.policy_io import Interface
from pgsuite.envs import Gym, make
from pgsuite.envs.spaces import native_action, tensor_space, tensors
from pgsuite.errors import UserError
from pgsuite.nn.heads import make_head
from pgsuite.nn.layers import Convolutions
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.rollout import EpisodeTracker, StepCollector
from pgsuite.testing import check_vector_env, play, random_actions

VECTORS = [
    spaces.Box(-1, 1, (2, 3), np.float32),
    spaces.Box(0, 255, (5,), np.uint8),
    spaces.Box(0, 9, (3, 3, 2), np.uint8),
    spaces.Discrete(4, start=2),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 2]]), start=np.array([[1, 0], [0, 5]])),
    spaces.MultiBinary(3),
    spaces.Dict({"b": spaces.Box(-math.inf, math.inf, (2,)), "a": spaces.Discrete(2)}),
    spaces.Tuple((spaces.Discrete(3), spaces.Dict({"x": spaces.MultiBinary(2)}))),
]


def batch(space: spaces.Space[Any], count: int = 5) -> tuple[list[Any], Any]:
    space.seed(0)
    samples: list[Any] = [space.sample() for _ in range(count)]
    return samples, concatenate(space, samples, create_empty_array(space, n=count))


@pytest.mark.parametrize("space", VECTORS, ids=str)
def test_observations_are_flattened_as_gymnasium_does(space: spaces.Space[Any]) -> None:
    samples, together = batch(space)
    ours = tensors(space, together)
    theirs = np.stack([np.asarray(spaces.flatten(space, sample)) for sample in samples])
    assert ours.shape == (5, *(tensor_space(space).shape or ())) and np.allclose(ours.numpy(), theirs)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((9, 8), lambda x: x[:, None]),
        ((9, 8, 3), lambda x: x.transpose(0, 3, 1, 2)),
        ((3, 9, 8), lambda x: x),
        ((4, 9, 8, 3), lambda x: x.transpose(0, 1, 4, 2, 3).reshape(5, 12, 9, 8)),
        ((4, 3, 9, 8), lambda x: x.reshape(5, 12, 9, 8)),
    ],
)
def test_images_come_channels_first(shape: tuple[int, ...], expected: Any) -> None:
    space = spaces.Box(0, 255, shape, np.uint8)
    _, images = batch(space)
    found, described = tensors(space, images), tensor_space(space)
    assert found.dtype is torch.uint8 and described.dtype == np.uint8
    assert np.array_equal(found.numpy(), expected(images)) and found.shape[1:] == described.shape


ROBOT = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (12, 10, 3), np.uint8),
        "joints": spaces.Box(-1, 1, (4,)),
        "gripper": spaces.Discrete(2),
        "critic_obs": spaces.Box(-1, 1, (6,)),
    }
)


def test_images_vectors_and_what_is_the_critics_stay_apart() -> None:
    _, together = batch(ROBOT)
    obs, space = tensors(ROBOT, together), tensor_space(ROBOT)
    assert isinstance(space, spaces.Dict) and sorted(obs) == sorted(space) == ["camera", "critic_obs", "vector"]
    assert {key: tuple(x.shape[1:]) for key, x in obs.items()} == {key: x.shape for key, x in space.items()}
    assert obs["vector"].shape == (5, 6) and np.array_equal(obs["critic_obs"].numpy(), together["critic_obs"])


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Sequence(spaces.Discrete(2)), "Sequence.* have no fixed size: Box, Discrete, MultiDiscrete"),
        (spaces.Dict({}), "hold nothing that a policy may see"),
        (spaces.Dict({"critic_obs": spaces.Box(-1, 1, (3,))}), "hold nothing that a policy may see"),
        (spaces.Dict({"vector": spaces.Box(0, 255, (8, 8), np.uint8)}), "an image of .* is named 'vector'"),
    ],
)
def test_spaces_that_cannot_be_handled_are_refused_by_name(space: spaces.Space[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tensor_space(space)


ACTIONS = [
    spaces.Box(-2, 2, (3,), np.float32),
    spaces.Box(-1, 1, (2, 2), np.float64),
    spaces.Box(-math.inf, math.inf, (1,), np.float32),
    spaces.Box(0, 3, (2,), np.int64),
    spaces.Box(0, 255, (1, 2), np.uint8),
    spaces.Discrete(3, start=5),
    spaces.MultiDiscrete([2, 3], start=[0, 7]),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 2]])),
    spaces.MultiBinary(4),
    spaces.MultiBinary([2, 3]),
]


@pytest.mark.parametrize("space", ACTIONS, ids=str)
def test_what_a_policy_samples_is_an_action_of_the_space(space: spaces.Space[Any]) -> None:
    """Every discrete action is drawn at some time, and none outside the space."""
    head = make_head(space)
    dist = head(3 * torch.randn(500, head.inputs, generator=torch.Generator().manual_seed(0)))
    dist = dist.detach()
    for action in (dist.sample(torch.Generator().manual_seed(1)), dist.mode()):
        assert dist.log_prob(action).shape == (500,)
        native = native_action(space, action)
        assert all(space.contains(x) for x in native)
    if not isinstance(space, spaces.Box):
        drawn = native_action(space, dist.sample(torch.Generator().manual_seed(2))).reshape(500, -1)
        counts = {spaces.Discrete: [3], spaces.MultiBinary: [2] * drawn.shape[1]}.get(type(space))
        counts = space.nvec.flatten().tolist() if isinstance(space, spaces.MultiDiscrete) else counts
        assert [len(np.unique(column)) for column in drawn.T] == counts


def test_whole_numbers_are_rounded_and_clipped() -> None:
    space, given = spaces.Box(0, 255, (1,), np.uint8), [-3.0, -0.4, 0.6, 1.4, 254.6, 255.4, 300.0]
    actions = torch.tensor(given)[:, None]
    assert native_action(space, actions).flatten().tolist() == [0, 0, 1, 1, 255, 255, 255]
    assert Interface(VECTORS[0], space).action(actions).flatten().tolist() == [0, 0, 1, 1, 255, 255, 255]
    wide = spaces.Box(-(2**31), 2**31 - 1, (1,), np.int32)
    assert native_action(wide, torch.tensor([[1e12], [-1e12], [7.5]])).flatten().tolist() == [2**31 - 1, -(2**31), 8]


@pytest.mark.parametrize("kind", ["squashed", "beta"])
def test_every_whole_number_has_an_equal_share(kind: str) -> None:
    """With the ends as far from the middle of their share as the others."""
    head: Any = make_head(spaces.Box(1, 4, (1,), np.int32), kind)
    assert (head.bounds.low.item(), head.bounds.high.item()) == (0.5, 4.5)


def test_a_huge_discrete_observation_says_what_it_costs() -> None:
    with pytest.raises(ValueError, match=r"one-hot vectors of 10,000,000 numbers, 38 MB each: give features"):
        tensor_space(spaces.Discrete(10_000_000))
    with pytest.raises(ValueError, match="one-hot vectors of 2,000,001 numbers"):
        tensor_space(spaces.Tuple([spaces.MultiDiscrete([2_000_000, 1])]))
    env: Any = SimpleNamespace(
        name="X", observation_space=tensor_space(spaces.Discrete(10**6)), device=torch.device("cpu"), num_envs=10_000
    )
    with pytest.raises(
        UserError, match=r"rollout of 1,000 steps in 10,000 environments has 74,506 GB .* 1,000,000 numb"
    ):
        check_memory(env, 1000)
    env.num_envs = 1
    check_memory(env, 2)


@pytest.mark.parametrize("space", [spaces.Text(3)], ids=str)
def test_actions_without_a_distribution_are_refused_by_name(space: spaces.Space[Any]) -> None:
    with pytest.raises(ValueError, match=r"no policy for actions .*: Box, Discrete, MultiDiscrete"):
        make_head(space)


def networks(space: spaces.Space[Any]) -> tuple[Policy, Critic]:
    norm = Standardize(tensor_space(space))
    generator = torch.Generator().manual_seed(0)
    policy = Policy(norm, spaces.Discrete(3), hidden=(8,), activation="elu", generator=generator)
    return policy, Critic(norm, hidden=(8,), activation="elu", generator=generator)


def influence(network: Any, obs: dict[str, Any], key: str) -> float:
    """How much a network's numbers change with one part of the observation."""
    before = network.body.encode(obs)
    return float((network.body.encode(obs | {key: obs[key].flip(0)}) - before).detach().abs().max())


def test_the_critic_sees_its_own_part_and_the_policy_the_rest() -> None:
    policy, critic = networks(ROBOT)
    obs = tensors(ROBOT, batch(ROBOT)[1])
    for network, seen in ((policy, ("camera", "vector")), (critic, ("critic_obs",))):
        for key in obs:
            assert (influence(network, obs, key) > 0) == (key in seen)


def test_without_a_part_of_its_own_the_critic_sees_everything() -> None:
    space = spaces.Dict({key: ROBOT[key] for key in ("camera", "joints")})
    obs = tensors(space, batch(space)[1])
    for network in networks(space):
        assert all(influence(network, obs, key) > 0 for key in obs)


def test_vectors_and_small_images_are_standardized() -> None:
    norm, obs = Standardize(tensor_space(ROBOT)), tensors(ROBOT, batch(ROBOT, 200)[1])
    norm.update(obs, torch.ones(200, dtype=torch.bool))
    seen = norm(obs)
    for key in ("vector", "critic_obs", "camera"):
        assert seen[key].mean(0).abs().max() < 1e-4 and (seen[key].std(0, correction=0) - 1).abs().max() < 1e-2


def test_screens_stay_bytes_which_convolutions_scale() -> None:
    """Bytes are divided by 255, and what was standardized is not."""
    space: Any = spaces.Box(0, 255, (1, 36, 40), np.uint8)
    norm, screens = Standardize(space), torch.randint(0, 256, (3, 1, 36, 40), dtype=torch.uint8)
    norm.update(screens, torch.ones(3, dtype=torch.bool))
    assert norm(screens) is screens
    net = Convolutions((1, 36, 40), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(net(screens), net(screens.float() / 255), atol=1e-6)


def test_convolutions_see_every_pixel_whatever_the_leading_dims() -> None:
    net = Convolutions((3, 40, 44), generator=torch.Generator().manual_seed(0))
    images = torch.randint(0, 256, (2, 3, 3, 40, 44), dtype=torch.uint8)
    features = net(images)
    assert features.shape == (2, 3, net.size)
    assert torch.allclose(features.flatten(0, 1), net(images.flatten(0, 1)), atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[8, 5, 1]], r"convolutions too large for images \(1, 4, 9\): a kernel of 5"),
        ([[8, 5]], r"convolutions must each be \[channels, kernel, stride\], got \[8, 5\]"),
    ],
)
def test_convolutions_that_do_not_fit_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Convolutions((1, 4, 9), layers)


class Signal(gymnasium.Env[Any, Any]):
    """One of four numbers is shown, in the way that the space says; the action that names it is paid one.

    Random actions are paid 0.25, of either kind.
    """

    def __init__(self, shown: str, action: str = "discrete", leader: bool = False) -> None:
        kinds: dict[str, spaces.Space[Any]] = {
            "image": spaces.Box(0, 255, (8, 8, 3), np.uint8),
            "dict": spaces.Dict({"eye": spaces.Box(0, 255, (8, 8), np.uint8), "bits": spaces.MultiBinary(1)}),
            "number": spaces.Discrete(4),
        }
        actions = {
            "discrete": spaces.Discrete(4),
            "multidiscrete": spaces.MultiDiscrete([2, 2]),
            "multibinary": spaces.MultiBinary(2),
        }
        self.shown, self.observation_space, self.action_space = shown, kinds[shown], actions[action]
        self.t = self.number = 0

    def show(self) -> Any:
        self.number = int(self.np_random.integers(4))
        if self.shown == "number":
            return self.number
        image = np.zeros((8, 8, 3), np.uint8)
        high, right = divmod(self.number, 2)
        if self.shown == "image":
            image[4 * high : 4 * high + 4, 4 * right : 4 * right + 4] = 255
            return image
        return {"eye": np.full((8, 8), 255 * high, np.uint8), "bits": np.array([right], np.int8)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        named = int(action) if np.ndim(action) == 0 else 2 * int(action[0]) + int(action[1])
        reward, self.t = float(named == self.number), self.t + 1
        return self.show(), reward, False, self.t == 20, {}


gymnasium.register("Signal-v0", Signal)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("shown", "action"),
    [
        ("image", "discrete"),
        ("dict", "discrete"),
        ("number", "multidiscrete"),
        ("number", "multibinary"),
    ],
)
def test_ppo_learns_what_is_shown_in_any_way(shown: str, action: str) -> None:
    """A random policy is paid 5 an episode and the best 20."""
    world = Gym(id="Signal-v0", import_="test_spaces", options={"shown": shown, "action": action})
    env = make(world, 8)
    algorithm = build(PPO, env, lr=5e-3, epochs=4, gamma=0.5, convolutions=[[8, 4, 4]])
    rollouts, tracker = StepCollector(env, 40), EpisodeTracker(8, env.device)
    returns = []
    for _ in range(25):
        algorithm.iterate(rollouts)
        returns.append(tracker.finished_episodes(rollouts.buffer.read())[0].mean().item())
    assert returns[0] < 8 and returns[-1] > 16


@pytest.mark.parametrize("shown", ["image", "dict"])
def test_images_and_dictionaries_keep_the_contract(shown: str) -> None:
    world = Gym(id="Signal-v0", import_="test_spaces", options={"shown": shown})
    check_vector_env(lambda seed: make(world, 3, seed=seed), steps=50)


def test_dictionaries_come_from_workers_as_from_this_process() -> None:
    worlds = [Gym(id="Signal-v0", import_="test_spaces", options={"shown": "dict"}, workers=n) for n in (0, 1)]
    envs = [make(world, 3) for world in worlds]
    for here, there in zip(*(play(env, random_actions(env, 30)) for env in envs), strict=True):
        for key in ("eye", "vector"):
            assert torch.equal(here.obs[key], there.obs[key]) and torch.equal(here.next_obs[key], there.next_obs[key])
