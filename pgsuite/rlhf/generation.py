"""Generation of responses to prompts, and their collection as rollouts."""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from pgsuite.envs.base import VectorEnv
from pgsuite.kernel import phase
from pgsuite.nn.policy import Policy
from pgsuite.rlhf.policy import TokenBody
from pgsuite.rollout.collect import Collector
from pgsuite.types import Rollout


class Generated(NamedTuple):
    """Prompts [P, N] with their responses of up to L tokens."""

    tokens: Tensor  # [P + L, N]
    logp: Tensor  # [L, N] of each token of the response
    written: Tensor  # [L, N] bool, true up to and including the stop token


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Tensor,
    real: Tensor,
    length: int,
    stop: int,
    generator: Generator | None = None,
    *,
    pad: int = 0,
    poll: int = 8,
    deterministic: bool = False,
) -> Generated:
    """Generate responses of up to ``length`` tokens to left-padded prompts [P, N], whose real tokens are ``real``
    [P, N].  Every ``poll`` tokens one bit is read back to the host: whether any response is unfinished."""
    body = policy.body
    assert isinstance(body, TokenBody)
    width, columns = prompts.shape
    tokens = torch.cat([prompts, prompts.new_full((length, columns), pad)])
    logp = torch.zeros(length, columns, device=prompts.device)
    written = torch.zeros(length, columns, dtype=torch.bool, device=prompts.device)
    hidden_state = body.read(prompts[:-1], real[:-1])
    live, start = torch.ones_like(real[0]), ~real[:-1].any(0)
    for i in range(length):
        if i and i % poll == 0 and not bool(live.any()):
            break
        choice = policy.act(tokens[width + i - 1], hidden_state, start, generator, deterministic=deterministic)
        tokens[width + i] = torch.where(live, choice.action, pad)
        logp[i], written[i] = choice.logp.where(live, 0.0), live
        live, hidden_state, start = live & (choice.action != stop), choice.hidden_state, torch.zeros_like(start)
    return Generated(tokens, logp, written)


@runtime_checkable
class PromptEnv(Protocol):
    """Vector environments that give prompts and score responses to them, beside what every VectorEnv has."""

    length: int  # the greatest number of tokens of a response
    stop: int  # the token that ends a response
    pad: int  # the token that fills prompts up and follows the end of a response

    def prompts(self) -> tuple[Tensor, Tensor]:
        """The prompts [P, N] of the next N responses, and the mask of real tokens."""
        ...

    def score(self, tokens: Tensor, written: Tensor) -> Tensor:
        """The reward [L, N] of each response token in texts [P + L, N]; ``written`` [L, N] is the mask of real ones."""
        ...


class GenerationCollector(Collector):
    """Collects a response to each of N prompts, as an episode: steps are the positions of a text, observations its
    tokens, and actions the next tokens.

    T = prompt width + longest response - 1.  Positions of the prompt, whose tokens the policy did not choose, are
    masked, and so are those after the stop token, which is the last action.  A response that reaches the greatest
    length is terminated there: it is scored as it is, without bootstrap.  The rollout holds no hidden states, since
    every text begins in it.
    """

    whole_episodes = True
    supports_overlap = False

    def __init__(self, env: VectorEnv, horizon: int, seed: int = 0) -> None:
        """Raises ValueError unless env is a PromptEnv and the horizon its number of positions."""
        super().__init__(env, horizon, seed)
        if not isinstance(env, PromptEnv):
            raise ValueError(f"responses are generated for prompts, and {env.name} has none")
        self.prompt_env: PromptEnv = env
        if horizon != env.max_episode_steps:
            raise ValueError(f"the texts of {env.name} have {env.max_episode_steps} positions: leave horizon out")

    def validate(self, policy: Policy) -> None:
        if not isinstance(policy.body, TokenBody):
            raise ValueError(f"{self.env.name}: responses are written by language models: give policy=language_model")

    def _collect(self, policy: Policy) -> Rollout:
        env, began = self.prompt_env, perf_counter()
        prompts, real = env.prompts()
        drawn = perf_counter()
        with phase("generate"):
            text = generate(policy, prompts, real, env.length, env.stop, self.generator, pad=env.pad)
        acted = perf_counter()
        reward = env.score(text.tokens, text.written)
        self.seconds["acting"] += acted - drawn
        self.seconds["environment"] += drawn - began + perf_counter() - acted

        blank = torch.zeros_like(real[1:])
        mask = torch.cat([blank, text.written])
        started = torch.cat([real, torch.ones_like(text.written)]).cumsum(0) > 0
        row = Rollout(
            obs=text.tokens[:-1],
            hidden_state={},
            start=(started & ~torch.cat([torch.zeros_like(started[:1]), started[:-1]]))[:-1],
            action=text.tokens[1:],
            logp=torch.cat([blank.to(text.logp), text.logp]),
            reward=torch.cat([blank.to(reward), reward]),
            next_obs=text.tokens[1:],
            terminated=mask & ~torch.cat([mask[1:], torch.zeros_like(mask[:1])]),
            truncated=torch.zeros_like(mask),
            mask=mask,
        )
        self.buffer.set(row)
        self.started = True
        return self.buffer.read()

    def state_dict(self) -> dict[str, object]:
        return {"env": self.env.state_dict(), "generator": self.generator.get_state(), "begun": False}
