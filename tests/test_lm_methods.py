"""Each test is one claim about methods that align a language model, where everything can be enumerated: three tokens,
two positions, seven responses."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from lm_worlds import Letters, build, collector, world
from torch import Tensor
from toys import mostly_long

from pgsuite.algorithms import A2C, NPG, PPO, TRPO, Algorithm, Reinforce
from pgsuite.algorithms.estimators import GRPO, RLOO, MonteCarlo
from pgsuite.functional import objectives, trust_region
from pgsuite.nn.policy import log_prob
from pgsuite.nn.stateless import functional_in_parameters
from pgsuite.rlhf.env import LanguageEnv
from pgsuite.rlhf.generation import Generated
from pgsuite.rlhf.policy import PROMPT, REAL
from pgsuite.types import Rollout, masked_mean

RESPONSES = ["", "a", "b", "aa", "ab", "ba", "bb"]
WORTH = dict(zip(RESPONSES, (0.5, 1.0, -1.0, 0.0, 2.0, -0.5, 1.5), strict=True))
BETA = 0.5


def judged(prompts: list[str], responses: list[str]) -> Tensor:
    return torch.tensor([WORTH[text] for text in responses])


def small(num_envs: int, **options: Any) -> LanguageEnv:
    return LanguageEnv(["|"], Letters("ab", padding=False), [judged], num_envs=num_envs, length=2, **options)


def every_response() -> Rollout:
    """All seven, a column each."""
    env = small(7)
    rows = [[0, *(env.tokens.letters.index(x) for x in f"{text}||"[:2])] for text in RESPONSES]  # pyright: ignore
    written = torch.tensor([[True] * 7, [bool(text) for text in RESPONSES]])
    text = Generated(torch.tensor(rows).T, torch.zeros(2, 7), written)
    start = torch.zeros(2, 7, dtype=torch.bool)
    start[0] = True
    blank = torch.zeros(2, 7)
    return Rollout(
        obs=text.tokens[:-1],
        hidden_state={},
        start=start,
        action=text.tokens[1:],
        logp=blank,
        reward=blank,
        next_obs=text.tokens[1:],
        terminated=start,
        truncated=start,
        mask=written,
    )


def log_probabilities(policy: Any) -> Tensor:
    """Of all seven responses."""
    r = every_response()
    return policy.dist(r).log_prob(r.action).where(r.mask, 0.0).sum(0)


def objective(policy: Any, reference: Any) -> Tensor:
    """The mean score, less BETA times the KL from the reference, exactly."""
    logp, ref = log_probabilities(policy), log_probabilities(reference).detach()
    return (logp.exp() * (torch.tensor(list(WORTH.values())) - BETA * (logp - ref))).sum()


def optimum(reference: Any) -> float:
    return float(BETA * (log_probabilities(reference) + torch.tensor(list(WORTH.values())) / BETA).logsumexp(0))


MONTE_CARLO: dict[str, Any] = {"estimator": MonteCarlo(), "normalize_advantage": "none"}
ALONE: dict[str, Any] = MONTE_CARLO | {"value_coef": 0.0, "max_grad_norm": None}
GROUPED: dict[str, Any] = ALONE | {"estimator": RLOO(group=4)}
WAYS: dict[str, tuple[type[Algorithm], dict[str, Any]]] = {
    "reinforce": (Reinforce, {}),
    "rloo": (Reinforce, {"estimator": RLOO(group=4)}),
    "dr-grpo": (Reinforce, {"estimator": GRPO(group=4, deviation=False)}),
    "a2c": (A2C, ALONE),
    "a2c-rloo": (A2C, GROUPED),
    "ppo": (PPO, ALONE),
    "ppo-sequence": (PPO, GROUPED | {"ratio": "sequence"}),
    "npg": (NPG, MONTE_CARLO),
    "trpo": (TRPO, MONTE_CARLO),
}


def first_gradient(algorithm: Any, rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What a method would ascend, as a sum over each response and a mean over responses [P]."""
    batch = algorithm.compute_advantages(algorithm.preprocess(rollout))
    each = batch.mask.sum() / batch.mask.shape[1]  # of the mean over cells, that over responses
    if isinstance(algorithm, NPG):
        found: list[Tensor] = []
        with monkeypatch.context() as patch:
            patch.setattr(trust_region, "conjugate_gradient", lambda a, b, *_: found.append(b) or torch.zeros_like(b))
            algorithm.update_policy(batch)
        return found[0] * each
    loss, _ = algorithm.loss(batch)
    gradient = trust_region.flat_grad(-loss, list(algorithm.policy.parameters()))
    return gradient if isinstance(algorithm, Reinforce) else gradient * each


