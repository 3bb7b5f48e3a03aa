"""Distributions, against torch's own, published values, finite differences and sampling."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import distributions as td
from torch.autograd import gradcheck

from pgsuite.functional import objectives
from pgsuite.nn.distributions import Bernoulli, Beta, Categorical, Gaussian, MultiCategorical, Squashed
from pgsuite.nn.layers import Tanh

SAMPLES = 200_000


def random_gaussians(shape: tuple[int, ...] = (7, 3)) -> tuple[Gaussian, Gaussian]:
    mean, other = torch.randn(2, *shape, dtype=torch.float64)
    sigma, wider = 0.5 * torch.randn(2, shape[-1], dtype=torch.float64)
    return Gaussian(mean, sigma), Gaussian(other, wider)


def random_categoricals(shape: tuple[int, ...] = (7, 5)) -> tuple[Categorical, Categorical]:
    p, q = torch.randn(2, *shape, dtype=torch.float64).log_softmax(-1)
    return Categorical(p), Categorical(q)


def random_choices(shape: tuple[int, ...] = (7,)) -> tuple[MultiCategorical, MultiCategorical]:
    shape = shape[:-1] if len(shape) == 1 else shape
    pairs = [torch.randn(2, *shape, n, dtype=torch.float64).log_softmax(-1) for n in (2, 4, 3)]
    p, q = zip(*pairs, strict=True)
    return MultiCategorical(tuple(p)), MultiCategorical(tuple(q))


def random_bits(shape: tuple[int, ...] = (7, 4)) -> tuple[Bernoulli, Bernoulli]:
    p, q = 2 * torch.randn(2, *shape, dtype=torch.float64)
    return Bernoulli(p), Bernoulli(q)


LOW, HIGH = torch.tensor([[-2.0, 0.0, -0.5], [1.0, 3.0, 0.5]], dtype=torch.float64)


def random_squashed(shape: tuple[int, ...] = (7, 3)) -> tuple[Squashed, Squashed]:
    p, q = random_gaussians(shape)
    return Squashed(p, LOW[: shape[-1]], HIGH[: shape[-1]]), Squashed(q, LOW[: shape[-1]], HIGH[: shape[-1]])


def random_betas(shape: tuple[int, ...] = (7, 3)) -> tuple[Beta, Beta]:
    (a, b), (c, d) = 1 + torch.rand(2, 2, *shape, dtype=torch.float64).exponential_()
    return Beta(a, b, LOW[: shape[-1]], HIGH[: shape[-1]]), Beta(c, d, LOW[: shape[-1]], HIGH[: shape[-1]])


RANDOM = [random_gaussians, random_categoricals, random_choices, random_bits, random_squashed, random_betas]


def test_gaussian_agrees_with_torch() -> None:
    p, q = random_gaussians()
    tp, tq = (td.Independent(td.Normal(d.mean, d.log_sigma.exp().expand_as(d.mean)), 1) for d in (p, q))
    x = torch.randn_like(p.mean)
    assert torch.allclose(p.log_prob(x), tp.log_prob(x))
    assert torch.allclose(p.entropy(), tp.entropy())
    assert torch.allclose(p.kl(q), td.kl_divergence(tp, tq))
    assert torch.equal(p.mode(), p.mean)


def test_categorical_agrees_with_torch() -> None:
    p, q = random_categoricals()
    tp, tq = (td.Categorical(logits=d.logits) for d in (p, q))
    x = tp.sample()
    assert torch.allclose(p.log_prob(x), tp.log_prob(x))
    assert torch.allclose(p.entropy(), tp.entropy())
    assert torch.allclose(p.kl(q), td.kl_divergence(tp, tq))
    assert torch.equal(p.mode(), tp.probs.argmax(-1))


def test_several_choices_are_independent_categoricals() -> None:
    p, q = random_choices((7, 1))
    tp, tq = ([td.Categorical(logits=x) for x in d.logits] for d in (p, q))
    x = torch.stack([t.sample() for t in tp], -1)
    assert torch.allclose(p.log_prob(x), torch.stack([t.log_prob(x[..., i]) for i, t in enumerate(tp)]).sum(0))
    assert torch.allclose(p.entropy(), torch.stack([t.entropy() for t in tp]).sum(0))
    assert torch.allclose(p.kl(q), torch.stack([td.kl_divergence(a, b) for a, b in zip(tp, tq, strict=True)]).sum(0))
    assert torch.equal(p.mode(), torch.stack([t.probs.argmax(-1) for t in tp], -1))


def test_bernoulli_agrees_with_torch() -> None:
    p, q = random_bits()
    tp, tq = (td.Independent(td.Bernoulli(logits=d.logits), 1) for d in (p, q))
    x = tp.sample().long()
    assert torch.allclose(p.log_prob(x), tp.log_prob(x.double()))
    assert torch.allclose(p.entropy(), tp.entropy())
    assert torch.allclose(p.kl(q), td.kl_divergence(tp, tq))
    assert torch.equal(p.mode(), (tp.mean > 0.5).long())


def bounded(base: td.Distribution, tanh: bool) -> td.Distribution:
    """torch's way to the same bounds."""
    span = HIGH - LOW
    steps = [td.TanhTransform(), td.AffineTransform((LOW + HIGH) / 2, span / 2)] if tanh else []
    return td.Independent(td.TransformedDistribution(base, steps or [td.AffineTransform(LOW, span)]), 1)


