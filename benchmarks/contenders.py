"""Every contender of benchmarks/peers.py, and the process that one runs in.

    python benchmarks/contenders.py <workload> <contender>

says "ready" after its warm-up, and then answers each number of seconds on its input with what it did in that time:
environment steps, seconds, iterations and gradient steps.  An iteration is a whole one: acting, environments, credit
and learning, without logging, evaluation or checkpoints.

All contenders of a workload have the same environments, batch, gradient steps and minibatches, the same layers of the
same width, actor and critic apart, tanh, Adam (A2C: RMSprop), standardized observations and one learning rate; torch's
validation of distributions is off.  They differ in this:

- pgsuite, SB3 and Tianshou scale rewards by running statistics, each in its own way; rsl_rl does not.
- pgsuite and rsl_rl standardize observations in the network, with statistics that stand still in a rollout (rsl_rl:
  one set for the actor, one for the critic); SB3 and Tianshou in the environment, with statistics that move at every
  step.
- pgsuite and Tianshou evaluate the critic once per rollout, SB3 and rsl_rl at every step.  Of rsl_rl's runner, the
  check for NaN is off.  Tianshou records gradients while it acts, as its trainer does.
- envpool spends a step of an environment's own on restarting it, which counts as a step for rsl_rl (one in 1,000 of
  HalfCheetah's); SB3 and Tianshou restart environments themselves.
- Tianshou's A2C does not normalize advantages.  Its NPG goes a fixed fraction of the natural direction.
- pgsuite's REINFORCE compares an action's return with the other episodes', Tianshou's with a running mean; both take 64
  whole episodes for one gradient step.
- "SB3, its defaults" does other work (`DEFAULTS`): what its PPO does unless told otherwise.

Of games, all contenders have the network of Mnih et al. (2015) for actor and critic alike, clipped
rewards, ale-py's vector environment with sticky actions, no scaling and no standardization.  CleanRL is a script and no
library: what stands for it is a loop of the shape of its ppo_atari_envpool.py, with a value at every step.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Iterate = Callable[[], int]  # one iteration; returns how many environment steps it made

LR, GAMMA, LAM, MAX_GRAD_NORM = 3e-4, 0.99, 0.95, 0.5
CG_ITERS, DAMPING, MAX_KL, SHRINK, TRIES = 10, 0.1, 0.01, 0.8, 10


@dataclass(frozen=True)
class Workload:
    """What all contenders of a table do."""

    env: str  # gymnasium's id
    method: str  # a class of that name in every library
    envs: int = 64
    horizon: int = 32  # of REINFORCE, a whole episode
    epochs: int = 1  # over the batch; of NPG and TRPO, their critic's
    minibatches: int = 1
    hidden: tuple[int, ...] = (64, 64)

    @property
    def game(self) -> bool:
        return self.env.startswith("ALE/")

    @property
    def batch(self) -> int:
        """Environment steps an iteration."""
        return self.envs * self.horizon

    @property
    def minibatch(self) -> int:
        return self.batch // self.minibatches

    @property
    def gradient_steps(self) -> int:
        """Of an iteration."""
        return self.epochs * self.minibatches


WORKLOADS = {
    "ppo": Workload("HalfCheetah-v5", "PPO", epochs=5, minibatches=4),
    "ant": Workload("Ant-v5", "PPO", epochs=5, minibatches=4),
    "trpo": Workload("HalfCheetah-v5", "TRPO", epochs=20),
    "npg": Workload("HalfCheetah-v5", "NPG", epochs=20),
    "a2c": Workload("HalfCheetah-v5", "A2C"),
    "reinforce": Workload("HalfCheetah-v5", "Reinforce", horizon=1000),
    "cartpole": Workload("CartPole-v1", "PPO", 4096, 64, epochs=1, minibatches=8, hidden=(128,)),
    "breakout": Workload("ALE/Breakout-v5", "PPO", 8, 128, epochs=4, minibatches=4, hidden=(512,)),
    "breakout-64": Workload("ALE/Breakout-v5", "PPO", 64, 128, epochs=4, minibatches=4, hidden=(512,)),
    "pong": Workload("ALE/Pong-v5", "PPO", 8, 128, epochs=4, minibatches=4, hidden=(512,)),
}
# Of a contender that is measured with work of its own.
DEFAULTS = {"SB3, its defaults": Workload("HalfCheetah-v5", "PPO", 1, 2048, epochs=10, minibatches=32)}


def work_of(contender: str, table: str) -> Workload:
    """What it does in a table."""
    return DEFAULTS.get(contender, WORKLOADS[table])


TAKEN = [0]  # gradient steps


def count(*_: Any) -> None:
    TAKEN[0] += 1


def counted(descend: Callable[..., Any], steps: Callable[..., int] = lambda *_: 1) -> Callable[..., Any]:
    """Our own gradient steps, which torch's hook does not hear of: so many in each call."""

    def take(*given: Any) -> Any:
        TAKEN[0] += steps(*given)
        return descend(*given)

    return take


