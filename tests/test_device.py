"""Whole iterations on a device that is not the CPU read nothing but what they end with, and use nothing on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import fake_device
import numpy as np
import pytest
import torch
from fake_device import on_fake_device
from gymnasium import spaces
from lm_worlds import Letters, speaker, vowels
from torch import Tensor
from torch_worlds import IsaacPoints
from toys import ALL, mostly_long

from pgsuite import seeding
from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, PPOPenalty, Reinforce
from pgsuite.algorithms.estimators import GRPO, RLOO, MonteCarlo, NStep, TDLambda, VTrace
from pgsuite.algorithms.reference import Reference
from pgsuite.envs import TorchNativeEnv, make
from pgsuite.nn.configs import CriticConfig, MLPPolicyConfig
from pgsuite.nn.normalize import RewardScale, Standardize, WhitenReward
from pgsuite.nn.policy import Critic, Policy
from pgsuite.nn.transformer import Transformer
from pgsuite.rlhf import pretraining
from pgsuite.rlhf.env import LanguageEnv
from pgsuite.rlhf.model import WordModel
from pgsuite.rlhf.reward import Judge, RewardModel
from pgsuite.rlhf.tokens import Vocabulary
from pgsuite.rollout import Collector, EpisodeCollector, OverlappedCollector
from pgsuite.training.trainer import Trainer
from pgsuite.types import ACTION_MASK, Batch, Metrics, Obs, Step, map_obs

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
ENVS, HORIZON = 4, 2
VECTOR: spaces.Space[Any] = spaces.Box(-9, 9, (3,))
IMAGE: spaces.Space[Any] = spaces.Box(0, 255, (1, 6, 6), "uint8")  # pyright: ignore[reportArgumentType, reportCallIssue]
ARM: spaces.Space[Any] = spaces.Box(-2, 1, (2,))
PARTS: spaces.Space[Any] = spaces.Dict(a=VECTOR, b=IMAGE, critic_obs=VECTOR)
FORBIDDING: spaces.Space[Any] = spaces.Dict({"a": VECTOR, ACTION_MASK: spaces.MultiBinary(3)})


class World:
    """Noise to observe, of any space, and noise for every action."""

    name = backend = description = "noise"
    is_resumable, max_episode_steps = True, HORIZON

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.num_envs, self.device = ENVS, fake_device.device()
        self.generator = seeding.generator(0, "environment", self.device)

    def observe(self, space: spaces.Space[Any]) -> Obs:
        if isinstance(space, spaces.Dict):
            return {key: self.observe(part) for key, part in space.items()}
        noise = torch.rand(ENVS, *(space.shape or ()), device=self.device, generator=self.generator)
        if isinstance(space, spaces.MultiBinary):
            return noise > 0.1
        return (255 * noise).to(torch.uint8) if space.dtype == "uint8" else noise

    def reset(self) -> Obs:
        return self.observe(self.observation_space)

    def step(self, action: Tensor) -> Step:
        obs, (reward, end) = self.reset(), torch.rand(2, ENVS, device=self.device, generator=self.generator)
        return Step(obs, map_obs(torch.clone, obs), reward, end < 0.1, end > 0.9)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prompts(LanguageEnv):
    """Prompts and scores have arrived from the host, where strings are."""

    def prompts(self) -> tuple[Tensor, Tensor]:
        drawn = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        return self.encoded.index_select(1, drawn), self.real.index_select(1, drawn)

    def score(self, tokens: Tensor, written: Tensor) -> Tensor:
        return torch.zeros_like(written, dtype=self.dtype)


REGRESSION = {"critic_epochs": 1, "critic_minibatches": 2}
TRUST = REGRESSION | {"cg_iters": 1}
SMALL: dict[type[Algorithm], dict[str, Any]] = {  # and reading nothing
    Reinforce: REGRESSION,
    PPO: {"epochs": 1, "minibatches": 2},
    PPOPenalty: {"epochs": 1, "minibatches": 2},
    NPG: TRUST,
    TRPO: TRUST | {"max_backtracks": 2, "backtracking": "batched"},
}


def trainer(
    cls: type[Algorithm],
    env: Any,
    policy: dict[str, Any] | None = None,
    critic: dict[str, Any] | None = None,
    scale: type[RewardScale] | None = RewardScale,
    reference: dict[str, Any] | None = None,
    poll: int = HORIZON,
    overlap: bool = False,
    **settings: Any,
) -> Trainer:
    """As ``app.build`` makes one: networks on the CPU, which then move, and the rest on the device."""
    with fake_device.values():
        networks = speaking(env, critic or {}) if env.name == "rlhf" else acting(env, policy or {}, critic or {})
        rewards = None if scale is None else scale(env.num_envs)
        frozen = None if reference is None else Reference(networks[0], **reference)
    fake_device.place(*networks, rewards, frozen)
    algorithm = cls(
        policy=networks[0],
        critic=networks[1],  # pyright: ignore[reportCallIssue]
        reward_scale=rewards,
        reference=frozen,
        generator=seeding.generator(0, "minibatches", env.device),
        **SMALL.get(cls, {}) | settings,
    )
    collector: Collector = getattr(env, "collector", algorithm.collector)(env, env.max_episode_steps)
    if isinstance(collector, EpisodeCollector):
        collector.poll = poll
    if overlap:
        collector.state_dict = dict  # what a checkpoint needs, generators' states on the CPU among it
        collector = OverlappedCollector(collector, algorithm.policy)
        collector.thread = AtOnce()  # pyright: ignore[reportAttributeAccessIssue]
    return Trainer(algorithm, collector, 100)


def acting(env: Any, policy: dict[str, Any], critic: dict[str, Any]) -> tuple[Policy, Critic]:
    settings = MLPPolicyConfig(hidden=[8], recurrent_size=4, **policy)
    generator = seeding.generator(0, "networks")
    actor = settings.build(Standardize(env.observation_space), env.action_space, generator)
    other = CriticConfig(hidden=[8], recurrent_size=4, **critic).like(settings)
    return actor, other.build(actor, env.num_envs, generator)


def speaking(env: Any, critic: dict[str, Any]) -> tuple[Policy, Critic]:
    actor = speaker(len(env.tokens), layers=1, top_p=0.9, temperature=0.8)
    return actor, CriticConfig(**critic).build(actor, env.num_envs, seeding.generator(0, "networks"))


class AtOnce:
    """A thread that is none: modes of torch are of one thread."""

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*args))
        return future


def iterate(run: Trainer, times: int = 2) -> None:
    """Iterations with nothing read but what they end with."""
    for _ in range(times):
        with fake_device.until(run.pack_host_data):
            run.iterate()


ACTIONS: dict[str, tuple[spaces.Space[Any], dict[str, Any]]] = {
    "gaussian": (ARM, {}),
    "squashed": (ARM, {"distribution": "squashed"}),
    "beta": (ARM, {"distribution": "beta"}),
    "categorical": (spaces.Discrete(3), {}),
    "multicategorical": (spaces.MultiDiscrete([2, 3]), {}),
    "bernoulli": (spaces.MultiBinary(2), {}),
    "gaussian by state": (ARM, {"sigma": "state"}),
}
BODIES: dict[str, tuple[spaces.Space[Any], dict[str, Any]]] = {
    "perceptron": (VECTOR, {}),
    "gru": (VECTOR, {"recurrent": "gru"}),
    "convolutions": (IMAGE, {"convolutions": [(2, 3, 1)], "activation": "relu"}),
    "lstm": (VECTOR, {"recurrent": "lstm"}),
    "parts": (PARTS, {"convolutions": [(2, 3, 1)]}),
}
PAIRS = [
    (cls, action, body)
    for i, cls in enumerate(ALL)
    for action, body in zip(ACTIONS, itertools.islice(itertools.cycle(BODIES), i, None), strict=False)
]  # every method with every distribution and with every body


@pytest.mark.parametrize(("cls", "action", "body"), mostly_long(PAIRS, *PAIRS[1::8]))
def test_every_method_runs_on_a_device_with_every_distribution_and_body(
    cls: type[Algorithm], action: str, body: str
) -> None:
    (action_space, head), (observation_space, layers) = ACTIONS[action], BODIES[body]
    with on_fake_device():
        iterate(trainer(cls, World(observation_space, action_space), head | layers))


ADAPTIVE = {"adaptive": {"start": 3e-3, "kl": 1e-3}}
GRU, SHARED = {"recurrent": "gru"}, {"shared": True}
SETTINGS: dict[str, tuple[type[Algorithm], dict[str, Any]]] = {
    "adaptive": (PPO, {"lr": ADAPTIVE, "clip": {"linear": [0.3, 0.1]}, "gamma": {"piecewise": {0: 0.9, 1: 0.99}}}),
    "stopped": (PPO, {"target_kl": 0.01, "early_stop": "masked", "recompute_advantage": True, "epochs": 2}),
    "clipped": (PPO, {"dual_clip": 3.0, "clip_high": 0.3, "value_clip": 0.2, "huber_delta": 1.0, "critic": SHARED}),
    "off policy": (PPO, {"estimator": VTrace(), "optim": "rmsprop", "overlap": True}),
    "overlapped": (TRPO, {"overlap": True, "policy": GRU}),
    "penalty": (PPOPenalty, {"entropy_coef": {"cosine": [0.1, 0]}, "reference": {"coef": 0.1, "penalty": "loss"}}),
    "n steps": (A2C, {"estimator": NStep(n_steps=2), "optim": "adam", "scale": WhitenReward, "critic": GRU}),
    "reference": (A2C, {"reference": {"coef": 0.1, "target": 1.0}, "scale": None, "max_grad_norm": None}),
    "forward mode": (NPG, {"fisher": "gauss-newton", "estimator": TDLambda(), "policy": GRU}),
    "shared": (TRPO, {"fisher": "gauss-newton", "estimator": MonteCarlo(), "critic": SHARED}),
    "annealed": (TRPO, {"max_kl": {"linear": [0.1, 0.01]}, "critic_lr": {"linear": [0.1, 0.01]}}),
    "with a critic": (Reinforce, {"baseline": "critic", "returns": "total", "normalize_advantage": "batch"}),
    "in groups": (Reinforce, {"estimator": RLOO(group=2)}),
}


@pytest.mark.parametrize("name", mostly_long(SETTINGS, "adaptive", "stopped", "off policy", "shared"))
def test_settings_leave_iterations_on_the_device(name: str) -> None:
    cls, settings = SETTINGS[name]
    with on_fake_device():
        iterate(trainer(cls, World(FORBIDDING, spaces.Discrete(3)), **settings))


SPOKEN: dict[str, tuple[type[Algorithm], dict[str, Any]]] = {
    "ppo": (PPO, {"critic": SHARED, "reference": {"coef": 0.1, "target": 1.0}}),
    "grpo": (A2C, {"estimator": GRPO(group=2), "ratio": "sequence", "reference": {"coef": 0.1, "penalty": "loss"}}),
    "trpo": (TRPO, {"fisher": "gauss-newton"}),
    "npg": (NPG, {}),
    "reinforce": (Reinforce, {"baseline": "critic"}),
}


def prompts(length: int = 2) -> Prompts:
    with fake_device.values():
        env = Prompts(["b", "cde"], Letters(), [vowels], num_envs=ENVS, length=length)
    env.device = fake_device.device()
    for name in ("encoded", "real", "text", "clock"):
        setattr(env, name, fake_device.moved(getattr(env, name)))
    return env


@pytest.mark.parametrize("name", mostly_long(SPOKEN, "grpo"))
def test_language_models_stay_on_the_device(name: str) -> None:
    cls, settings = SPOKEN[name]
    with on_fake_device():
        iterate(trainer(cls, prompts(), **settings), 1)


def test_reward_models_and_pretraining_take_their_texts_to_the_device() -> None:
    """Texts become tensors on the CPU, and the parameters are on the device."""
    vocabulary = Vocabulary(["a", "b", "c"])
    size: dict[str, Any] = {"width": 8, "layers": 1, "heads": 2}
    with on_fake_device():
        with fake_device.values():
            judges = [Judge(Transformer(len(vocabulary), **size)) for _ in range(2)]
            reward = RewardModel(vocabulary, judges, "minimum")
            model = WordModel(vocabulary, Transformer(len(vocabulary), **size))
        fake_device.place(reward, model)
        assert reward(["a b", "c"], ["b", "a a a"]).device == fake_device.device()
        read = vocabulary.encode(["a", "b"], ["c", "c"], model.device)
        assert pretraining.loss(model, *read)[0].device == fake_device.device()


def test_a_reward_model_moves_to_the_device_of_the_environment_that_calls_it() -> None:
    judge = Judge(Transformer(len(Letters()), width=8, layers=1, heads=2))
    assert judge.shift.device.type == "cpu"
    rewards: Any = [judge]  # only its place is asked for
    LanguageEnv(["b"], Letters(), rewards, num_envs=2, device="meta")
    assert {x.device.type for x in judge.parameters()} == {"meta"} and judge.shift.device.type == "meta"


TASKS = ("CartPole", "Pendulum", "Acrobot", "MountainCar", "MountainCarContinuous")


@pytest.mark.parametrize("name", mostly_long([*TASKS, "torch-native"], "Pendulum", "torch-native"))
def test_environments_in_torch_stay_on_the_device(name: str) -> None:
    with on_fake_device():
        if name in TASKS:
            env: Any = make(name, ENVS, device=fake_device.device(), max_episode_steps=HORIZON)
        else:
            points = IsaacPoints(ENVS, fake_device.device(), 0, max_episode_steps=HORIZON)
            env = TorchNativeEnv(points, name="points", device=fake_device.device(), dtype=torch.float32, seed=0)
        iterate(trainer(A2C, env), 1)


READERS: dict[str, tuple[type[Algorithm], dict[str, Any]]] = {
    "target_kl": (PPO, {"target_kl": 0.1, "epochs": 2}),
    "the line search": (TRPO, {"backtracking": "sequential"}),
    "every 1 steps": (Reinforce, {"poll": 1}),
}


@pytest.mark.parametrize("reason", READERS)
def test_what_says_that_it_reads_does_read(reason: str) -> None:
    cls, settings = READERS[reason]
    with on_fake_device():
        run = trainer(cls, World(VECTOR, ARM), **settings)
        said = run.algorithm.host_sync_reason or run.collector.host_sync_reason
        assert said is not None and said.startswith(reason)
        with pytest.raises(AssertionError, match="__bool__ reads a tensor back to the host"):
            iterate(run)


def test_generation_asks_every_eighth_token_whether_any_response_goes_on() -> None:
    with on_fake_device(), pytest.raises(AssertionError, match="__bool__ reads a tensor back to the host"):
        iterate(trainer(A2C, prompts(length=9)), 1)


class Backwards(torch.autograd.Function):
    """A fault in a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Any) -> Tensor:
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        ctx.fault(slopes[0])
        return slopes[0], None


