"""Kernels: what execution and profiling put in the place of a function of tensors, and how that is undone."""

import ast
import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_structure import ROOT, imports
from torch import nn
from toys import ALL, BRIEF, build, collector, compile_by, mostly_long

from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, Reinforce
from pgsuite.envs import make
from pgsuite.execution.modes import execute
from pgsuite.kernel import Kernel
from pgsuite.nn.stateless import functional_in_parameters
from pgsuite.training.profiling import ROWS, TIMED, TRACED, WARM_UP, Profile
from pgsuite.training.trainer import Trainer

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def trainer(cls: type[Algorithm], **settings: Any) -> Trainer:
    env = make("Pendulum", 8, max_episode_steps=16)
    settings |= {"baseline": "critic"} if cls is Reinforce else {}
    algorithm = build(cls, env, **BRIEF[cls] | settings)
    return Trainer(algorithm, collector(algorithm, env, horizon=8), 100_000)


def parameters(run: Trainer) -> torch.Tensor:
    return torch.cat([x.flatten() for part in run.algorithm.parts.values() for x in part.parameters()])


@pytest.mark.parametrize("cls", ALL)
def test_every_kernel_of_a_run_is_listed(cls: type[Algorithm]) -> None:
    found = trainer(cls).kernels
    own = {"algorithm.linearize", "algorithm.update_networks"} if issubclass(cls, NPG) else set()
    own |= {"critic_optimizer.gradient_step"} if issubclass(cls, NPG | Reinforce) else set()
    own |= set() if issubclass(cls, NPG) else {"optimizer.gradient_step"}
    assert found.keys() == own | {
        "critic.values_and_next_values",
        "algorithm.training_step",
        "algorithm.fit",
        "collector.collect",
        "collector.act",
        "env.step_task",
        "trainer.pack_host_data",
    }
    assert {kernel.name for kernel in found.values()} >= {"gradient step", "act", "collect", "learn", "step task"}


