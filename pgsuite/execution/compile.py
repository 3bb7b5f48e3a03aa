"""Kernels that run compiled.  Algorithms and environments know nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor
from torch.export import register_dataclass

from pgsuite.algorithms import NPG
from pgsuite.algorithms.base import Algorithm
from pgsuite.algorithms.npg import LocalModel
from pgsuite.envs import TaskEnv
from pgsuite.execution.graph_split import Staged, compiled, described, traced
from pgsuite.execution.torch_private import compile_graph, tree_unflatten
from pgsuite.nn.distributions import Distribution, Reparameterized
from pgsuite.nn.policy import Policy, PolicyOutput
from pgsuite.rollout import Collector
from pgsuite.types import Batch, Metrics

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
            self.graphs[key] = compile_graph(graph, inputs), nest
        graph, nest = self.graphs[key]
        return tree_unflatten(graph(*inputs), nest)


class CompiledLinearization:
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
        self.algorithm, self.update, self.others = algorithm, algorithm.update_networks.run, alone
        self.regression: Future[Metrics] | None = None
        self.known: set[Any] = set()
        self.other = ThreadPoolExecutor(1)

    def __call__(self, batch: Batch) -> Metrics:
        a, about = self.algorithm, (described(batch)[0], self.algorithm.critic_minibatches)
        if about not in self.known:
            self.known.add(about)
            return self.update(batch)
        self.regression = self.other.submit(a.fit_critic, a.critic, a.critic_optimizer, batch)
        return a.update_policy(batch) | self.regression.result()

    def alone(self) -> None:
        """Return when no other thread runs, for what is new to the policy's half alone, as another number of tries."""
        self.others()
        if self.regression is not None:
            wait([self.regression])


class CompiledActing:
    """Acts through one graph.  What is random stays outside it, drawn number by number as eager acting draws it."""

    def __init__(self, collector: Collector) -> None:
        self.collector, self.act = collector, collector.act.run
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


def compile_kernels(algorithm: Algorithm, collector: Collector) -> None:
    """Have their kernels run compiled from here on.

    There is one graph of each loss with its gradient step, which is where A2C and PPO spend their time, and NPG and
    TRPO what they spend on their critic; of the gradient, the Fisher product and the tries of a natural step, but for
    policies with memory; one of acting, but for actions that are no function of noise; one of the critic's pass over a
    rollout; and one of what a step of a task does in torch.  On a CPU a critic with a body of its own is regressed
    beside the natural step.  The numbers agree with eager ones to rounding.
    """
    torch.compiler.reset()  # or the runs of a sweep use up the number of times that one function may be compiled
    for optimizer in algorithm.optimizers:
        step = optimizer.gradient_step
        step.run = Compiled(step.run, collector.wait)
    for critic in algorithm.critics:
        if not critic.sequential:  # or its steps through time would be unrolled
            values = critic.values_and_next_values
            values.run = compiled(values.run)
    if isinstance(algorithm, NPG) and not algorithm.policy.sequential:
        beside = SideBySide(algorithm, collector.wait)
        algorithm.linearize.run = CompiledLinearization(algorithm.linearize.run, beside.alone)
        apart = set(algorithm.policy.parameters()).isdisjoint(algorithm.critic.parameters())
        if apart and type(algorithm).update is NPG.update and collector.env.device.type == "cpu":
            algorithm.update_networks.run = beside
    stepper, env = collector.stepper, collector.env
    stepper.act.run = CompiledActing(stepper)
    if isinstance(env, TaskEnv):
        env.step_task.run = compiled(env.step_task.run)
