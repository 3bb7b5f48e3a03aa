"""Generation of responses to prompts, and their collection as rollouts."""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from pgsuite.envs.base import VectorEnv
from pgsuite.kernel import phase
from pgsuite.nn.policy import Policy
from pgsuite.rlhf.policy import TokenBody, prompt_state
from pgsuite.rollout.collect import Collector
from pgsuite.types import Rollout


class Generated(NamedTuple):
    """Prompts [P, N] with their responses.  L is the greatest number of tokens of a response, or where all responses
    ended earlier, the number that was generated."""

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
    fixed_shape: bool = False,
) -> Generated:
    """Generate responses of up to ``length`` tokens to left-padded prompts [P, N], whose real tokens are ``real``
    [P, N].  Every ``poll`` tokens one bit is read back to the host: whether any response is unfinished.
    With ``fixed_shape`` the result has L = ``length`` rows even if none is."""
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
            rows = length if fixed_shape else i
            return Generated(tokens[: width + rows], logp[:rows], written[:rows])
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
    """Collects a response to each of N prompts, as an episode: observations are tokens, and actions the next tokens.

    The first observation is the last token of the prompt; the preceding ones are the hidden state of the policy, as
    tokens, since learning reads them again.  So the rollout has a row for each token of the longest response, and is
    as wide as its own longest prompt: logits, values and advantages are computed for responses only.  Cells after the
    stop token, which is the last action, are masked.  A response that reaches the greatest length is terminated there:
    it is scored as it is, without bootstrap.
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
        if self.fixed_shape:
            missing = self.horizon + 1 - env.length - len(prompts)
            prompts = torch.cat([prompts.new_full((missing, prompts.shape[1]), env.pad), prompts])
            real = torch.cat([real.new_zeros(missing, real.shape[1]), real])
        drawn = perf_counter()
        with phase("generate"):
            options = {"pad": env.pad, "fixed_shape": self.fixed_shape}
            text = generate(policy, prompts, real, env.length, env.stop, self.generator, **options)
        acted = perf_counter()
        reward = env.score(text.tokens, text.written)
        self.seconds["acting"] += acted - drawn
        self.seconds["environment"] += drawn - began + perf_counter() - acted

        first, mask = len(prompts) - 1, text.written
        start = torch.zeros_like(mask)
        start[0] = True
        row = Rollout(
            obs=text.tokens[first:-1],
            hidden_state=prompt_state(prompts[:-1], real[:-1], len(mask)),
            start=start,
            action=text.tokens[first + 1 :],
            logp=text.logp,
            reward=reward,
            next_obs=text.tokens[first + 1 :],
            terminated=mask & ~torch.cat([mask[1:], torch.zeros_like(mask[:1])]),
            truncated=torch.zeros_like(mask),
            mask=mask,
        )
        self.buffer.set(row)
        self.started = True
        return self.buffer.read()

    def state_dict(self) -> dict[str, object]:
        return {"env": self.env.state_dict(), "generator": self.generator.get_state(), "begun": False}
