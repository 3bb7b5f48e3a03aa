"""Compiled kernels.  Algorithms and environments do not depend on this module."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import register_dataclass

from pgsuite.algorithms import NPG
from pgsuite.algorithms.base import Algorithm
from pgsuite.algorithms.npg import LocalModel
from pgsuite.envs import TaskEnv
from pgsuite.execution.graph_split import Graphs, TwoStageGraph, compiled, signature, traced
from pgsuite.execution.loops import CompiledFit, has_memory, loops
from pgsuite.execution.rollouts import CompiledRollout, Draw, in_a_row, is_one_graph
from pgsuite.execution.torch_private import compile_graph, tree_unflatten
from pgsuite.functional.trust_region import map_tensors
from pgsuite.nn.distributions import Distribution, Reparameterized
from pgsuite.nn.policy import Policy, PolicyOutput
from pgsuite.rollout import Collector
from pgsuite.types import Batch, Metrics

register_dataclass(Batch)  # tracing then treats a batch as a nest of its tensors


class Compiled:
    """A function of nests of tensors, autograd included, as one compiled graph per input signature.

    Tracing records the operations of forward and backward alike, so the compiler fuses them with one another, and no
    autograd runs afterwards.  Arguments other than tensors are compiled in as constants.  ``what`` is for
    ``Graphs``.  ``exclusive`` is called before a trace and returns once no other thread runs: torch's tracing state is
    global to the process.
    """

    def __init__(self, function: Callable[..., Any], what: str, exclusive: Callable[[], None] = lambda: None) -> None:
        self.function, self.graphs, self.exclusive = function, Graphs(what), exclusive

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        key, inputs = signature(args)
        made = self.graphs.find(key, lambda: self.compile(args, inputs))
        if made is None:
            with torch.enable_grad():
                return self.function(*args)
        graph, nest = made
        return tree_unflatten(graph(*inputs), nest)

    def compile(self, args: Any, inputs: list[Tensor]) -> tuple[Callable[..., Any], Any]:
        self.exclusive()
        with torch.enable_grad():
            graph, nest = traced(self.function, args)
        return compile_graph(graph, inputs), nest


class CompiledLinearization:
    """The local model of a natural gradient step, with its gradient, Fisher product and step evaluation in separate
    graphs.  Conjugate gradient calls the graph of the Fisher product and is not unrolled itself."""

    def __init__(self, linearize: Callable[..., LocalModel], exclusive: Callable[[], None] = lambda: None) -> None:
        self.numbers = Compiled(lambda *seen: linearize(*seen)[:2], "the policy gradient", exclusive)
        self.product = TwoStageGraph(lambda *seen: linearize(*seen).product, "the Fisher product", exclusive)
        self.evaluate_step = TwoStageGraph(lambda *seen: linearize(*seen).evaluate_step, "the line search", exclusive)

    def __call__(self, start: Tensor, batch: Batch) -> LocalModel:
        gradient, entropy = self.numbers(start, batch)
        return LocalModel(gradient, entropy, self.product(start, batch), self.evaluate_step(start, batch))


class ParallelCriticUpdate:
    """An update that fits the critic in a second thread while the policy is updated in the first.

    Both read the same batch and write disjoint parameters.  A batch of a new signature is processed sequentially,
    since its graphs are compiled then, and no other thread may run during compilation.
    """

    def __init__(self, algorithm: NPG, exclusive: Callable[[], None]) -> None:
        self.algorithm, self.update, self.wait_for_collector = algorithm, algorithm.update_networks.run, exclusive
        self.regression: Future[Metrics] | None = None
        self.known: set[Any] = set()
        self.other = ThreadPoolExecutor(1)

    def __call__(self, batch: Batch) -> Metrics:
        a, about = self.algorithm, (signature(batch)[0], self.algorithm.critic_minibatches)
        if about not in self.known:
            self.known.add(about)
            return self.update(batch)
        self.regression = self.other.submit(a.fit_critic, a.critic, a.critic_optimizer, batch)
        return a.update_policy(batch) | self.regression.result()

    def exclusive(self) -> None:
        """Wait until no other thread runs: the policy update may meet a signature that the critic's does not, such as
        another number of backtracking steps."""
        self.wait_for_collector()
        if self.regression is not None:
            wait([self.regression])


class CompiledActing:
    """Acts through one graph.  Noise is sampled outside the graph, from the same generator and in the same order as in
    eager acting."""

    def __init__(self, collector: Collector) -> None:
        self.collector, self.act = collector, collector.act.run
        self.dist: Distribution | None = None
        self.choose = Compiled(self._choose, "the choice of actions")
        self.ahead: dict[int, Draw] = {}

    def _choose(self, policy: Policy, obs: Any, hidden_state: Any, start: Tensor, noise: Tensor) -> PolicyOutput:
        return policy.choose(obs, hidden_state, start, lambda d: d.from_noise(noise))  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def __call__(self, policy: Policy) -> PolicyOutput:
        if self.distribution(policy) is None:
            return self.act(policy)
        return self.choose(policy, *self.seen(), self.noise(policy, 1)[0])

    def seen(self) -> tuple[Any, Any, Any]:
        c = self.collector
        return c.obs, c.hidden_state, c.start

    def distribution(self, policy: Policy) -> Any:
        """An action distribution, for the shape of its parameters; None if it is not reparameterized."""
        if self.dist is None:
            obs, hidden_state, start = self.seen()
            self.dist = policy.distribution(policy.body.step(obs, hidden_state, start)[0], obs)
        return self.dist if isinstance(self.dist, Reparameterized) else None

    def noise(self, policy: Policy, count: int) -> Tensor:
        """The random numbers of the next ``count`` decisions, [count, ...]."""
        return self.draw(self.distribution(policy), count)(generator=self.collector.generator)

    def draw(self, dist: Any, count: int) -> Draw:
        """How to draw noise for a distribution ``count`` times."""
        if count not in self.ahead:
            many = map_tensors(lambda x: x.expand(count, *x.shape).contiguous(), dist)
            self.ahead[count] = in_a_row(dist.noise, many.noise, count, self.collector.env.device)
        return self.ahead[count]

    def decide(self, policy: Policy, noise: Tensor) -> PolicyOutput:
        """The decision for the current observations, not compiled."""
        return self._choose(policy, *self.seen(), noise)


def compile_kernels(algorithm: Algorithm, collector: Collector) -> None:
    """Replace the ``run`` of the kernels of an algorithm, a collector and its environments by compiled functions.

    Compiled are: each loss together with its gradient step, where A2C and PPO spend their time, and NPG and TRPO
    fit their critic; on a CPU, the loop over minibatches around it; the policy gradient, the Fisher product and the
    line search of a natural gradient step; acting, except for distributions that are not reparameterized; the
    critic's pass over a rollout; and the torch part of a task's step or, on a CPU, whole rollouts of a task in
    torch.  Of recurrent networks, only acting and rollouts are: hundreds of steps of an update would be unrolled,
    and take minutes.  On a CPU, a critic that shares no parameters with the policy is fitted in parallel with the
    natural gradient step.  Results agree with eager ones to rounding.  Each ``run`` is a function or a method, so
    that what compilation holds is not searched for the state of a captured iteration.
    """
    torch.compiler.reset()  # the runs of a sweep would otherwise exceed torch's recompilation limit
    for body in (algorithm.policy.body, *(critic.body for critic in algorithm.critics)):
        body.fixed_shape = True
    if not has_memory(algorithm):
        for optimizer in algorithm.optimizers:
            step = optimizer.gradient_step
            step.run = Compiled(step.run, "a gradient step", collector.wait).__call__
        if loops(algorithm, collector.env.device):
            algorithm.fit.run = CompiledFit(algorithm, collector.wait).__call__
    for critic in algorithm.critics:
        if not critic.sequential:  # a recurrence would be unrolled through time
            values, what = critic.values_and_next_values, "the critic's pass over a rollout"
            if collector.env.device.type == "cpu":  # where reading is free
                values.run = partial(critic.values_by_need, sequence=compiled(critic.body.sequence, what))
            else:
                values.run = compiled(values.run, what)
    if isinstance(algorithm, NPG) and not algorithm.policy.sequential:
        parallel = ParallelCriticUpdate(algorithm, collector.wait)
        linearize = CompiledLinearization(algorithm.linearize.run, parallel.exclusive)
        algorithm.linearize.run = linearize.__call__
        apart = set(algorithm.policy.parameters()).isdisjoint(algorithm.critic.parameters())
        if apart and type(algorithm).update is NPG.update and collector.env.device.type == "cpu":
            algorithm.update_networks.run = parallel.__call__
    stepper, env = collector.stepper, collector.env
    stepper.fixed_shape = True
    acting = CompiledActing(stepper)
    stepper.act.run = acting.__call__
    if isinstance(env, TaskEnv):
        env.step_task.run = compiled(env.step_task.run, "the task's step")
        if stepper is collector and is_one_graph(stepper, env):
            collector.collect.run = CompiledRollout(stepper, env, acting).__call__