def alone(work: Workload, step: Callable[[Any], Any]) -> Iterate:
    """pgsuite's environments, and nobody who learns."""
    from pgsuite.envs import make

    env = make(work.env, work.envs, seed=1)
    env.reset()

    def iterate() -> int:
        for _ in range(work.horizon):
            step(env)
        return work.batch

    return iterate


def physics(env: Any) -> None:
    """The batch stepper, with fresh random actions."""
    env.task.physics.ctrl.uniform_(-1, 1)
    env.task.physics.step(env.task.frame_skip)


def environment(env: Any) -> None:
    """With fresh random actions, rewards, endings and restarts."""
    env.step(torch.randint(env.action_space.n, (env.num_envs,)))


def pgsuite(work: Workload, execution: str = "eager", one_body: bool = False, precision: Any = "float32") -> Iterate:
    from pgsuite import algorithms, seeding
    from pgsuite.envs import Atari, make
    from pgsuite.execution.modes import execute
    from pgsuite.execution.precision import lower
    from pgsuite.nn.normalize import ClipReward, RewardScale, Standardize
    from pgsuite.nn.policy import Critic, Policy

    env = make(Atari(game=work.env[4:-3]) if work.game else work.env, work.envs, seed=1)
    generator = seeding.generator(0, "networks")
    norm = Standardize(env.observation_space)
    look = {"hidden": work.hidden, "activation": "relu" if work.game else "tanh"}
    policy = Policy(norm, env.action_space, **look, generator=generator)
    scale = ClipReward(work.envs, 1.0) if work.game else RewardScale(work.envs)
    parts: dict[str, Any] = {"policy": policy, "reward_scale": scale, "generator": generator}
    if work.method != "Reinforce":
        shared = policy if one_body or work.game else None
        parts["critic"] = Critic(norm, shared=shared, **look, generator=generator)
    natural = {"critic_lr": LR, "critic_epochs": work.epochs, "critic_minibatches": work.minibatches}
    natural |= {"fisher": "gauss-newton" if execution == "compile" else "double-backward"}  # the same, to rounding
    natural |= {"cg_iters": CG_ITERS, "damping": DAMPING, "max_kl": MAX_KL}
    settings = {
        "PPO": {"lr": LR, "epochs": work.epochs, "minibatches": work.minibatches, "max_grad_norm": MAX_GRAD_NORM},
        "A2C": {"lr": LR, "max_grad_norm": MAX_GRAD_NORM},
        "TRPO": natural | {"backtrack_coef": SHRINK, "max_backtracks": TRIES},
        "NPG": natural,
        "Reinforce": {"lr": LR},
    }[work.method]
    algorithm = getattr(algorithms, work.method)(**parts, **settings, gamma=GAMMA)
    collector = algorithm.collector(env, work.horizon)
    lower(algorithm, env.device, precision)
    execute(algorithm, collector, execution)
    for optimizer in algorithm.optimizers:
        optimizer.step = counted(optimizer.step)
    if algorithm.fit.run != algorithm.fit.function:  # all steps are one graph, without the optimizer's method
        algorithm.fit.run = counted(algorithm.fit.run, lambda *given: given[-2] * given[-1])  # epochs, minibatches

    def iterate() -> int:
        algorithm.iterate(collector)
        return work.batch

    return iterate


def pool(work: Workload) -> Any:
    """envpool's environments, on every core."""
    import envpool

    return envpool.make_gymnasium(work.env, num_envs=work.envs, batch_size=work.envs, seed=1)


def screens(work: Workload) -> Any:
    """ale-py's games, on every core."""
    from ale_py.vector_env import AtariVectorEnv

    name = "".join("_" * (c.isupper() and i > 0) + c.lower() for i, c in enumerate(work.env[4:-3]))
    return AtariVectorEnv(name, work.envs, autoreset_mode="SameStep", repeat_action_probability=0.25)