def backwards(fault: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def differentiate(x: Tensor) -> Any:
        x = x.float().requires_grad_()
        return torch.autograd.grad(Backwards.apply(x, fault).sum(), x)

    return differentiate


FAULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), "item reads a tensor back to the host"),
    "float": (lambda x: float(x.sum()), "__float__ reads a tensor back to the host"),
    "tolist": (lambda x: x.tolist(), "item reads a tensor back to the host"),
    "numpy": (lambda x: x.numpy(), "numpy reads a tensor back to the host"),
    "cpu": (lambda x: x.cpu(), "cpu reads a tensor back to the host"),
    "to": (lambda x: x.to("cpu", non_blocking=True), "a copy to the host"),
    "mask": (lambda x: x[x > 0], "index by a mask has a shape that is read back"),
    "assignment": (lambda x: x.index_put_((x > 0,), x.sum()), "by a mask has a shape that is read back"),
    "where": (lambda x: torch.where(x > 0), "nonzero reads a tensor back to the host"),
    "unique": (lambda x: x.unique(), "unique.* reads a tensor back to the host"),
    "branch": (lambda x: x if x.sum() > 0 else -x, "__bool__ reads a tensor back to the host"),
    "item, backwards": (backwards(lambda x: x.sum().item()), "_local_scalar_dense reads a tensor back to the host"),
    "the CPU, backwards": (backwards(lambda x: x * CONSTANT), "mul meets a tensor on the cpu"),
    "a tensor of the CPU": (lambda x: x + torch.ones(x.shape), "ones meets a tensor on the cpu"),
    "a number of the CPU": (lambda x: x + CONSTANT, "add meets a tensor on the cpu"),
    "an index of the CPU": (lambda x: x[INDEX], "index meets a tensor on the cpu"),
    "from the CPU": (lambda x: x + torch.as_tensor(NUMBERS).to(x.device), "lift_fresh meets a tensor on the cpu"),
    "a list": (lambda x: x.new_tensor([1.0, 2.0]).sum() + x, "lift_fresh meets a tensor on the cpu"),
    "a generator of the CPU": (lambda x: x.normal_(generator=GENERATOR), "normal_ draws from a generator on the CPU"),
    "a global generator": (torch.rand_like, "rand_like draws from a global generator"),
}
CONSTANT, INDEX, GENERATOR, NUMBERS = torch.tensor(2.0), torch.tensor([0, 1]), torch.Generator(), np.zeros(1)


