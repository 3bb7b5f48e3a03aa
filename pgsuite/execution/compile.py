"""How tensor code runs: as it is written, or compiled.  Algorithms and environments know nothing of it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import register_dataclass
from torch.utils import _pytree as pytree

from pgsuite import distributed
from pgsuite.algorithms import NPG
from pgsuite.algorithms.base import Algorithm
from pgsuite.algorithms.npg import LocalModel
from pgsuite.envs import TaskEnv
from pgsuite.execution.graph_split import Staged, built, compiled, described, traced
from pgsuite.nn.distributions import Distribution, Reparameterized
from pgsuite.nn.policy import Policy, PolicyOutput
from pgsuite.rollout import Collector
from pgsuite.types import Batch, Metrics

Execution = Literal["eager", "compile", "auto", "cuda_graph"]

register_dataclass(Batch)  # so that tracing sees the tensors in it


class Compiled:
    """A function of nests of tensors, with all that autograd does in it, as one compiled graph for each shape it meets.

    Tracing sees the operations of forward and backward alike, so they are fused with one another, and no autograd runs
    afterwards.  What is no tensor is taken for constant.  ``alone`` is called before anything is traced, and returns
    when no other thread runs, for torch knows only whether some thread traces.
    """

    def __init__(self, function: Callable[..., Any], alone: Callable[[], None] = lambda: None) -> None:
        self.function, self.alone = function, alone
        self.graphs: dict[Any, tuple[Callable[..., Any], Any]] = {}

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        key, inputs = described(args)
        if key not in self.graphs:
            self.alone()
            with torch.enable_grad():
                graph, nest = traced(self.function, args)
            self.graphs[key] = built(graph, inputs), nest
        graph, nest = self.graphs[key]
        return pytree.tree_unflatten(graph(*inputs), nest)


class CompiledSurvey:
    """What a natural step needs to know, each thing in graphs of its own: conjugate gradient calls that of the Fisher
    product, and is not unrolled."""

    def __init__(self, linearize: Callable[..., LocalModel], alone: Callable[[], None]) -> None:
        self.numbers = Compiled(lambda *seen: linearize(*seen)[:2], alone)
        self.product = Staged(lambda *seen: linearize(*seen).product, alone)
        self.evaluate_step = Staged(lambda *seen: linearize(*seen).evaluate_step, alone)

    def __call__(self, start: Tensor, batch: Batch) -> LocalModel:
        gradient, entropy = self.numbers(start, batch)
        return LocalModel(gradient, entropy, self.product(start, batch), self.evaluate_step(start, batch))


class SideBySide:
    """An update whose halves, the policy's and the critic's, read one batch and write apart: each in a thread.

    From a batch of a new shape they learn in turn, for whatever compiles must be alone.
    """

    def __init__(self, algorithm: NPG, alone: Callable[[], None]) -> None:
        self.algorithm, self.update, self.others = algorithm, algorithm.update, alone
        self.regression: Future[Metrics] | None = None
        self.known: set[Any] = set()
        self.other = ThreadPoolExecutor(1)

    def __call__(self, batch: Batch) -> Metrics:
        a, about = self.algorithm, (described(batch)[0], self.algorithm.critic_minibatches)
        if about not in self.known:
            self.known.add(about)
            return self.update(batch)
        self.regression = self.other.submit(a.fit_critic, a.critic, a.optimizer, batch)
        return a.update_policy(batch) | self.regression.result()

    def alone(self) -> None:
        """Return when no other thread runs, for what is new to the policy's half alone, as another number of tries."""
        self.others()
        if self.regression is not None:
            wait([self.regression])


class CompiledActing:
    """Acts through one graph.  What is random stays outside it, drawn number by number as eager acting draws it."""

    def __init__(self, collector: Collector) -> None:
        self.collector, self.act = collector, collector.act
        self.dist: Distribution | None = None

    @torch.no_grad()
    def __call__(self, policy: Policy) -> PolicyOutput:
        c = self.collector
        if self.dist is None:
            self.dist = policy.distribution(policy.body.step(c.obs, c.hidden_state, c.start)[0], c.obs)
            self.choose = Compiled(
                lambda policy, obs, hidden_state, start, noise: policy.choose(
                    obs, hidden_state, start, lambda d: d.draw(noise)
                )
            )
        if not isinstance(self.dist, Reparameterized):
            return self.act(policy)
        noise = self.dist.noise(c.generator)  # of whose numbers the law and the shape alone count
        return self.choose(policy, c.obs, c.hidden_state, c.start, noise)


def why_not_compilable(device: torch.device) -> str | None:
    """Why nothing can be compiled here, and what would help."""
    if distributed.size() > 1:
        return "is for one process: leave torchrun"
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "needs triton on a GPU: pip install triton"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(compiler) is not None
    return None if found else f"needs a C++ compiler, and there is no {compiler}: install it"


def execute(algorithm: Algorithm, collector: Collector, how: Execution) -> Execution:
    """Have them run so from here on; returns which way that is.

    ``compile`` makes one graph of each loss with its gradient step, which is where A2C and PPO spend their time, and
    NPG and TRPO what they spend on their critic; of the gradient, the Fisher product and the tries of a natural step,
    but for policies with memory; one of acting, but for actions that are no function of noise; one of the critic's pass
    over a rollout; and one of what a step of a task does in torch.  On a CPU a critic with a body of its own is
    regressed beside the natural step.  The numbers agree with eager ones to rounding.  ``auto`` compiles on a CPU where
    that can be, and is eager elsewhere.  Raises ValueError where there is nothing to compile with, or several
    processes.
    """
    env = collector.env
    if how == "cuda_graph" and env.device.type != "cuda":
        raise ValueError("execution=cuda_graph is for a GPU: give device=cuda, or leave it out")
    if how == "auto":
        how = "eager" if env.device.type == "cuda" or why_not_compilable(env.device) else "compile"
    if how != "compile":  # whole iterations are captured, in cuda_graphs
        return how
    if (why := why_not_compilable(env.device)) is not None:
        raise ValueError(f"execution=compile {why}, or leave it out")
    torch.compiler.reset()  # or the runs of a sweep use up the number of times that one function may be compiled
    for optimizer in algorithm.optimizers:
        optimizer.propose_step = Compiled(optimizer.propose_step, collector.wait)  # pyright: ignore[reportAttributeAccessIssue]
    for critic in algorithm.critics:
        if not critic.sequential:  # or its steps through time would be unrolled
            critic.values_and_next_values = compiled(critic.values_and_next_values)
    if isinstance(algorithm, NPG) and not algorithm.policy.sequential:
        beside = SideBySide(algorithm, collector.wait)
        algorithm.linearize = CompiledSurvey(algorithm.linearize, beside.alone)  # pyright: ignore[reportAttributeAccessIssue]
        apart = set(algorithm.policy.parameters()).isdisjoint(algorithm.critic.parameters())
        if apart and type(algorithm).update is NPG.update and env.device.type == "cpu":
            algorithm.update = beside  # pyright: ignore[reportAttributeAccessIssue]
    stepper = collector.stepper
    stepper.act = CompiledActing(stepper)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(env, TaskEnv):
        env.advance = compiled(env.advance)
    return how