def rsl_rl(work: Workload, compile_mode: str | None = None) -> Iterate:
    from rsl_rl.env import VecEnv
    from rsl_rl.runners import OnPolicyRunner
    from tensordict import TensorDict

    class Pool(VecEnv):
        def __init__(self) -> None:
            self.pool, self.cfg, self.device = pool(work), {}, "cpu"
            self.num_envs, self.num_actions = work.envs, self.pool.action_space.shape[0]
            self.max_episode_length = self.pool.config["max_episode_steps"]
            self.episode_length_buf = torch.zeros(work.envs, dtype=torch.long)
            self.obs = self.tensors(self.pool.reset()[0])

        def tensors(self, obs: np.ndarray) -> TensorDict:
            return TensorDict({"policy": torch.from_numpy(obs).float()}, batch_size=work.envs)

        def get_observations(self) -> TensorDict:
            return self.obs

        def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
            obs, reward, terminated, truncated, _ = self.pool.step(actions.clamp(-1, 1).numpy())
            self.obs = self.tensors(obs)
            over = torch.from_numpy(terminated | truncated).long()
            return self.obs, torch.from_numpy(reward).float(), over, {"time_outs": torch.from_numpy(truncated)}

    network = {"class_name": "MLPModel", "hidden_dims": work.hidden, "activation": "tanh", "obs_normalization": True}
    learning = {"class_name": "PPO", "num_learning_epochs": work.epochs, "num_mini_batches": work.minibatches}
    learning |= {"schedule": "fixed", "learning_rate": LR, "gamma": GAMMA, "lam": LAM, "max_grad_norm": MAX_GRAD_NORM}
    learning |= {"entropy_coef": 0.0, "value_loss_coef": 0.5, "use_clipped_value_loss": False}
    settings = {
        "num_steps_per_env": work.horizon,
        "save_interval": 10**9,
        "check_for_nan": False,
        "torch_compile_mode": compile_mode,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": network | {"distribution_cfg": {"class_name": "GaussianDistribution"}},
        "critic": network,
        "algorithm": learning | {"normalize_advantage_per_mini_batch": True},
    }
    runner = OnPolicyRunner(Pool(), settings, log_dir=None, device="cpu")

    def iterate() -> int:
        runner.learn(1)
        return work.batch

    return iterate


def sb3(work: Workload, on: str = "DummyVecEnv") -> Iterate:
    """SB3's methods, and sb3-contrib's TRPO."""
    import stable_baselines3
    from sb3_contrib import TRPO
    from stable_baselines3.common import vec_env

    class Pool(vec_env.VecEnv):
        """SB3 wants the first observation of the next episode from a last step, and the true one in its info."""

        def __init__(self) -> None:
            self.pool = pool(work)
            super().__init__(work.envs, self.pool.observation_space, self.pool.action_space)
            self.nothing: list[dict[str, Any]] = [{} for _ in range(work.envs)]

        def reset(self) -> np.ndarray:
            return self.pool.reset()[0]

        def step_async(self, actions: np.ndarray) -> None:
            self.pool.send(actions)

        def step_wait(self) -> Any:
            obs, reward, terminated, truncated, _ = self.pool.recv()
            over, infos = terminated | truncated, self.nothing
            if over.any():
                infos, ids = infos.copy(), np.flatnonzero(over)
                for i in ids:
                    cut = bool(truncated[i] and not terminated[i])
                    infos[i] = {"terminal_observation": obs[i].copy(), "TimeLimit.truncated": cut}
                obs[ids] = self.pool.reset(ids)[0]
            return obs, reward, over, infos

        def close(self) -> None: ...

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [None] * work.envs

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            return [None] * work.envs

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * work.envs

    class Games(Pool):
        def __init__(self) -> None:
            self.games = screens(work)
            vec_env.VecEnv.__init__(
                self, work.envs, self.games.single_observation_space, self.games.single_action_space
            )
            self.nothing: list[dict[str, Any]] = [{} for _ in range(work.envs)]

        def reset(self) -> np.ndarray:
            return self.games.reset()[0]

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = actions

        def step_wait(self) -> Any:
            obs, reward, terminated, truncated, info = self.games.step(self.actions)
            over, infos = terminated | truncated, self.nothing
            if over.any():
                infos = infos.copy()
                for i in np.flatnonzero(over):
                    cut = bool(truncated[i] and not terminated[i])
                    infos[i] = {"terminal_observation": info["final_obs"][i], "TimeLimit.truncated": cut}
            return obs, reward.astype(np.float32), over, infos

    each = [partial(gymnasium.make, work.env)] * work.envs
    env = (
        Games()
        if work.game
        else vec_env.VecNormalize(Pool() if on == "envpool" else getattr(vec_env, on)(each), gamma=GAMMA)
    )
    look = {} if work.game else {"net_arch": list(work.hidden), "activation_fn": nn.Tanh}
    shared = {"learning_rate": LR, "n_steps": work.horizon, "gamma": GAMMA, "gae_lambda": LAM, "policy_kwargs": look}
    learning: dict[str, Any] = {
        "PPO": {"batch_size": work.minibatch, "n_epochs": work.epochs, "max_grad_norm": MAX_GRAD_NORM},
        "A2C": {"normalize_advantage": True, "max_grad_norm": MAX_GRAD_NORM},
        "TRPO": {"batch_size": work.minibatch, "n_critic_updates": work.epochs, "cg_max_steps": CG_ITERS}
        | {"cg_damping": DAMPING, "line_search_shrinking_factor": SHRINK, "line_search_max_iter": TRIES}
        | {"target_kl": MAX_KL},
    }[work.method]
    cls = TRPO if work.method == "TRPO" else getattr(stable_baselines3, work.method)
    model = cls("CnnPolicy" if work.game else "MlpPolicy", env, device="cpu", seed=1, **shared, **learning)

    def iterate() -> int:
        model.learn(work.batch, log_interval=None, reset_num_timesteps=False)
        return work.batch

    return iterate


