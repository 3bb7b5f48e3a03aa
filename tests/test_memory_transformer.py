"""A transformer over a window of past steps: step by step it is what it is over whole sequences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu
from toys import mostly_long

from pgsuite.nn.memory_transformer import WindowTransformer
from pgsuite.nn.transformer import rotate


def drawn(window: int, layers: int = 1, inputs: int = 3) -> WindowTransformer:
    net = WindowTransformer(inputs, 8, window=window, layers=layers, heads=2).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.6)
    return net


def sequence(horizon: int, columns: int = 3, chance: float = 0.15) -> tuple[Tensor, Tensor]:
    start = torch.rand(horizon, columns) < chance
    return torch.randn(horizon, columns, 3, dtype=torch.float64), start


CASES = [(4, 1, 15), (4, 2, 16), (4, 3, 3), (6, 2, 20), (32, 2, 17), (1, 2, 9)]


@pytest.mark.parametrize(("window", "layers", "horizon"), CASES)
def test_steps_one_by_one_are_the_whole_sequence(window: int, layers: int, horizon: int) -> None:
    """Over several rollouts, with episodes that begin within them, and states that are asked for in every way."""
    net, state = drawn(window, layers), torch.zeros(3, 2 * 8 * window * layers + 1, dtype=torch.float64)
    stepped = state
    for _ in range(3):
        x, start = sequence(horizon)
        whole, states = net(x, state, start)
        every = states[:]
        for t in range(horizon):
            out, after = net(x[t : t + 1], stepped, start[t : t + 1])
            stepped = after[0]
            assert torch.allclose(out[0], whole[t], rtol=0, atol=1e-10)
            assert torch.allclose(stepped, every[t], rtol=0, atol=1e-10)
        assert torch.equal(states[-1], every[-1]) and torch.equal(states[horizon - 1], every[-1])
        rows, columns = torch.tensor([0, horizon - 1]), torch.tensor([2, 1])
        assert torch.equal(states[rows, columns], every[rows, columns])
        state = states[-1]


def test_what_it_keeps_at_first_tells_how_large_an_observation_was() -> None:
    net, stream = WindowTransformer(3, 8, torch.Generator().manual_seed(0), heads=2), torch.Generator().manual_seed(1)
    x, start = torch.randn(1, 5, 3, generator=stream), torch.ones(1, 5, dtype=torch.bool)
    one, two = (net(scale * x, torch.zeros(5, net.width), start)[1][-1].detach() for scale in (1.0, 2.0))
    assert float((one - two).norm() / one.norm()) > 0.1


def test_it_attends_to_the_window_of_its_episode() -> None:
    """By its definition, step after step, with distances as positions."""
    net, (x, start) = drawn(3), sequence(12, columns=1)
    start[5] = True
    out = net(x, torch.zeros(1, net.width, dtype=torch.float64), start)[0].squeeze(1)
    (block,), inputs = net.blocks, net.enter(x.squeeze(1))
    for t in range(12):
        first = max(s for s in range(t + 1) if s == 0 or start[s, 0])
        seen = inputs[max(first, t - 3) : t + 1]
        query, key, value = block.project(block.attention_norm(seen)).view(-1, 3, 2, 4).permute(1, 2, 0, 3)  # pyright: ignore
        place = torch.arange(len(seen)) + 100
        query, key = (rotate(y.unsqueeze(0), place.unsqueeze(0))[0] for y in (query, key))
        weight = (query[:, -1:] @ key.mT / math.sqrt(4)).softmax(-1)
        z = inputs[t] + block.merge((weight @ value).transpose(0, 1).reshape(8))  # pyright: ignore
        z = z + block.contract(gelu(block.expand(block.norm(z))))  # pyright: ignore
        assert torch.allclose(out[t], net.norm(z), rtol=0, atol=1e-10)


def test_a_poisoned_state_is_forgotten_too() -> None:
    net, (x, start) = drawn(4), sequence(6)
    start[0] = True
    poisoned = torch.full((3, net.width), torch.nan, dtype=torch.float64, requires_grad=True)
    out, states = net(x, poisoned, start)
    gradients = torch.autograd.grad(out.sum(), [*net.parameters(), poisoned])
    assert all(y.isfinite().all() for y in (out, states[:], *gradients))


def given(horizon: int) -> tuple[WindowTransformer, Any, list[Tensor]]:
    torch.manual_seed(0)
    net = drawn(3, 2)
    x, start = sequence(horizon, 2, 0.3)
    state = net(*((y := sequence(5, 2))[0], torch.zeros(2, net.width, dtype=torch.float64), y[1]))[1][-1].detach()
    inputs = [x.requires_grad_(), state[:, :-1].requires_grad_(), *net.parameters()]

    def run(x: Tensor, kept: Tensor, *params: Tensor) -> Tensor:
        named = dict(zip(dict(net.named_parameters()), params, strict=True))
        out, states = torch.func.functional_call(net, named, (x, torch.cat([kept, state[:, -1:]], -1), start))
        return torch.cat([out.flatten(), states[-1][:, :-1].flatten()])

    return net, run, inputs


@pytest.mark.parametrize("horizon", mostly_long([2, 7]))
def test_its_derivatives_are_those_of_finite_differences(horizon: int) -> None:
    _, run, inputs = given(horizon)
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_it_is_mapped_over_parameters() -> None:
    net, run, (x, kept, *_) = given(7)
    params = [torch.stack([p, 2 * p]).detach() for p in net.parameters()]
    mapped = torch.vmap(lambda *p: run(x, kept, *p))(*params)
    assert torch.allclose(mapped, torch.stack([run(x, kept, *(p[i] for p in params)) for i in range(2)]))


def test_its_width_is_for_its_heads() -> None:
    with pytest.raises(ValueError, match="recurrent_size must be a multiple of twice a transformer's 4 heads, got 12"):
        WindowTransformer(3, 12)