@compiler
@pytest.mark.parametrize("cls", mostly_long(ALL, PPO, A2C, NPG))
def test_a_run_whose_kernels_are_reset_is_as_written_to_the_last_bit(
    cls: type[Algorithm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was compiled and has run so; and what was compiled is what ran."""
    made = compile_by("aot_eager", monkeypatch)
    runs = [trainer(cls) for _ in range(2)]
    execute(runs[1].algorithm, runs[1].collector, "compile")
    changed = {name for name, kernel in runs[1].kernels.items() if kernel.run != kernel.function}
    step = f"{'critic_' * issubclass(cls, NPG)}optimizer.gradient_step"
    assert changed >= {step, "critic.values_and_next_values", "collector.act", "env.step_task"}
    assert ({"algorithm.linearize", "algorithm.update_networks"} <= changed) == issubclass(cls, NPG)
    runs[1].iterate()
    runs[0].iterate()
    graphs = len(made)
    assert graphs
    for kernel in runs[1].kernels.values():
        kernel.reset()
    runs[1].load_state_dict(copy.deepcopy(runs[0].state_dict()))
    for _ in range(2):
        eager, undone = (run.iterate().metrics for run in runs)
        assert eager == undone
    assert torch.equal(*map(parameters, runs)) and len(made) == graphs


def test_a_deep_copy_has_kernels_of_its_own_that_run_as_written() -> None:
    run = trainer(NPG)
    for kernel in run.kernels.values():
        kernel.run = lambda *_: None
    twin = copy.deepcopy(run)
    kernels = twin.kernels
    assert kernels.keys() == run.kernels.keys()
    for name, kernel in kernels.items():
        theirs: Any = run.kernels[name]
        mine: Any = kernel
        assert mine is not theirs and mine.run == mine.function and mine.name == theirs.name
        assert mine.function.__func__ is theirs.function.__func__
        assert mine.function.__self__ is not theirs.function.__self__
    algorithm: Any = twin.algorithm
    assert algorithm.critic.values_and_next_values.function.__self__ is algorithm.critic
    assert algorithm.critic_optimizer.gradient_step.function.__self__ is algorithm.critic_optimizer
    rollout = twin.collector.collect(algorithm.policy)
    assert rollout.mask.all() and algorithm.critic.values_and_next_values(rollout)[0].isfinite().all()


def test_no_kernel_is_part_of_a_state() -> None:
    def leaves(x: Any) -> list[Any]:
        parts = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else None
        return [x] if parts is None else [leaf for part in parts for leaf in leaves(part)]

    state = trainer(TRPO).state_dict()
    assert not any(isinstance(x, Kernel) or callable(x) for x in leaves(state))


def test_kernels_run_under_vmap_over_runs() -> None:
    """A leading axis of parameters: the critic's pass over a rollout, and PPO's loss with its gradient."""
    run = trainer(PPO)
    algorithm: Any = run.algorithm
    rollout = algorithm.preprocess(run.collector.collect(algorithm.policy))
    batch, critic = algorithm.compute_advantages(rollout), algorithm.critic
    values = functional_in_parameters(critic, lambda: critic.values_and_next_values(rollout))
    own = torch.cat([x.detach().flatten() for x in critic.parameters()])
    many = own * torch.tensor([[1.0], [0.5], [2.0]])
    for found, expected in zip(torch.vmap(values)(many), zip(*map(values, many), strict=True), strict=True):
        assert torch.allclose(found, torch.stack(expected), atol=1e-5)

    networks = nn.ModuleList([algorithm.policy, critic])
    loss = Kernel("loss", functional_in_parameters(networks, lambda: algorithm.loss(batch)[0]))
    own = torch.cat([x.detach().flatten() for x in networks.parameters()])
    many = own * torch.tensor([[1.0], [0.5], [2.0]])
    slope = torch.func.grad(loss)
    found = torch.vmap(slope)(many)
    assert torch.allclose(found, torch.stack([slope(x) for x in many]), atol=1e-5)
    assert not torch.allclose(found[0], found[1])


@compiler
@pytest.mark.parametrize("cls", mostly_long([PPO, TRPO], PPO))
def test_a_compiled_run_is_profiled_and_learns_the_same(
    cls: type[Algorithm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compile_by("aot_eager", monkeypatch)
    plain, profiled = (trainer(cls) for _ in range(2))
    for run in (plain, profiled):
        execute(run.algorithm, run.collector, "compile")
    before = {name: kernel.run for name, kernel in profiled.kernels.items()}
    said: list[str] = []
    profile = Profile(tmp_path, said.append)
    for _ in range(WARM_UP + TIMED + TRACED):
        plain.iterate()
        profile.on_iteration(profiled, profiled.iterate())
    assert made and torch.equal(parameters(plain), parameters(profiled))
    assert {name: kernel.run for name, kernel in profiled.kernels.items()} == before
    assert {"collect", "compute_advantages", "update", "fit"} <= profile.calls.keys()
    assert "act" not in profile.calls, "the rollout of a task is one graph"
    assert profile.calls["collect"] == profile.calls["fit"] == TIMED
    assert profile.calls.keys() <= ROWS.keys() and any(line.startswith("collect") for line in said)


ALONE = """
import sys, warnings
import torch  # which imports some of its own private modules
sys.modules["torch.fx.experimental.proxy_tensor"] = None
import pgsuite.app.policy_io  # which pgsuite.load imports
import pgsuite.app.train
from pgsuite.algorithms import TRPO
from pgsuite.envs import make
from pgsuite.execution.modes import execute
from pgsuite.nn.normalize import Standardize
from pgsuite.nn.policy import Critic, Policy
from pgsuite.rollout import StepCollector
env = make("CartPole", 4, max_episode_steps=8)
norm = Standardize(env.observation_space)
policy, critic = Policy(norm, env.action_space), Critic(norm)
algorithm = TRPO(policy=policy, critic=critic, backtracking="batched")
rollouts = StepCollector(env, 8)
print(execute(algorithm, rollouts, "eager"))
algorithm.iterate(rollouts)
print([x for x in sys.modules if x.startswith("pgsuite.execution.")])
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print(execute(algorithm, rollouts, "auto"))
print(*[x.message for x in told if "execution=auto" in str(x.message)])
algorithm.iterate(rollouts)
try:
    execute(algorithm, rollouts, "compile")
except ValueError as error:
    print(error)
"""


@compiler
def test_a_torch_without_the_private_parts_trains_as_written_and_says_what_compiling_needs() -> None:
    """An eager run imports no module that only another way to run needs."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    eager, modules, auto, fallback, refused = done.stdout.strip().splitlines()
    assert eager == auto == "eager"
    assert set(ast.literal_eval(modules)) == {"pgsuite.execution.modes", "pgsuite.execution.precision"}
    assert fallback.startswith("execution=auto is eager here, for execution=compile needs parts of torch that torch")
    assert refused.startswith("execution=compile needs parts of torch that torch 2.")
    assert "lacks (torch.fx.experimental.proxy_tensor), and that torch 2.11 to 2.13 have" in refused


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_private_modules_of_torch_are_imported_in_one_file(path: Path) -> None:
    if path.name in ("torch_private.py", "reads.py"):  # TorchDispatchMode, which the second needs, has no other name
        return
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] != "torch" or not any(x.startswith("_") or x == "experimental" for x in parts), name