def cleanrl(work: Workload) -> Iterate:
    """The shape of CleanRL's ppo_atari_envpool.py."""
    games = screens(work)
    actions, shape = int(games.single_action_space.n), games.single_observation_space.shape

    def layer(module: Any, gain: float = 2**0.5) -> Any:
        nn.init.orthogonal_(module.weight, gain)
        nn.init.zeros_(module.bias)
        return module

    body = nn.Sequential(
        *(layer(nn.Conv2d(4, 32, 8, 4)), nn.ReLU(), layer(nn.Conv2d(32, 64, 4, 2)), nn.ReLU()),
        *(layer(nn.Conv2d(64, 64, 3, 1)), nn.ReLU(), nn.Flatten(), layer(nn.Linear(3136, work.hidden[0])), nn.ReLU()),
    )
    actor, critic = layer(nn.Linear(work.hidden[0], actions), 0.01), layer(nn.Linear(work.hidden[0], 1), 1.0)
    params = [*body.parameters(), *actor.parameters(), *critic.parameters()]
    adam = torch.optim.Adam(params, lr=LR, eps=1e-5)
    obs = torch.zeros(work.horizon, work.envs, *shape)
    taken = torch.zeros(work.horizon, work.envs, dtype=torch.long)
    logp, reward, value, ended = (torch.zeros(work.horizon, work.envs) for _ in range(4))
    now = [torch.Tensor(games.reset()[0]), torch.zeros(work.envs)]

    def look(screen: torch.Tensor) -> tuple[torch.distributions.Categorical, torch.Tensor]:
        features = body(screen / 255.0)
        return torch.distributions.Categorical(logits=actor(features)), critic(features).flatten()

    def iterate() -> int:
        for t in range(work.horizon):
            obs[t], ended[t] = now
            with torch.no_grad():
                dist, value[t] = look(obs[t])
                taken[t] = dist.sample()
                logp[t] = dist.log_prob(taken[t])
            screen, paid, terminated, truncated, _ = games.step(taken[t].numpy())
            reward[t] = torch.tensor(paid)
            now[:] = torch.Tensor(screen), torch.Tensor(terminated | truncated)
        with torch.no_grad():
            after, over, last = look(now[0])[1], now[1], 0
            advantage = torch.zeros_like(reward)
            for t in reversed(range(work.horizon)):
                delta = reward[t] + GAMMA * after * (1 - over) - value[t]
                advantage[t] = last = delta + GAMMA * LAM * (1 - over) * last
                after, over = value[t], ended[t]
            target = advantage + value
        flat = [x.flatten(0, 1) for x in (obs, taken, logp, advantage, target)]
        for _ in range(work.epochs):
            for index in torch.randperm(work.batch).split(work.minibatch):
                screen, action, before, gain, aim = (x[index] for x in flat)
                dist, guess = look(screen)
                ratio = (dist.log_prob(action) - before).exp()
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                loss = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
                loss = loss + 0.5 * ((guess - aim) ** 2).mean() - 0.01 * dist.entropy().mean()
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
                adam.step()
        return work.batch

    return iterate