@dataclass(kw_only=True, eq=False)
class Faulty(A2C):
    """A fault in learning."""

    fault: Any = None

    def metrics(self, batch: Batch) -> Metrics:
        self.fault(batch.advantage.clone())
        return super().metrics(batch)


class FaultyWorld(World):
    """A fault in collecting."""

    fault: Any = None

    def step(self, action: Tensor) -> Step:
        self.fault(action.clone())
        return super().step(action)


@pytest.mark.parametrize("name", FAULTS)
def test_what_an_accelerator_would_stall_or_break_at_is_found_and_named(name: str) -> None:
    fault, message = FAULTS[name]
    with on_fake_device():
        env = FaultyWorld(VECTOR, ARM)
        env.fault = fault
        with pytest.raises(AssertionError, match=message):
            iterate(trainer(A2C, env), 1)


@pytest.mark.parametrize("name", ["item", "mask", "a tensor of the CPU"])
def test_it_is_found_in_learning_too(name: str) -> None:
    fault, message = FAULTS[name]
    with on_fake_device(), pytest.raises(AssertionError, match=message):
        iterate(trainer(Faulty, World(VECTOR, ARM), fault=fault), 1)


def test_a_generator_of_the_cpu_that_shuffles_minibatches_is_found_and_named() -> None:
    with on_fake_device():
        run = trainer(PPO, World(VECTOR, ARM))
        run.algorithm.generator = seeding.generator(0, "minibatches")
        with pytest.raises(AssertionError, match="randperm draws from a generator on the CPU"):
            iterate(run)