def test_squashed_gaussian_agrees_with_torch() -> None:
    p, q = random_squashed()
    normal, other = (td.Normal(d.base.mean, d.base.log_sigma.exp()) for d in (p, q))
    x = p.sample(torch.Generator().manual_seed(0))
    assert torch.allclose(p.log_prob(x), bounded(normal, tanh=True).log_prob(x))
    assert torch.allclose(p.kl(q), td.kl_divergence(td.Independent(normal, 1), td.Independent(other, 1)))
    assert ((x > LOW) & (x < HIGH)).all()


def test_beta_agrees_with_torch() -> None:
    p, q = random_betas()
    beta, other = (td.Beta(d.alpha, d.beta) for d in (p, q))
    x = p.sample(torch.Generator().manual_seed(0))
    assert torch.allclose(p.log_prob(x), bounded(beta, tanh=False).log_prob(x))
    assert torch.allclose(p.kl(q), td.kl_divergence(td.Independent(beta, 1), td.Independent(other, 1)))
    assert torch.allclose(p.entropy(), (beta.entropy() + (HIGH - LOW).log()).sum(-1))
    assert torch.allclose(p.mode(), LOW + (HIGH - LOW) * beta.mode)
    assert ((x > LOW) & (x < HIGH)).all()


@pytest.mark.parametrize("concentration", [1e2, 1e3, 1e4, 1e5])
def test_a_concentrated_beta_is_as_exact_as_float32_is(concentration: float) -> None:
    """KL, entropy and log-probability, against float64."""
    shape = 1 + concentration * torch.rand(4, 5, 3)
    found = []
    for dtype in (torch.float32, torch.float64):
        a, b, c, d = (x.to(dtype) for x in (shape[0], shape[1], shape[0] * 1.001, shape[1] * 0.999))
        p, q = (Beta(*x, LOW.to(dtype), HIGH.to(dtype)) for x in ((a, b), (c, d)))
        found.append((p.kl(q), p.entropy(), p.log_prob(p.mode())))
        assert all(x.dtype is dtype for x in found[-1])
    for single, double in zip(*found, strict=True):
        assert torch.allclose(single.double(), double, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("log_sigma", "tolerance"), [(-3.0, 1e-9), (-1.0, 1e-7), (0.0, 1e-4), (1.0, 2e-3)])
def test_entropy_of_a_squashed_gaussian_is_its_integral(log_sigma: float, tolerance: float) -> None:
    """A fine sum over the Gaussian's own variable."""
    mean = torch.tensor([[-2.0], [0.0], [0.7]], dtype=torch.float64)
    sigma = torch.tensor([log_sigma], dtype=torch.float64)
    p = Squashed(Gaussian(mean, sigma), torch.tensor([-1.0]).double(), torch.tensor([1.0]).double())
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64).unsqueeze(-1)
    x = mean + sigma.exp() * grid.unsqueeze(1)
    density = torch.exp(-0.5 * grid.square()) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    log_slope = math.log(4.0) - 2 * x - 2 * torch.nn.functional.softplus(-2 * x)
    expected = p.base.entropy() + (density * log_slope.squeeze(-1)).sum(0)
    assert torch.allclose(p.entropy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [-1e3, -30.0, 30.0, 1e3])
