"""Actions of several kinds at once: dictionaries and tuples of spaces."""

import itertools
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_cli import Cli, command  # noqa: F401
from toys import ALL, BRIEF, build, collector, mostly_long

import pgsuite
from pgsuite.algorithms import PPO
from pgsuite.envs import Gym, make
from pgsuite.envs.spaces import ToSpace, joined_action, leaves, native_action, nested_action
from pgsuite.envs.torch_env import TorchNativeEnv
from pgsuite.nn.distributions import Bernoulli, Categorical, Gaussian
from pgsuite.nn.heads import make_head
from pgsuite.rollout import StepCollector

KNOBS = spaces.Dict({"choice": spaces.Discrete(3, start=1), "dial": spaces.Box(0.0, 10.0, (2,))})
PARTS = spaces.Tuple([KNOBS, spaces.MultiBinary(2), spaces.MultiDiscrete([2, 3], start=[5, 0])])


class Panel(gymnasium.Env[Any, Any]):
    """A lamp says which button to press, and a number where to turn both dials.  Right buttons pay one, and dials cost
    their distance: at best one a step, and about -2.8 for random actions."""

    def __init__(self, masked: bool = False) -> None:
        self.action_space, self.masked = KNOBS, masked
        own: dict[str, Any] = {"lamp": spaces.Discrete(3), "number": spaces.Box(0.0, 10.0, (1,))}
        mask: dict[str, Any] = {"action_mask": spaces.MultiBinary(5)} if masked else {}
        self.observation_space = spaces.Dict(own | mask)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.clock = 0
        return self.look(), {}

    def look(self) -> dict[str, Any]:
        self.lamp, self.number = int(self.np_random.integers(3)), self.np_random.uniform(2, 8, 1).astype(np.float32)
        only = np.array([*(i == self.lamp for i in range(3)), 0, 0], np.int8)
        return {"lamp": self.lamp, "number": self.number} | ({"action_mask": only} if self.masked else {})

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        right = action["choice"] == self.lamp + 1
        assert right or not self.masked
        self.clock += 1
        reward = float(right) - float(np.abs(action["dial"] - self.number).mean())
        return self.look(), reward, False, self.clock == 5, {}


for name, masked in (("Panel-v0", False), ("MaskedPanel-v0", True)):
    if name not in gymnasium.registry:
        gymnasium.register(name, "test_joined:Panel", max_episode_steps=5, kwargs={"masked": masked})


def panel(count: int = 8, seed: int = 0, masked: bool = False) -> Any:
    return make(Gym(id="MaskedPanel-v0" if masked else "Panel-v0"), count, seed=seed)


def test_what_is_joined_is_the_sum_of_its_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    head = make_head(PARTS, log_sigma=-1.0)
    assert head.inputs == 3 + 2 + 2 + 5
    new, old = (torch.randn(4, head.inputs, generator=generator) for _ in range(2))
    mask = torch.ones(4, head.inputs, dtype=torch.bool)
    mask[:, [0, 5, 8]] = False  # the first choice, one lamp, and 1 of {0, 1}; all flattened, in order
    joined: Any = head(new, mask)
    choice, dial, lamps, *switches = (
        Categorical(new[:, :3].masked_fill(~mask[:, :3], -1e8).log_softmax(-1)),
        Gaussian(5 + 5 * new[:, 3:5], torch.full((2,), -1.0) + np.log(5)),
        Bernoulli(new[:, 5:7].masked_fill(~mask[:, 5:7], -1e8)),
        Categorical(new[:, 7:9].masked_fill(~mask[:, 7:9], -1e8).log_softmax(-1)),
        Categorical(new[:, 9:].log_softmax(-1)),
    )
    parts: list[Any] = [choice, dial, lamps, *switches]
    draws = [joined.sample(generator) for _ in range(200)]
    assert all(bool((x[:, 0] > 0).all() and (x[:, 3] == 0).all() and (x[:, 5] == 0).all()) for x in draws)
    action = draws[0].detach()
    assert action.shape == (4, 7)
    numbers = [action[:, 0].long(), action[:, 1:3], action[:, 3:5], action[:, 5].long(), action[:, 6].long()]
    expected = sum(part.log_prob(x) for part, x in zip(parts, numbers, strict=True))
    torch.testing.assert_close(joined.log_prob(action), expected)
    torch.testing.assert_close(joined.entropy(), sum(part.entropy() for part in parts))
    modes = [part.mode().float() for part in parts]
    torch.testing.assert_close(joined.mode(), torch.cat([x if x.ndim == 2 else x[:, None] for x in modes], -1))
    before: Any = head(old)
    kl = Categorical(old[:, :3].log_softmax(-1)).kl(choice) + Gaussian(5 + 5 * old[:, 3:5], dial.log_sigma).kl(dial)
    kl = kl + Bernoulli(old[:, 5:7]).kl(lamps)
    for part, columns in zip(switches, (slice(7, 9), slice(9, None)), strict=True):
        kl = kl + Categorical(old[:, columns].log_softmax(-1)).kl(part)
    torch.testing.assert_close(before.kl(joined), kl)
    assert not joined.detach().log_prob(action).requires_grad and joined.log_prob(action).requires_grad
    assert head.metrics(action, torch.ones(4, dtype=torch.bool))["0.dial.sigma"] == pytest.approx(np.exp(-1))