def tianshou(work: Workload, on: str = "DummyVectorEnv") -> Iterate:
    from tianshou.algorithm import modelfree
    from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy, ProbabilisticActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory, RMSpropOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv, VectorEnvNormObs
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
    from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
    from tianshou.utils.torch_utils import policy_within_training_step, torch_train_mode
    from torch.distributions import Independent, Normal

    one = gymnasium.make(work.env)
    sight, actions = one.observation_space, one.action_space
    bodies = [Net(state_shape=sight.shape, hidden_sizes=work.hidden, activation=nn.Tanh) for _ in range(2)]
    if isinstance(actions, gymnasium.spaces.Box):
        actor = ContinuousActorProbabilistic(preprocess_net=bodies[0], action_shape=actions.shape, unbounded=True)
        critic: nn.Module = ContinuousCritic(preprocess_net=bodies[1])
        policy = ProbabilisticActorPolicy(
            actor=actor, dist_fn=lambda x: Independent(Normal(*x), 1), action_space=actions, action_scaling=True
        )
    else:
        actor = DiscreteActor(preprocess_net=bodies[0], action_shape=actions.n, softmax_output=False)
        critic = DiscreteCritic(preprocess_net=bodies[1])
        policy = DiscreteActorPolicy(actor=actor, action_space=actions)
    optim = RMSpropOptimizerFactory(lr=LR, eps=1e-5) if work.method == "A2C" else AdamOptimizerFactory(lr=LR, eps=1e-5)
    critical = {"critic": critic, "gae_lambda": LAM, "return_scaling": True, "max_batchsize": work.batch}
    descent = {"vf_coef": 0.5, "ent_coef": 0.0, "max_grad_norm": MAX_GRAD_NORM}
    natural = {"optim_critic_iters": work.epochs}
    settings: dict[str, Any] = {
        "PPO": critical | descent,
        "A2C": critical | descent,
        "TRPO": critical | natural | {"max_kl": MAX_KL, "backtrack_coeff": SHRINK, "max_backtracks": TRIES},
        "NPG": critical | natural | {"trust_region_size": 0.1},
        "Reinforce": {"return_standardization": True},
    }[work.method]
    algorithm = getattr(modelfree, work.method.lower())
    algorithm = getattr(algorithm, work.method)(policy=policy, optim=optim, gamma=GAMMA, **settings)
    envs = pool(work) if on == "envpool" else DummyVectorEnv([partial(gymnasium.make, work.env)] * work.envs)
    collector = Collector(policy, VectorEnvNormObs(envs), VectorReplayBuffer(work.batch, work.envs))
    collector.reset()
    amount = {"n_episode": work.envs} if work.method == "Reinforce" else {"n_step": work.batch}
    repeat = work.epochs if work.method == "PPO" else 1

    def iterate() -> int:
        with policy_within_training_step(policy):
            collected = collector.collect(**amount)
            with torch_train_mode(policy):
                algorithm.update(buffer=collector.buffer, batch_size=work.minibatch, repeat=repeat)
        collector.reset_buffer(keep_statistics=True)
        return collected.n_collected_steps

    return iterate


CONTENDERS: dict[str, Callable[[Workload], Iterate]] = {
    "physics alone": partial(alone, step=physics),
    "environment alone": partial(alone, step=environment),
    "pgsuite": pgsuite,
    "pgsuite, compile": partial(pgsuite, execution="compile"),
    "pgsuite, compile, bfloat16": partial(pgsuite, execution="compile", precision="bf16"),
    "pgsuite, compile, one body": partial(pgsuite, execution="compile", one_body=True),
    "rsl_rl on envpool": rsl_rl,
    "rsl_rl on envpool, compile": partial(rsl_rl, compile_mode="default"),
    "SB3 on DummyVecEnv": sb3,
    "SB3 on SubprocVecEnv": partial(sb3, on="SubprocVecEnv"),
    "SB3 on envpool": partial(sb3, on="envpool"),
    "SB3, its defaults": sb3,
    "SB3 on ale-py": sb3,
    "CleanRL's shape on ale-py": cleanrl,
    "Tianshou on DummyVectorEnv": tianshou,
    "Tianshou on envpool": partial(tianshou, on="envpool"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.distributions.Distribution.set_default_validate_args(False)
    register_optimizer_step_post_hook(count)
    iterate = CONTENDERS[args.contender](work_of(args.contender, args.workload))

    def run(seconds: float) -> dict[str, float]:
        steps, iterations, TAKEN[0], began, cpu = 0, 0, 0, perf_counter(), process_time()
        while (now := perf_counter()) - began < seconds:
            steps, iterations = steps + iterate(), iterations + 1
        spent = {"seconds": now - began, "cpu": process_time() - cpu}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return spent | {"steps": steps, "iterations": iterations, "gradient_steps": TAKEN[0], "memory": memory}

    iterate()
    run(1.0)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(float(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
