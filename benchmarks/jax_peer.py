"""A peer in JAX: PPO on CartPole-v1, whose whole training is one compiled program on the device.

    pip install jax optax
    python benchmarks/jax_peer.py [--envs 4] [--total-steps 500_000] [--seeds 1] [--seed 0]

Written in jax and optax alone, from the published shape of PureJaxRL's PPO: policy and critic of two layers of 64 tanh
each, rollouts of 128 steps, 4 epochs of 4 minibatches, Adam at 2.5e-4 that decays to 0, gradients clipped to 0.5, an
entropy bonus of 0.01.  As there, a time limit counts as a termination.  ``train`` is pure, so ``jax.vmap`` over its key
trains many seeds at once.  Prints one line of JSON: seconds that compiling and training took, environment steps/s of
all seeds together, and each seed's mean return of the episodes that ended in its last ten rollouts.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

HORIZON, EPOCHS, MINIBATCHES, HIDDEN = 128, 4, 4, (64, 64)
GAMMA, LAMBDA, CLIP, VALUE_COEF, ENTROPY_COEF, LR, MAX_GRAD_NORM = 0.99, 0.95, 0.2, 0.5, 0.01, 2.5e-4, 0.5
WORLDS = {"cuda": (64, 1024, 4), "cpu": (4,)}  # of the comparison on one device
RECENT = 10  # rollouts whose episodes the return is the mean of


class World(NamedTuple):
    """Environments, each of which starts anew within the step that ends an episode."""

    state: Any  # [N, 4] position, velocity, angle, angular velocity
    clock: Any  # [N] steps since the start of the episode


class Cells(NamedTuple):
    """What learning needs of each step; [T, N], then flat."""

    obs: Any
    action: Any
    logp: Any
    value: Any
    advantage: Any
    target: Any


def fresh(key: Any, envs: int) -> Any:
    return jax.random.uniform(key, (envs, 4), minval=-0.05, maxval=0.05)


def step(key: Any, world: World, action: Any) -> tuple[World, Any]:
    """CartPole-v1 of gymnasium: Euler steps of 0.02 s, a reward of one for each.  Returns done [N] besides."""
    x, v, angle, spin = world.state.T
    force = jnp.where(action == 1, 10.0, -10.0)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (force + 0.05 * spin**2 * sin) / 1.1  # half a pole of 0.5 m and 0.1 kg, on a cart of 1 kg
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    shove = push - 0.05 * turn * cos / 1.1
    state = jnp.stack([x + 0.02 * v, v + 0.02 * shove, angle + 0.02 * spin, spin + 0.02 * turn], -1)
    clock = world.clock + 1
    fell = (jnp.abs(state[:, 0]) > 2.4) | (jnp.abs(state[:, 2]) > 12 * math.pi / 180)
    done = fell | (clock >= 500)
    state = jnp.where(done[:, None], fresh(key, len(done)), state)
    return World(state, jnp.where(done, 0, clock)), done


def network(key: Any, sizes: tuple[int, ...], last: float) -> list[tuple[Any, Any]]:
    """Orthogonal layers of gain sqrt(2), the last of a gain of its own, and zero biases."""
    gains = [math.sqrt(2)] * (len(sizes) - 2) + [last]
    shapes = zip(jax.random.split(key, len(gains)), gains, sizes[:-1], sizes[1:], strict=True)
    return [(jax.nn.initializers.orthogonal(gain)(k, (m, n)), jnp.zeros(n)) for k, gain, m, n in shapes]


def apply(layers: list[tuple[Any, Any]], x: Any) -> Any:
    for weight, bias in layers[:-1]:
        x = jnp.tanh(x @ weight + bias)
    return x @ layers[-1][0] + layers[-1][1]


def loss(networks: dict[str, Any], cells: Cells) -> Any:
    logits = jax.nn.log_softmax(apply(networks["policy"], cells.obs))
    logp = jnp.take_along_axis(logits, cells.action[:, None], -1)[:, 0]
    value = apply(networks["critic"], cells.obs)[:, 0]
    advantage = (cells.advantage - cells.advantage.mean()) / (cells.advantage.std() + 1e-8)
    ratio = jnp.exp(logp - cells.logp)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage).mean()
    near = cells.value + jnp.clip(value - cells.value, -CLIP, CLIP)
    error = 0.5 * jnp.maximum((value - cells.target) ** 2, (near - cells.target) ** 2).mean()
    entropy = -(jnp.exp(logits) * logits).sum(-1).mean()
    return VALUE_COEF * error - gain - ENTROPY_COEF * entropy


def train(key: Any, envs: int, updates: int) -> tuple[Any, Any]:
    """Sum of the returns and number of the episodes that ended in each rollout, [updates] each."""
    key, *keys = jax.random.split(key, 4)
    sizes = (4, *HIDDEN)
    networks = {"policy": network(keys[0], (*sizes, 2), 0.01), "critic": network(keys[1], (*sizes, 1), 1.0)}
    rate = optax.linear_schedule(LR, 0.0, updates * EPOCHS * MINIBATCHES)
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adam(rate, eps=1e-5))

    def act(carry: Any, key: Any) -> tuple[Any, Any]:
        networks, world = carry
        choose, restart = jax.random.split(key)
        logits = jax.nn.log_softmax(apply(networks["policy"], world.state))
        action = jax.random.categorical(choose, logits)
        logp = jnp.take_along_axis(logits, action[:, None], -1)[:, 0]
        value = apply(networks["critic"], world.state)[:, 0]
        after, done = step(restart, world, action)
        return (networks, after), (world.state, action, logp, value, done, world.clock + 1)

    def back(carry: Any, row: Any) -> tuple[Any, Any]:
        advantage, next_value = carry
        value, live = row
        advantage = 1 + GAMMA * live * next_value - value + GAMMA * LAMBDA * live * advantage
        return (advantage, value), advantage

    def learn(carry: Any, cells: Cells) -> tuple[Any, None]:
        networks, moments = carry
        change, moments = optimizer.update(jax.grad(loss)(networks, cells), moments)
        return (optax.apply_updates(networks, change), moments), None

    def epoch(carry: Any, key: Any, cells: Cells) -> tuple[Any, None]:
        order = jax.random.permutation(key, HORIZON * envs).reshape(MINIBATCHES, -1)
        return jax.lax.scan(learn, carry, jax.tree.map(lambda x: x[order], cells))

    def update(carry: Any, key: Any) -> tuple[Any, Any]:
        networks, moments, world = carry
        acting, shuffling = jax.random.split(key)
        rollout = jax.lax.scan(act, (networks, world), jax.random.split(acting, HORIZON))
        (_, world), (obs, action, logp, value, done, length) = rollout
        last = apply(networks["critic"], world.state)[:, 0]
        _, advantage = jax.lax.scan(back, (jnp.zeros(envs), last), (value, 1.0 - done), reverse=True)
        cells = Cells(obs, action, logp, value, advantage, advantage + value)
        cells = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), cells)
        passes = jax.random.split(shuffling, EPOCHS)
        (networks, moments), _ = jax.lax.scan(partial(epoch, cells=cells), (networks, moments), passes)
        return (networks, moments, world), ((done * length).sum(), done.sum())

    world = World(fresh(keys[2], envs), jnp.zeros(envs, int))
    begin = (networks, optimizer.init(networks), world)
    return jax.lax.scan(update, begin, jax.random.split(key, updates))[1]


def measure(envs: int, updates: int, seeds: int = 1, seed: int = 0) -> dict[str, Any]:
    """Train ``seeds`` runs at once, in one compiled program."""
    key, run = jax.random.key(seed), partial(train, envs=envs, updates=updates)
    key, run = (key, run) if seeds == 1 else (jax.random.split(key, seeds), jax.vmap(run))
    began = perf_counter()
    program = jax.jit(run).lower(key).compile()
    compiled = perf_counter()
    returns, episodes = jax.block_until_ready(program(key))
    took = perf_counter() - compiled
    recent = returns[..., -RECENT:].sum(-1) / jnp.maximum(1, episodes[..., -RECENT:].sum(-1))
    steps = seeds * updates * envs * HORIZON
    result = {"worlds": envs, "seeds": seeds, "steps": steps, "compile": compiled - began, "took": took}
    return result | {"steps/s": steps / took, "return": [round(x, 1) for x in jnp.atleast_1d(recent).tolist()]}


def peer(job: str, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """For benchmarks/gpu.py: the speed at several numbers of environments, without compilation."""
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        yield {"skipped": "jax sees no GPU"}
        return
    for envs in WORLDS[device]:
        yield {"what": "jax", "jax": jax.__version__} | measure(envs, 200 if device == "cuda" else 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=int, default=4, help="environments of each seed")
    parser.add_argument("--total-steps", type=int, default=500_000, help="of each seed")
    parser.add_argument("--seeds", type=int, default=1, help="runs at once, by vmap")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    updates = max(1, args.total_steps // (args.envs * HORIZON))
    devices = {"jax": jax.__version__, "device": str(jax.devices()[0].device_kind)}
    print(json.dumps(measure(args.envs, updates, args.seeds, args.seed) | devices), flush=True)


if __name__ == "__main__":
    main()