def test_saturated_actions_stay_finite(mean: float, dtype: torch.dtype) -> None:
    low, high = LOW.to(dtype), HIGH.to(dtype)
    at = torch.full((4, 3), mean, dtype=dtype, requires_grad=True)
    squashed = Squashed(Gaussian(at, torch.zeros(3, dtype=dtype)), low, high)
    edge = Beta(1 + at.abs(), torch.ones_like(at), low, high)
    distributions: list[Any] = [squashed, edge]
    for p in distributions:
        for action in (p.sample(torch.Generator().manual_seed(0)).detach(), low.expand(4, 3), high.expand(4, 3)):
            found = (p.log_prob(action), p.entropy(), p.kl(p.detach()))
            assert all(x.isfinite().all() for x in found)
            assert torch.autograd.grad(torch.stack(found).sum(), at, retain_graph=True)[0].isfinite().all()


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_extreme_bits_stay_finite(logit: float) -> None:
    p, q = Bernoulli(torch.tensor([logit], requires_grad=True)), Bernoulli(torch.tensor([-logit]))
    found = (p.log_prob(p.mode()), p.log_prob(1 - p.mode()), p.entropy(), p.kl(q))
    gradients = [torch.autograd.grad(x.sum(), p.logits, retain_graph=True)[0] for x in found]
    assert all(x.isfinite().all() for x in (*found, *gradients))


def test_gaussian_kl_agrees_with_rlax() -> None:
    mean, other = torch.tensor([[1.0, -1.0], [0.1, -0.1]]), torch.tensor([[1.0, -10.0], [0.3, -0.2]])
    sigma, wider = torch.tensor([[0.1, 0.1], [0.2, 0.3]]), torch.tensor([[0.1, 0.1], [0.8, 0.3]])
    got = Gaussian(mean, sigma.log()).kl(Gaussian(other, wider.log()))
    assert torch.allclose(got, torch.tensor([4050.0, 1.00434992]), rtol=1e-5)
    unit = Gaussian(torch.zeros(1), torch.zeros(1)).kl(Gaussian(torch.ones(1), torch.tensor([2.0]).log()))
    assert float(unit) == pytest.approx(0.44314718, abs=1e-7)


def test_entropy_of_the_bandit_and_its_gradient() -> None:
    theta = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    entropy = Categorical(theta.log_softmax(-1)).entropy()
    (gradient,) = torch.autograd.grad(entropy, theta)
    assert float(entropy.detach()) == pytest.approx(1.02019134, abs=1e-8)
    expected = torch.tensor([0.04917541, -0.17216366, 0.12298825], dtype=torch.float64)
    assert torch.allclose(gradient, expected, atol=1e-8)


def many(x: Any) -> Any:
    """A distribution, or a part of one, for each of many samples."""
    if isinstance(x, tuple):
        return tuple(map(many, x))
    if isinstance(x, torch.Tensor):
        return x.expand(SAMPLES, *x.shape)
    shared = {"low", "high", "quadrature"}
    return replace(x, **{name: many(value) for name, value in vars(x).items() if name not in shared})


@pytest.mark.parametrize("make", RANDOM)
def test_entropy_and_kl_are_what_sampling_says(make) -> None:
    """Five standard errors of 200,000 samples, seeded."""
    p, q = make((3,))
    ours, others = many(p), many(q)
    x = ours.sample(torch.Generator().manual_seed(1))
    for samples, exact in ((-ours.log_prob(x), p.entropy()), (ours.log_prob(x) - others.log_prob(x), p.kl(q))):
        error = 5 * float(samples.std()) / SAMPLES**0.5
        assert float(samples.mean()) == pytest.approx(float(exact), abs=error)


def test_categorical_samples_by_probability() -> None:
    """Five binomial standard errors of 200,000 samples, seeded."""
    p = torch.tensor([0.7, 0.2, 0.1])
    x = Categorical(p.log().expand(SAMPLES, 3)).sample(torch.Generator().manual_seed(0))
    frequency = x.bincount(minlength=3) / SAMPLES
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / SAMPLES).sqrt()).all()


