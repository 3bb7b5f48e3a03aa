"""Layers may compute in bfloat16; what is made of them stays as precise as it was."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import build, collector

from pgsuite.algorithms import PPO, TRPO, Algorithm
from pgsuite.envs import make
from pgsuite.execution.precision import lower
from pgsuite.nn.policy import Critic

CPU = torch.device("cpu")
MULTIPLIED = ("mm", "addmm", "bmm", "convolution", "convolution_backward")


class Types(TorchDispatchMode):
    """Which operations see bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if isinstance(outputs, torch.Tensor) and outputs.dtype is torch.bfloat16:
            self.names.add(func._schema.name.removeprefix("aten::"))
        return outputs


@pytest.mark.parametrize("cls", [PPO, TRPO])
@pytest.mark.parametrize("recurrent", ["none", "lstm"])
def test_only_layers_are_lowered(cls: type[Algorithm], recurrent: str) -> None:
    env = make("Pendulum", 8)
    algorithm = build(cls, env, recurrent=recurrent, hidden=(32, 32))
    lower(algorithm, CPU, "bf16")
    rollouts = collector(algorithm, env, 8)
    with Types() as seen:
        metrics = algorithm.iterate(rollouts)
        batch = algorithm.compute_advantages(algorithm.preprocess(rollouts.collect(algorithm.policy)))
    assert {"mm", "addmm"} & seen.names
    precise = {"log", "exp", "expm1", "mean", "clamp", "where", "normal_", "linalg_vector_norm", "addcmul_", "sub_"}
    assert not precise & seen.names  # what credit, log-probabilities, losses and steps are made of
    held = [batch.logp, batch.value, batch.advantage, *batch.hidden_state.values(), *metrics.values()]
    held += algorithm.policy.state_dict().values()
    assert {x.dtype for x in held if x.is_floating_point()} == {torch.float32, torch.float64}  # counts are float64


def test_networks_differ_by_rounding_and_copies_are_lowered_too() -> None:
    env = make("CartPole", 64)
    algorithm = build(PPO, env, hidden=(64, 64))
    rollout = collector(algorithm, env, 8).collect(algorithm.policy)
    exact: Critic = copy.deepcopy(algorithm.critic)
    lower(algorithm, CPU, "bf16")
    with torch.no_grad():
        error = (algorithm.critic(rollout) - exact(rollout)).abs()
        assert torch.equal(copy.deepcopy(algorithm.critic)(rollout), algorithm.critic(rollout))
    assert 0 < error.max() < 0.05


def test_ratios_begin_near_one() -> None:
    """Rounding depends on how many rows are multiplied at once, so they are not one to the last bit of float32."""
    env = make("Pendulum", 16)
    algorithm = build(PPO, env, hidden=(256, 256))
    lower(algorithm, CPU, "bf16")
    rollout = collector(algorithm, env, 16).collect(algorithm.policy)
    with torch.no_grad():
        ratio = (algorithm.policy.dist(rollout).log_prob(rollout.action) - rollout.logp).exp()
    assert (ratio - 1).abs().max() < 1e-3


def test_tf32_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"precision=tf32 is for a GPU: use float32, or bf16"):
        lower(build(PPO, make("CartPole", 2)), CPU, "tf32")