def test_options_are_those_of_boxes() -> None:
    head: Any = make_head(PARTS, "beta")
    kinds = [type(x).__name__.removesuffix("Head") for x in head.heads]
    assert kinds == ["Categorical", "Beta", "Bernoulli", "MultiCategorical"]
    lamps = spaces.Tuple([spaces.MultiBinary(2), spaces.Discrete(2)])
    with pytest.raises(ValueError, match=r"policy.log_sigma is for Gaussian policies, and this one is bernoulli"):
        make_head(lamps, log_sigma=-1.0)
    with pytest.raises(ValueError, match=r"no policy for actions Dict\(\), which have no parts"):
        make_head(spaces.Dict({}))
    alike = spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)}), "a.b": spaces.Discrete(3)})
    assert make_head(alike).inputs == 5  # no part is lost for its name
    with pytest.raises(ValueError, match="no policy for actions Text"):
        make_head(spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Text(3)}))


def test_actions_are_elements_of_their_space_and_back() -> None:
    PARTS.seed(0)
    samples = [PARTS.sample() for _ in range(5)]
    action = torch.stack([joined_action(PARTS, x) for x in samples])
    native = native_action(PARTS, action)
    for i, sample in enumerate(samples):
        mine = nested_action(PARTS, action[i : i + 1], lambda space, x: native_action(space, x)[0])
        assert PARTS.contains(mine)
        for (path, _, x), (_, _, y), (_, _, z) in zip(
            leaves(PARTS, sample), leaves(PARTS, mine), leaves(PARTS, native), strict=True
        ):
            assert np.array_equal(x, y) and np.array_equal(x, z[i]), path
    far = action + torch.tensor([0, 100.0, -100.0, 0, 0, 0, 0])
    assert native_action(PARTS, far)[0]["dial"].tolist() == [[10.0, 0.0]] * 5
    shown = ToSpace(PARTS)(far)
    assert shown[:, 1:3].tolist() == [[10.0, 0.0]] * 5 and torch.equal(shown[:, 0], action[:, 0] + 1)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("kind", mostly_long(["none", "gru"], "none"))
def test_every_method_trains_on_them(cls: Any, kind: Any) -> None:
    env = panel(masked=True)
    recurrent: dict[str, Any] = {"look": {"recurrent": kind, "recurrent_size": 8}, "recurrent": kind}
    algorithm = build(cls, env, **BRIEF[cls], **recurrent)
    rollouts = collector(algorithm, env)
    before = torch.cat([x.flatten() for x in algorithm.policy.parameters()])
    algorithm.iterate(rollouts)
    metrics = algorithm.iterate(rollouts)
    after = torch.cat([x.flatten() for x in algorithm.policy.parameters()])
    assert all(x.isfinite() for x in metrics.values()) and not torch.equal(before, after)
    assert {"dial.sigma", "dial.action_clip_fraction"} <= metrics.keys()


@pytest.mark.long
def test_a_task_that_needs_both_kinds_is_solved() -> None:
    """Mean reward of a step over a rollout: -2.5 to -3.5 untrained, one at best; above 0.5 for seeds 0 to 4."""
    env = panel(32, seed=1)
    algorithm = build(PPO, env, hidden=(32,), lr=3e-3, epochs=4, minibatches=4)
    rollouts = StepCollector(env, 16)
    first = float(rollouts.collect(algorithm.policy).reward.mean())
    for _ in range(60):
        algorithm.iterate(rollouts)
    last = float(rollouts.collect(algorithm.policy).reward.mean())
    assert first < -1.5 and last > 0.3, (first, last)


def test_a_run_trains_is_loaded_and_exported(command: Cli) -> None:  # noqa: F811
    sizes = ["num_envs=4", "horizon=8", "total_steps=64", "algo.epochs=1", "algo.minibatches=1", "hydra.run.dir=run"]
    code, _, err = command("train", "env=gym", "env.id=Panel-v0", "env.import=test_joined", *sizes)
    assert code == 0, err
    actor = pgsuite.load(command.folder / "run")
    env = gymnasium.make("Panel-v0")
    obs, _ = env.reset(seed=0)
    action = actor.act(obs)
    assert KNOBS.contains(action)
    many = actor.act({"lamp": np.array([0, 1]), "number": np.ones((2, 1), np.float32)})
    assert many["choice"].shape == (2,) and many["dial"].shape == (2, 2)
    code, out, err = command("evaluate", "run=run", "episodes=2")
    assert code == 0, err
    code, out, err = command("export", "run=run", "format=torch")
    assert code == 0 and "largest difference" in out, err


class TorchPanel:
    """In torch: says what it was given."""

    single_observation_space, single_action_space = spaces.Box(-1.0, 1.0, (1,)), PARTS
    num_envs, device, max_episode_length = 3, "cpu", 9

    def reset(self, **_: Any) -> Any:
        return torch.zeros(3, 1), {}

    def step(self, action: Any) -> Any:
        self.given = action
        return torch.zeros(3, 1), torch.zeros(3), torch.zeros(3), torch.zeros(3), {"final_obs": torch.zeros(3, 1)}


def test_environments_in_torch_are_given_tensors_nested_as_their_space() -> None:
    world = TorchPanel()
    env = TorchNativeEnv(world, name="panel", device=torch.device("cpu"))
    env.reset()
    env.step(torch.tensor([[2.0, 11, 3, 0, 1, 1, 2]] * 3))
    knobs, lamps, switches = world.given
    assert knobs["choice"].tolist() == [3] * 3 and knobs["dial"].tolist() == [[10.0, 3.0]] * 3
    assert lamps.tolist() == [[0, 1]] * 3 and switches.tolist() == [[6, 2]] * 3
    whole = itertools.chain([knobs["choice"]], [lamps, switches])
    assert not any(x.is_floating_point() for x in whole)
