"""Policies as modules of named tensors, which other runtimes can execute."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

from pgsuite.app.build import versions
from pgsuite.app.policy_io import Restored
from pgsuite.envs.spaces import is_image, leaves, to_data
from pgsuite.errors import UserError
from pgsuite.nn.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Gaussian,
    Joined,
    MultiCategorical,
    Reparameterized,
    Squashed,
)

Named = dict[str, Tensor]


class Portable(nn.Module):
    """A policy as a function of named tensors, from observations to actions of an environment.

    Inputs: ``obs`` [N, *O], or each entry of a dictionary by its path; ``memory`` [N, H], the hidden state of a
    recurrent policy, zero at the start of an episode; ``noise`` [N, K], distributed as ``law``.  Outputs: ``action``
    [N, *A], the mode; ``sample`` [N, *A], a sample as a function of the noise; the parameters of the distribution;
    ``next_memory`` [N, H].

    Distributions that are not reparameterized, such as Beta and joined ones, have neither ``noise`` nor ``sample``.
    Actions of a dictionary or tuple are the numbers of its parts, one after the other in the order of the space.

    Raises UserError if an entry of the observation has the name of another input or of an output.
    """

    def __init__(self, restored: Restored) -> None:
        super().__init__()
        self.policy, self.interface = restored.policy, restored.interface
        self.parts = {path or "obs": space for path, space, _ in leaves(self.interface.observation_space)}
        self.remembers = self.policy.sequential
        taken = {"action", "sample", "noise", "memory", "next_memory"} & self.parts.keys()
        if taken:
            raise UserError(f"an observation's part is named {taken.pop()!r}, as is what the file takes or gives")
        dist = self.look(self.example(2))[0]
        self.law = dist.noise_distribution if isinstance(dist, Reparameterized) else None
        self.noises = dist.noise().shape[1:] if isinstance(dist, Reparameterized) else None

    def forward(self, inputs: Named) -> Named:
        dist, hidden_state = self.look(inputs)
        outputs = {"action": self.interface.action(dist.mode())}
        if isinstance(dist, Reparameterized):
            outputs["sample"] = self.interface.action(dist.from_noise(inputs["noise"]))
        outputs |= parameters(dist)
        return outputs | ({"next_memory": hidden_state} if hidden_state is not None else {})

    def look(self, inputs: Named) -> tuple[Distribution, Tensor | None]:
        """The action distribution, and the next hidden state [N, H], None for feed-forward policies."""
        obs = self.interface.read(nested(self.interface.observation_space, inputs))
        hidden_state, start = {}, torch.zeros(1, dtype=torch.bool)
        if self.remembers:
            hidden_state = {self.policy.body.name: inputs["memory"]}
        features, after = self.policy.body.step(obs, hidden_state, start)
        return self.policy.distribution(features, obs), after.get(self.policy.body.name)

    def example(self, count: int, seed: int = 0) -> Named:
        """Random observations of ``count`` environments and initial hidden states, by name."""
        space = batch_space(self.interface.observation_space, count)
        space.seed(seed)
        given = {
            path or "obs": as_input(part, torch.as_tensor(x))
            for path, part, x in leaves(self.interface.observation_space, space.sample())
        }
        if self.remembers:
            given |= {"memory": self.policy.initial_state(count)[self.policy.body.name]}
        return given

    def metadata(self, restored: Restored) -> dict[str, Any]:
        """Metadata of the file, JSON-serializable: environment, spaces, distribution of the noise, versions."""
        env = restored.config["env"]
        return {
            "environment": env.get("id") or env.get("entry") or env["_target_"].rpartition(".")[2],
            "steps": restored.steps,
            "observation_space": to_data(self.interface.observation_space),
            "action_space": to_data(self.interface.action_space),
            "normalizer": "inside" if restored.config["standardize_obs"] else "none",
            "noise": self.law,
            "memory": list(self.policy.initial_state(1)[self.policy.body.name].shape[1:]) if self.remembers else None,
            "checkpoint": restored.path.name,
            "versions": versions(),
        }


def parameters(dist: Distribution) -> Named:
    """Parameters of a distribution by their usual names; none for unknown distributions."""
    match dist:
        case Squashed():
            return parameters(dist.base)  # before tanh
        case Gaussian():
            return {"mean": dist.mean, "sigma": dist.log_sigma.exp().expand_as(dist.mean)}
        case Beta():
            return {"alpha": dist.alpha, "beta": dist.beta}
        case Categorical() | Bernoulli():
            return {"logits": dist.logits}
        case MultiCategorical():
            return {"logits": torch.cat(dist.logits, -1)}
        case Joined():
            each = zip(dist.slots, dist.parts, strict=True)
            return {f"{slot.name}.{name}": x for slot, part in each for name, x in parameters(part).items()}
    return {}


def nested(space: spaces.Space[Any], inputs: Named, path: tuple[str, ...] = ()) -> Any:
    """Named tensors as an observation of a space."""
    if isinstance(space, spaces.Dict):
        return {key: nested(part, inputs, (*path, str(key))) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(nested(part, inputs, (*path, str(i))) for i, part in enumerate(space))
    return inputs["/".join(path) or "obs"]


def as_input(space: spaces.Space[Any], x: Tensor) -> Tensor:
    """Convert to the dtype of the file's inputs: images and MultiBinary unchanged, discrete spaces int64, others
    float32."""
    if is_image(space) or isinstance(space, spaces.MultiBinary):
        return x
    return x.long() if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else x.float()


def with_noise(portable: Portable, inputs: Named, generator: torch.Generator | None = None) -> Named:
    """The inputs, with noise from a generator."""
    if portable.law is None:
        return inputs
    with torch.no_grad():
        dist = portable.look(inputs)[0]
    assert isinstance(dist, Reparameterized)
    return inputs | {"noise": dist.noise(generator)}
