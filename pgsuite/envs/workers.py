"""gymnasium environments in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from time import monotonic
from typing import Any, NoReturn

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from pgsuite.envs.base import BrokenEnvError
from pgsuite.errors import place, reason

Maker = Callable[[], gymnasium.Env[Any, Any]]
START = 600.0  # seconds for a worker to begin, which imports torch and the user's package


class WorkerTraceback(Exception):  # noqa: N818
    """The traceback of an error in a worker, as its cause, since a traceback itself cannot be sent."""


class Workers(VectorEnv[Any, Any, Any]):
    """N environments in ``workers`` processes, each of which steps its share sequentially.

    Processes are spawned rather than forked, so they inherit no threads; makers must be picklable.  Raises
    BrokenEnvError for the exception of an environment, for a process that died, and for one that takes more than
    ``timeout`` seconds to make, reset or step its share; None waits for ever.  Workers end with this process.
    """

    def __init__(self, makers: Sequence[Maker], workers: int, timeout: float | None = None) -> None:
        self.num_envs, self.closed, self.timeout = len(makers), True, timeout
        self.shares = [range(x[0], x[-1] + 1) for x in np.array_split(np.arange(len(makers)), workers)]
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[SpawnProcess] = []
        self.end = weakref.finalize(self, end, self.processes)  # also when this process exits without close()
        for share in self.shares:
            ours, theirs = context.Pipe()
            mine = [makers[i] for i in share]
            process = context.Process(target=work, args=(theirs, mine), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.closed = False
        self.answers(START)
        described, *others = self.ask([("describe",)] * workers)
        for other, share in zip(others, self.shares[1:], strict=True):
            if other[:2] != described[:2]:
                self.close()
                raise BrokenEnvError(
                    f"environment {share.start} has the spaces {other[0]} and {other[1]}, and environment 0 "
                    f"{described[0]} and {described[1]}; all must have the same"
                )
        self.single_observation_space, self.single_action_space, self.max_episode_steps = described
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seeds = [None if seed is None else seed + share.start for share in self.shares]
        answers = self.ask([("reset", x, options) for x in seeds])
        return self.join(answers), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        each = list(iterate(self.action_space, actions))
        answers = self.ask([("step", each[share.start : share.stop]) for share in self.shares])
        obs, *rest, finals, infos = zip(*answers, strict=True)
        reward, terminated, truncated = (np.concatenate(x) for x in rest)
        final = np.full(self.num_envs, None, dtype=object)
        for share, found in zip(self.shares, finals, strict=True):
            for i, successor in found.items():
                final[share.start + i] = successor
        info = {name: np.concatenate([x[name] for x in infos]) for name in infos[0]}
        return self.join(obs), reward, terminated, truncated, {"final_obs": final} | info

    def join(self, parts: Sequence[Any]) -> Any:
        """Concatenate the observations of all workers to one batch in new memory."""
        rows = [row for part, share in zip(parts, self.shares, strict=True) for row in self.rows(part, len(share))]
        return concatenate(self.single_observation_space, rows, self.empty())

    def rows(self, part: Any, count: int) -> list[Any]:
        return list(iterate(batch_space(self.single_observation_space, count), part))

    def empty(self) -> Any:
        return create_empty_array(self.single_observation_space, n=self.num_envs)

    def ask(self, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send one request to each worker and return the answers."""
        for i, request in enumerate(requests):
            try:
                self.pipes[i].send(request)
            except OSError:
                self.lost(i)
        return self.answers(self.timeout)

    def answers(self, timeout: float | None) -> list[Any]:
        """One answer of each worker."""
        answers, deadline = [], None if timeout is None else monotonic() + timeout
        for i, pipe in enumerate(self.pipes):
            if not pipe.poll(None if deadline is None else max(0.0, deadline - monotonic())):
                self.close()
                raise BrokenEnvError(
                    f"the worker of {self.names(i)} has not answered for {timeout:g} s, and was ended: one of its "
                    "environments hangs, or needs a greater env.timeout="
                )
            try:
                problem, text, answer = pipe.recv()
            except (EOFError, OSError):
                self.lost(i)
            if problem is not None:
                self.close()
                raise problem from WorkerTraceback(f"\n{text}")
            answers.append(answer)
        return answers

    def names(self, index: int) -> str:
        share = self.shares[index]
        return f"environments {share.start} to {share.stop - 1}"

    def lost(self, index: int) -> NoReturn:
        self.processes[index].join(5)
        code = self.processes[index].exitcode
        self.close()
        raise BrokenEnvError(f"the worker of {self.names(index)} died (exit code {code})")

    def close_extras(self, **kwargs: Any) -> None:
        self.end()
        for pipe in self.pipes:
            pipe.close()


def end(processes: Sequence[SpawnProcess]) -> None:
    """End processes with a signal that cannot be ignored: they ignore others, and an environment may hang."""
    for process in processes:
        process.kill()
        process.join(5)


def work(pipe: Connection, makers: Sequence[Maker]) -> None:
    """The loop of a worker process: answers each request with (error or None, its traceback, answer)."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent process answers them, and needs its environments
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    env: SyncVectorEnv | None = None
    pipe.send((None, "", None))
    while True:
        try:
            request, *arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if env is None:
                env = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
            pipe.send((None, "", answer(env, request, *arguments)))
        except (Exception, SystemExit) as error:
            broken = error if isinstance(error, BrokenEnvError) else BrokenEnvError(f"{place(error)}{reason(error)}")
            pipe.send((broken, traceback.format_exc(), None))


def end_with_parent() -> None:
    """End this process when its parent ends, by whatever signal, also while an environment hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def answer(env: SyncVectorEnv, request: str, *arguments: Any) -> Any:
    if request == "describe":
        spec = env.envs[0].spec
        limit = None if spec is None else spec.max_episode_steps
        return env.single_observation_space, env.single_action_space, limit
    if request == "reset":
        return env.reset(seed=arguments[0], options=arguments[1])[0]
    obs, reward, terminated, truncated, info = env.step(batch(env, arguments[0]))
    final, done = info.get("final_obs", {}), terminated | truncated
    infos = {name: info_of(info, name, done) for name in named_infos(info)}
    return obs, reward, terminated, truncated, {i: final[i] for i in np.flatnonzero(done)}, infos


def named_infos(info: dict[str, Any]) -> list[str]:
    """The names of the values in a step's infos."""
    every = {**info, **info.get("final_info", {})}
    return [name for name in every if not name.startswith("_") and name not in ("final_obs", "final_info")]


def info_of(info: dict[str, Any], name: str, done: np.ndarray) -> Any:
    """A value [N] of a step's infos, or None.  gymnasium gives those of finished environments that have restarted
    apart."""
    found, final = info.get(name), info.get("final_info", {}).get(name)
    return found if final is None else np.where(done, final, 0.0 if found is None else found)


def batch(env: SyncVectorEnv, actions: Sequence[Any]) -> Any:
    return concatenate(env.single_action_space, actions, create_empty_array(env.single_action_space, n=len(actions)))