@pytest.mark.parametrize("make", RANDOM)
def test_a_generator_alone_decides_what_is_sampled(make) -> None:
    p, _ = make()
    first = p.sample(torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    assert torch.equal(first, p.sample(torch.Generator().manual_seed(3)))
    assert not torch.equal(first, p.sample(torch.Generator().manual_seed(4)))


def test_gradients_of_log_probabilities_are_finite_differences() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    mean, log_sigma = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    inputs = (mean.requires_grad_(), log_sigma.requires_grad_())
    assert gradcheck(lambda m, s: Gaussian(m, s).log_prob(x), inputs)
    assert gradcheck(lambda m, s: Gaussian(m, s).kl(Gaussian(x, torch.zeros(3, dtype=torch.float64))), inputs)


@pytest.mark.parametrize("log_sigma", [-1e30, -1e3, -50.0])
def test_sigma_cannot_reach_zero(log_sigma: float) -> None:
    p = Gaussian(torch.zeros(4, 2), torch.full((2,), log_sigma))
    x = p.sample(torch.Generator().manual_seed(0))
    assert (p.log_sigma.exp() > 0).all()
    assert all(y.isfinite().all() for y in (x, p.log_prob(x), p.entropy(), p.kl(p)))


def test_clipped_surrogate_agrees_with_rsl_rl() -> None:
    ratio, one = torch.tensor(0.5).exp(), torch.tensor(1.0)
    assert float(objectives.clipped_surrogate(ratio, one, 0.2, 0.2)) == pytest.approx(1.2)
    new, old = torch.tensor([2.0, 1.1]), torch.tensor([1.0, 1.0])
    loss = objectives.clipped_squared_error(new, old, torch.tensor(1.5), 0.2).mean()
    assert float(loss) == pytest.approx(0.205)


def test_clipping_never_hides_a_mistake() -> None:
    """Outside the clip the objective pays nothing more, but a change for the worse is still felt in full."""
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    (slope,) = torch.autograd.grad(objectives.clipped_surrogate(ratio, advantage, 0.2, 0.2).sum(), ratio)
    assert slope.tolist() == [1.0, 0.0, 0.0, -1.0]


def test_two_widths_of_the_clip_and_a_limit_to_what_a_bad_action_costs() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 9.0, 9.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    clipped = objectives.clipped_surrogate(ratio, advantage, 0.2, 0.3)
    assert torch.allclose(clipped, torch.tensor([0.5, -0.8, 1.3, -1.5, 1.3, -9.0]))
    limited = objectives.dual_clipped(clipped, advantage, 3.0)
    assert torch.allclose(limited, torch.tensor([0.5, -0.8, 1.3, -1.5, 1.3, -3.0]))


def test_the_huber_error_is_square_inside_and_straight_outside_with_no_kink() -> None:
    value = torch.tensor([0.0, 0.5, 1.0, 3.0], requires_grad=True)
    error = objectives.squared_error(value, torch.zeros(4), huber=1.0)
    assert error.tolist() == [0.0, 0.25, 1.0, 5.0]
    assert torch.autograd.grad(error.sum(), value)[0].tolist() == [0.0, 1.0, 2.0, 2.0]


def test_sampled_kl_is_k3_and_unbiased() -> None:
    """Five standard errors of 200,000 samples, seeded."""
    got = objectives.sampled_kl(torch.tensor([-0.1, 0.2], dtype=torch.float64))
    assert torch.allclose(got, torch.tensor([0.00483742, 0.02140276], dtype=torch.float64), atol=1e-8)
    old, new = Gaussian(torch.zeros(1), torch.zeros(1)), Gaussian(torch.full((1,), 0.3), torch.full((1,), 0.2))
    wide = Gaussian(torch.zeros(SAMPLES, 1), torch.zeros(1))
    x = wide.sample(torch.Generator().manual_seed(0))
    k3 = objectives.sampled_kl(new.log_prob(x) - old.log_prob(x))
    assert (k3 >= 0).all()
    assert float(k3.mean()) == pytest.approx(float(old.kl(new)), abs=5 * float(k3.std()) / SAMPLES**0.5)


def test_tanh_through_sigmoid_is_tanh_with_its_derivatives() -> None:
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64, requires_grad=True)
    ours, theirs = Tanh()(x), x.tanh()
    assert torch.allclose(ours, theirs, atol=1e-15, rtol=0)
    first = [torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in (ours, theirs)]
    assert torch.allclose(first[0], first[1], atol=1e-14, rtol=0)
    second = [torch.autograd.grad(y.sum(), x)[0] for y in first]
    assert torch.allclose(second[0], second[1], atol=1e-13, rtol=0)
    assert torch.allclose(Tanh()(x.float()), theirs.float(), atol=2e-7, rtol=0)