@pytest.mark.parametrize("way", mostly_long(WAYS, "reinforce", "dr-grpo", "a2c", "ppo-sequence", "npg"))
def test_the_first_gradient_is_the_exact_one_within_its_standard_error(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, fields = WAYS[way]
    env = small(256)
    algorithm = build(cls, env, coef=BETA, look={"width": 8}, **fields)
    reference = algorithm.reference.policy
    with torch.no_grad():  # where the penalty, too, has a gradient
        for p in algorithm.policy.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    exact = trust_region.flat_grad(objective(algorithm.policy, reference), list(algorithm.policy.parameters()))
    rollouts = collector(env)
    found = [first_gradient(algorithm, rollouts.collect(algorithm.policy), monkeypatch) for _ in range(30)]
    samples = torch.stack(found) * (4 / 3 if way == "dr-grpo" else 1)  # for each score is a fourth of its own baseline
    directions = torch.cat([exact.unsqueeze(0), torch.randn(8, len(exact), generator=torch.Generator().manual_seed(4))])
    along, wanted = samples @ directions.T, directions @ exact
    error = along.std(0) / len(samples) ** 0.5
    assert ((along.mean(0) - wanted).abs() < 3.5 * error).all()
    assert error[0] < 0.1 * wanted[0]  # so that another gradient would be found out


FAST: dict[str, Any] = {"critic_epochs": 1, "critic_minibatches": 1, "cg_iters": 5}
COMPARED: dict[str, Any] = {"estimator": RLOO(group=16), "normalize_advantage": "none"}
LEARNING: dict[str, tuple[type[Algorithm], int, dict[str, Any]]] = {
    "reinforce": (Reinforce, 45, {"lr": 0.007}),
    "rloo": (Reinforce, 45, {"lr": 0.007, "estimator": RLOO(group=16)}),
    "a2c": (A2C, 45, COMPARED | {"optim": "adam", "lr": 0.007}),
    "ppo": (PPO, 15, COMPARED | {"lr": 0.005, "epochs": 4, "minibatches": 1}),
    "npg": (NPG, 22, COMPARED | FAST | {"max_kl": 0.03}),
    "trpo": (TRPO, 22, COMPARED | FAST | {"max_kl": 0.03}),
}


@pytest.mark.parametrize("way", mostly_long(LEARNING, "rloo", "ppo", "npg"))
def test_each_method_comes_within_two_percent_of_the_optimum(way: str) -> None:
    """pi_ref exp(r / beta), normalized, whose objective is beta log E_ref exp(r / beta)."""
    cls, iterations, fields = LEARNING[way]
    fields = dict(fields)
    for name in {"lr", "max_kl"} & fields.keys():
        fields[name] = {"linear": [fields[name], 0.02 * fields[name]]}
    env = small(1024)
    algorithm = build(cls, env, coef=BETA, **fields)
    reference, rollouts = algorithm.reference.policy, collector(env)
    for i in range(iterations):
        algorithm.update_schedules(i / iterations)
        algorithm.iterate(rollouts)
    with torch.no_grad():
        began, reached = float(objective(reference, reference)), float(objective(algorithm.policy, reference))
    assert began < reached <= optimum(reference) + 1e-5
    assert optimum(reference) - reached < 0.02 * (optimum(reference) - began)


def strayed_pair(num_envs: int, **fields: Any) -> tuple[Any, LanguageEnv]:
    """A policy that is no longer its reference."""
    env = small(num_envs)
    algorithm = build(A2C, env, coef=BETA, **fields)
    with torch.no_grad():
        for p in algorithm.policy.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    return algorithm, env


@torch.no_grad()
def test_k1_is_unbiased_and_k3_too_and_never_negative() -> None:
    algorithm, env = strayed_pair(8192)
    logp, ref = log_probabilities(algorithm.policy), log_probabilities(algorithm.reference.policy)
    exact = (logp.exp() * (logp - ref)).sum()
    r = algorithm.reference.compare(collector(env).collect(algorithm.policy))
    k1 = algorithm.reference.log_ratio_to_reference(r)
    k3 = objectives.reverse_kl(k1).where(r.mask, 0.0)
    assert exact > 0.1 and (k3 >= 0).all() and (k1 < 0).any()
    for estimate in (k1, k3):
        column = estimate.sum(0)
        assert abs(column.mean() - exact) < 3 * column.std() / len(column) ** 0.5
    assert torch.allclose(algorithm.reference.adapt(r)["reference_kl"], k1.sum() / 8192, rtol=1e-5)


@torch.no_grad()
def test_the_penalty_is_paid_by_each_token_in_the_reward_or_in_the_loss_and_nowhere_else() -> None:
    algorithm, env = strayed_pair(64)
    r = collector(env).collect(algorithm.policy)
    compared = algorithm.reference.compare(r)
    k1 = algorithm.reference.log_ratio_to_reference(compared)
    assert torch.allclose(compared.reward, r.reward - BETA * k1)
    batch = algorithm.compute_advantages(compared)
    assert torch.equal(algorithm.policy_objective(batch.advantage, batch.logp, batch), batch.advantage)
    other, _ = strayed_pair(64, penalty="loss")
    compared = other.reference.compare(r)
    assert torch.equal(compared.reward, r.reward)
    batch = other.compute_advantages(compared)
    less = batch.advantage - other.policy_objective(batch.advantage, batch.logp, batch)
    assert torch.allclose(less[r.mask], (BETA * ((-k1).exp() - 1 + k1))[r.mask], atol=1e-5)


def test_the_price_follows_the_kl_as_published() -> None:
    env = small(64)
    algorithm = build(A2C, env, coef=0.1, target=0.01)
    reference, r = algorithm.reference, collector(env).collect(algorithm.policy)
    for kl, change in ((0.0, -0.2), (0.011, 0.1), (5.0, 0.2)):
        before = float(reference.coef)
        cells = torch.zeros_like(r.logp)
        cells[0] = kl  # of every response's first token
        reference.adapt(replace(r, extra={"reference": r.logp - cells}))
        assert float(reference.coef) == pytest.approx(before * (1 + change * 64 / 10_000), rel=1e-5)


def test_a_reference_shares_what_is_frozen_and_stays_where_it_was() -> None:
    env = world(16, samples=2)
    algorithm = build(PPO, env, coef=0.1, look={"frozen": 1}, estimator=RLOO(group=2), normalize_advantage="none")
    policy, reference = algorithm.policy, algorithm.reference.policy
    own, theirs = policy.body.transformer, reference.body.transformer
    assert own.embed.weight is theirs.embed.weight and own.blocks[0].merge.weight is theirs.blocks[0].merge.weight
    assert not any("blocks.0" in name or "embed" in name for name, _ in policy.named_parameters())
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    algorithm.iterate(collector(env))
    after, kept = policy.state_dict(), reference.state_dict()
    frozen = {name for name in before if "embed" in name or "blocks.0" in name}
    assert all(torch.equal(before[name], after[name]) == (name in frozen) for name in before)
    assert all(torch.equal(before[name], kept[name]) for name in before)


def test_groups_are_compared_among_themselves() -> None:
    reward = torch.zeros(3, 8)
    reward[1] = torch.tensor([1.0, 2, 3, 6, 5, 5, 5, 5])
    zero, mask = torch.zeros(3, 8), torch.ones(3, 8, dtype=torch.bool)
    r = replace(every_response(), reward=reward, mask=mask, terminated=~mask, truncated=~mask)
    advantage, target = RLOO(group=4)(r, zero, zero, zero, gamma=1.0)
    wanted = torch.tensor([1 - 11 / 3, 2 - 10 / 3, 3 - 3.0, 6 - 2.0, 0, 0, 0, 0])
    assert torch.allclose(advantage, wanted.expand(3, 8), atol=1e-6)
    assert torch.equal(target[0], reward[1]) and not target[2].any()
    advantage, _ = GRPO(group=4)(r, zero, zero, zero, gamma=1.0)
    std = torch.tensor([1.0, 2, 3, 6]).std(correction=1)
    assert torch.allclose(advantage[0, :4], (reward[1, :4] - 3) / (std + 1e-4)) and not advantage[0, 4:].any()
    plain, _ = GRPO(group=4, deviation=False)(r, zero, zero, zero, gamma=1.0)
    assert torch.equal(plain[2, :4], reward[1, :4] - 3)
    with pytest.raises(ValueError, match="8 columns do not divide into groups of 3"):
        RLOO(group=3)(r, zero, zero, zero, gamma=1.0)


def test_a_sequence_has_one_ratio_and_each_token_its_own_gradient() -> None:
    log_ratio, mask = torch.randn(4, 3, requires_grad=True), torch.ones(4, 3, dtype=torch.bool)
    with torch.no_grad():
        mask[2:, 1] = False
    ratio = objectives.sequence_log_ratio(log_ratio, mask).exp()
    mean = log_ratio.where(mask, 0.0).sum(0) / mask.sum(0)
    assert torch.allclose(ratio[mask], mean.exp().expand(4, 3)[mask])
    weight = torch.randn(4, 3)  # or what each token has of its own could not be told from its share of the mean
    (gradient,) = torch.autograd.grad((weight * ratio).where(mask, 0.0).sum(), log_ratio)
    assert torch.allclose(gradient, (weight * mean.exp()).where(mask, 0.0))


@pytest.mark.parametrize("form", ["double-backward", "gauss-newton"])
def test_fisher_products_through_the_transformer_are_those_of_the_explicit_hessian(form: str) -> None:
    env = small(16)
    algorithm = build(NPG, env, look={"width": 4})
    policy = algorithm.policy.double()
    r = collector(env).collect(policy)
    dist_at = functional_in_parameters(policy, lambda: policy.dist(r))
    start = trust_region.flatten(list(policy.parameters())).detach()
    old = dist_at(start)

    def kl(vector: Tensor) -> Tensor:
        return masked_mean(old.detach().kl(dist_at(vector)), r.mask)

    if form == "gauss-newton":
        product = trust_region.gauss_newton_product(dist_at, lambda p, q: masked_mean(p.kl(q), r.mask), start, 0.0)
    else:
        theta = start.clone().requires_grad_()
        product = trust_region.fisher_product(kl(theta), [theta], 0.0)
    vectors = torch.randn(4, len(start), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.func.vmap(lambda v: torch.func.jvp(torch.func.grad(kl), (start,), (v,))[1])(vectors)
    hessian = torch.func.hessian(kl)(start) if form == "double-backward" else None
    for v, w in zip(vectors, wanted, strict=True):
        assert torch.allclose(product(v), w, atol=1e-9)
        assert hessian is None or torch.allclose(product(v), hessian @ v, atol=1e-9)


def test_a_line_search_in_one_batch_finds_what_one_step_at_a_time_finds() -> None:
    found = []
    for line_search in ("sequential", "batched"):
        env = small(32)
        algorithm = build(TRPO, env, coef=BETA, backtracking=line_search, max_kl=0.5)
        metrics = algorithm.iterate(collector(env))
        found.append((metrics["step_fraction"], trust_region.flatten(list(algorithm.policy.parameters()))))
    assert found[0][0] == found[1][0] > 0 and torch.allclose(found[0][1], found[1][1], atol=1e-5)


@pytest.mark.parametrize("penalty", ["reward", "loss"])
@pytest.mark.parametrize("cls", mostly_long([Reinforce, A2C, PPO, NPG, TRPO], PPO, NPG))
def test_every_method_goes_on_from_its_state_as_if_nothing_had_been(cls: type[Algorithm], penalty: str) -> None:
    from toys import resume_alike

    pairs = []
    for seed in (0, 1):
        env = world(8, seed=seed)
        algorithm = build(cls, env, seed=seed, coef=0.1, penalty=penalty, target=0.1)
        pairs.append((algorithm, collector(env, seed)))
    pairs[0][0].iterate(pairs[0][1])
    resume_alike(pairs[0], pairs[1])
    one, two = (trust_region.flatten(list(algorithm.policy.parameters())) for algorithm, _ in pairs)
    assert torch.equal(one, two) and torch.equal(pairs[0][0].reference.coef, pairs[1][0].reference.coef)


def test_nothing_is_out_of_the_enumeration() -> None:
    texts = {"".join(x) for x in itertools.product("ab", repeat=2)} | {"", "a", "b"}
    policy = build(A2C, small(4)).policy
    assert texts == set(RESPONSES) and float(log_probabilities(policy).exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("asked", [{}, {"value_coef": 0.5}, {"estimator": MonteCarlo()}])
def test_values_are_computed_only_if_something_depends_on_them(asked: dict[str, Any]) -> None:
    """Advantages within groups and no value loss need none: a critic that cannot be asked gives the same step."""
    found: list[Tensor] = []
    for broken in (False, True):
        env = world(8, samples=4)
        algorithm: Any = build(PPO, env, minibatches=1, **GROUPED | asked)
        if broken:
            algorithm.critic.values_and_next_values.run = None
        if broken and asked:
            with pytest.raises(TypeError):
                algorithm.iterate(collector(env))
        else:
            algorithm.iterate(collector(env))
        found.append(trust_region.flatten(list(algorithm.policy.parameters())))
    assert asked or torch.equal(*found)


MICRO: dict[str, tuple[type[Algorithm], dict[str, Any]]] = {
    "reinforce": (Reinforce, {"baseline": "critic"}),
    "a2c": (A2C, {"penalty": "loss"}),
    "ppo": (PPO, {"normalize_advantage": "minibatch", "entropy_coef": 0.1, "epochs": 2, "minibatches": 2}),
    "grpo": (PPO, {"estimator": GRPO(group=4), "ratio": "sequence", "value_coef": 0.0, "penalty": "loss"}),
    "npg": (NPG, {"critic_minibatches": 1}),
}


@pytest.mark.parametrize("way", mostly_long(MICRO, "reinforce", "ppo"))
def test_a_step_in_pieces_is_the_step_of_the_whole_with_a_piece_in_memory(way: str) -> None:
    cls, fields = MICRO[way]
    torch.set_default_dtype(torch.float64)
    try:
        found = []
        for count in (1, 3):
            env, widths = world(32, samples=4, dtype=torch.float64), set[int]()
            algorithm = build(cls, env, coef=0.1, micro_batches=count, **fields)
            r = collector(env).collect(algorithm.policy)
            for policy in (algorithm.policy, algorithm.reference.policy):
                policy.head.register_forward_hook(lambda *x, widths=widths: widths.add(x[1][0].shape[1]))
            metrics = algorithm.train_on(r)
            found.append(([p.detach().clone() for p in algorithm.policy.parameters()], widths, metrics))
    finally:
        torch.set_default_dtype(torch.float32)
    (whole, wide, metrics), (pieces, narrow, others) = found
    assert whole[0].dtype == torch.float64
    assert all(torch.allclose(x, y, atol=1e-10) for x, y in zip(whole, pieces, strict=True))
    same = metrics.keys() - ({"entropy"} if way == "reinforce" else set())
    assert all(torch.allclose(metrics[name], others[name], atol=1e-8) for name in same)
    assert max(wide) == 32 and (way == "npg" or max(narrow) <= 11)


def test_pieces_are_of_similar_lengths_and_have_no_padding_that_none_needs() -> None:
    """Every real cell is in one of them, with its text."""
    env = world(32, samples=4)
    algorithm = build(A2C, env)
    r = collector(env).collect(algorithm.policy)
    body, whole = algorithm.policy.body, len(r.mask) + r.hidden_state[PROMPT].shape[-1]
    lengths = r.mask.sum(0) + r.hidden_state[REAL][0].sum(-1)
    assert len(set(lengths.tolist())) > 4
    parts = body.pieces(r, 4)
    assert sorted(i for index, _ in parts for i in index.tolist()) == list(range(32))
    order = torch.cat([index for index, _ in parts])
    equal = lengths[order].diff() == 0
    assert equal.sum() > 8 and (order.diff() > 0)[equal].all()  # equally long ones of a group stay side by side
    least, cells = 0, 0
    for index, part in parts:
        rows, texts = len(part.mask), torch.cat([part.hidden_state[PROMPT][0].T, part.obs])
        assert part.mask[-1].any() and part.hidden_state[REAL][0, :, 0].any()
        assert least <= lengths[index].min() and (least := int(lengths[index].max()))
        assert torch.equal(part.action, r.action[:rows, index]) and not r.mask[rows:, index].any()
        before = torch.cat([r.hidden_state[PROMPT][0].T, r.obs])[-len(r.mask) - len(texts) + rows :][: len(texts)]
        assert torch.equal(texts, before[:, index])
        cells += texts.numel()
    assert cells < whole * 32
    assert algorithm.host_sync_reason is None
    algorithm.micro_batches = 4
    assert algorithm.host_sync_reason and "reads the lengths" in algorithm.host_sync_reason
    logp = log_prob(algorithm.policy, r, 4)
    assert logp.shape == r.logp.shape and torch.allclose(logp[r.mask], r.logp[r.mask], atol=1e-5)
