"""Plants faults, one at a time, and checks that the tests that are there for them fail.

    python tests/mutations.py                       # all, some minutes on one core
    python tests/mutations.py --only gae --only kl  # those whose names contain one of these

Each fault is planted in a temporary copy of the checkout.  It survives if one of its tests passes, so that test shows
nothing.  The record is benchmarks/results/robustness/mutations.json, of a run of all; exits with code 1 if a fault
survives, or if its text is no longer in the code.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).parents[1]
RECORD = Path("benchmarks", "results", "robustness", "mutations.json")


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # in pgsuite/
    old: str  # stands there once
    new: str
    tests: tuple[str, ...]  # file without test_, and function, with parameters where few are enough


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(name, file, old, new, tests)


ESTIMATORS, OBJECTIVES = "functional/estimators.py", "functional/objectives.py"
TRUST_REGION, DISTRIBUTIONS = "functional/trust_region.py", "nn/distributions.py"
CLASSIC, MUJOCO = "envs/tasks/classic.py", "envs/tasks/mujoco.py"
CLASSIC_TEST = "envs::test_classic_tasks_equal_gymnasium_in_float64"
MUJOCO_TEST = "envs::test_mujoco_tasks_equal_gymnasium_step_by_step"
SUMS = "estimators::test_every_estimator_is_the_sum_it_says"
RETURN = "gradients::test_every_method_ascends_the_expected_return"

MUTATIONS = [
    # Returns and advantages: sums written out, rlax and rsl-rl.
    fault(
        "gae bootstraps from a terminal state",
        ESTIMATORS,
        "delta = reward + gamma * next_value.where(~terminated, 0.0) - value\n",
        "delta = reward + gamma * next_value - value\n",
        "estimators::test_generalized_advantages_are_the_sum_of_discounted_errors",
        "estimators::test_no_bootstrap_is_taken_from_a_terminal_state",
    ),
    fault(
        "a scan by doubling adds the last row to the first",
        ESTIMATORS,
        "decay = torch.cat([torch.zeros_like(decay[:1]), decay[1:]])",
        "decay = decay.clone()",
        "estimators::test_a_scan_is_its_recurrence",
    ),
    fault(
        "a scan by doubling forgets part of its decay",
        ESTIMATORS,
        "decay = decay * decay.roll(width // 2, 0)",
        "decay = decay.roll(0, 0)",
        "estimators::test_a_scan_is_its_recurrence",
    ),
    fault(
        "gae crosses into the next episode",
        ESTIMATORS,
        "reverse_scan(delta, gamma * lam * (~done).to(delta.dtype))",
        "reverse_scan(delta, gamma * lam * (~terminated).to(delta.dtype))",
        "estimators::test_generalized_advantages_are_the_sum_of_discounted_errors",
    ),
    fault(
        "gae decays without gamma",
        ESTIMATORS,
        "reverse_scan(delta, gamma * lam * (~done).to(delta.dtype))",
        "reverse_scan(delta, lam * (~done).to(delta.dtype))",
        "estimators::test_gae_agrees_with_rlax",
        "estimators::test_gae_agrees_with_rsl_rl",
    ),
    fault(
        "returns to go are not discounted",
        ESTIMATORS,
        "return reverse_scan(reward, gamma * (~done).to(reward.dtype))",
        "return reverse_scan(reward, (~done).to(reward.dtype))",
        "estimators::test_discounted_returns_agree_with_rlax",
    ),
    fault(
        "Monte Carlo bootstraps where episodes terminate",
        ESTIMATORS,
        "tail = next_value.where(_ends(done) & ~terminated, 0.0)",
        "tail = next_value.where(_ends(done), 0.0)",
        SUMS,
    ),
    fault(
        "Monte Carlo does not bootstrap at the end of the rollout",
        ESTIMATORS,
        "tail = next_value.where(_ends(done) & ~terminated, 0.0)",
        "tail = next_value.where(done & ~terminated, 0.0)",
        SUMS,
    ),
    fault(
        "n-step returns have a reward too many",
        ESTIMATORS,
        "for _ in range(min(n, reward.shape[0]) - 1):",
        "for _ in range(min(n, reward.shape[0])):",
        SUMS,
    ),
    fault(
        "n-step returns run past the end of an episode",
        ESTIMATORS,
        "bootstrap.where(ends, _shift(returns))",
        "bootstrap.where(terminated, _shift(returns))",
        SUMS,
    ),
    fault(
        "lambda returns weigh the bootstrap by lambda",
        ESTIMATORS,
        "reward + gamma * (1 - weight) * bootstrap",
        "reward + gamma * weight * bootstrap",
        "estimators::test_lambda_returns_agree_with_rlax",
    ),
    fault(
        "V-trace does not clip rho",
        ESTIMATORS,
        "rho, c = ratio.clamp(max=rho_clip),",
        "rho, c = ratio,",
        "estimators::test_vtrace_is_the_sum_of_its_equation",
        "estimators::test_vtrace_agrees_with_rlax",
    ),
    fault(
        "V-trace clips traces by rho",
        ESTIMATORS,
        "lam * ratio.clamp(max=c_clip)",
        "lam * ratio.clamp(max=rho_clip)",
        "estimators::test_vtrace_is_the_sum_of_its_equation",
    ),
    fault(
        "leave-one-out counts oneself",
        ESTIMATORS,
        "count = distributed.total(live.sum(1, keepdim=True)) - live",
        "count = distributed.total(live.sum(1, keepdim=True))",
        "estimators::test_leave_one_out_is_the_mean_of_the_others",
    ),
    fault(
        "leave-one-out sees episodes that are over",
        ESTIMATORS,
        "returns, live = returns.where(mask, 0.0), mask",
        "returns, live = returns, mask",
        "estimators::test_leave_one_out_is_the_mean_of_the_other_live_ones_whatever_the_dead_hold",
    ),
    fault(
        "RLOO's baseline includes the response itself",
        ESTIMATORS,
        "* (score.shape[-1] / (score.shape[-1] - 1))",
        "* 1.0",
        "lm_methods::test_groups_are_compared_among_themselves",
    ),
    fault(
        "GRPO is not divided by the deviation",
        "algorithms/estimators.py",
        "(score.std(-1, keepdim=True) + 1e-4) if self.deviation",
        "1.0 if self.deviation",
        "lm_methods::test_groups_are_compared_among_themselves",
    ),
    # Objectives: rsl-rl, closed forms and enumeration.
    fault(
        "the clip takes the better of the two",
        OBJECTIVES,
        "return torch.min(ratio * advantage, ratio.clamp(1 - low",
        "return torch.max(ratio * advantage, ratio.clamp(1 - low",
        "distributions::test_clipped_surrogate_agrees_with_rsl_rl",
        "distributions::test_clipping_never_hides_a_mistake",
    ),
    fault(
        "the upper clip is the lower one",
        OBJECTIVES,
        "ratio.clamp(1 - low, 1 + high)",
        "ratio.clamp(1 - low, 1 + low)",
        "distributions::test_two_widths_of_the_clip_and_a_limit_to_what_a_bad_action_costs",
    ),
    fault(
        "the dual clip is for every advantage",
        OBJECTIVES,
        "torch.where(advantage < 0, torch.max(objective, limit * advantage), objective)",
        "torch.max(objective, limit * advantage)",
        "distributions::test_two_widths_of_the_clip_and_a_limit_to_what_a_bad_action_costs",
    ),
    fault(
        "k3 is k1",
        OBJECTIVES,
        "return log_ratio.expm1() - log_ratio",
        "return -log_ratio",
        "distributions::test_sampled_kl_is_k3_and_unbiased",
    ),
    fault(
        "the KL to the reference is the other one",
        OBJECTIVES,
        "return sampled_kl(-log_ratio)",
        "return sampled_kl(log_ratio)",
        "lm_methods::test_k1_is_unbiased_and_k3_too_and_never_negative",
    ),
    fault(
        "the Huber loss has a kink",
        OBJECTIVES,
        "huber * (2 * size - huber)",
        "huber * (2 * size)",
        "distributions::test_the_huber_error_is_square_inside_and_straight_outside_with_no_kink",
    ),
    fault(
        "a sequence's ratio has no gradient of the token",
        OBJECTIVES,
        "return mean.detach() + log_ratio - log_ratio.detach()",
        "return mean + 0 * log_ratio",
        "lm_methods::test_a_sequence_has_one_ratio_and_each_token_its_own_gradient",
    ),
    # Trust regions: dense linear algebra.
    fault(
        "conjugate gradient forgets its direction",
        TRUST_REGION,
        "p = r + torch.where(rr > tol, new_rr / rr, 0.0) * p",
        "p = r",
        "trust_region::test_conjugate_gradient_solves_like_a_dense_solver",
        "trust_region::test_conjugate_gradient_nears_the_solution_as_fast_as_theory_says",
    ),
    fault(
        "conjugate gradient goes on past convergence",
        TRUST_REGION,
        "alpha = torch.where(rr > tol, rr / (p @ ap), 0.0)",
        "alpha = rr / (p @ ap)",
        "trust_region::test_conjugate_gradient_past_convergence_changes_nothing",
    ),
    fault(
        "the Fisher product is not damped",
        TRUST_REGION,
        "return flat_grad(grad @ v, params, retain_graph=True) + damping * v",
        "return flat_grad(grad @ v, params, retain_graph=True)",
        "trust_region_methods::test_both_fisher_products_are_the_hessian_of_the_kl",
    ),
    fault(
        "the Gauss-Newton product is doubled",
        TRUST_REGION,
        "return distributed.mean(back[0]) + damping * v",
        "return 2 * distributed.mean(back[0]) + damping * v",
        "trust_region_methods::test_both_fisher_products_are_the_hessian_of_the_kl",
        "trust_region::test_fisher_product_of_the_bandit_is_its_fisher_matrix",
    ),
    fault(
        "the batched search takes the last that is acceptable",
        TRUST_REGION,
        "accepted & (accepted.cumsum(0) == 1)",
        "accepted & (accepted.cumsum(0) == accepted.sum())",
        "trust_region::test_both_searches_take_the_first_that_is_acceptable_or_none",
    ),
    fault(
        "the sequential search takes the first step as it is",
        TRUST_REGION,
        "        if accept(fraction):\n",
        "        if accept(fraction) or True:\n",
        "trust_region::test_both_searches_take_the_first_that_is_acceptable_or_none",
    ),
    fault(
        "the natural step forgets the factor two",
        "algorithms/npg.py",
        "length = (2 * self.max_kl /",
        "length = (self.max_kl /",
        "algorithms::test_the_natural_step_spends_its_budget_in_the_quadratic_model",
    ),
    fault(
        "the KL of a step is from new to old",
        "algorithms/npg.py",
        "masked_mean(old.kl(new), batch.mask)",
        "masked_mean(new.kl(old), batch.mask)",
        "algorithms::test_kl_is_from_old_to_new",
    ),
    fault(
        "TRPO does not ask for improvement",
        "algorithms/trpo.py",
        "return (improvement > 0) & (kl <= self.max_kl)",
        "return kl <= self.max_kl",
        "trust_region_methods::test_a_step_is_taken_where_it_improves_within_the_budget_and_nowhere_else",
    ),
    fault(
        "TRPO does not ask for the KL",
        "algorithms/trpo.py",
        "return (improvement > 0) & (kl <= self.max_kl)",
        "return improvement > 0",
        "trust_region_methods::test_a_step_is_taken_where_it_improves_within_the_budget_and_nowhere_else",
        "algorithms::test_trpo_backtracks_when_the_quadratic_model_lies",
    ),
    # Methods: gradients by enumeration, dynamic programming and Riccati.
    fault(
        "the policy descends",
        "algorithms/a2c.py",
        '"policy_loss": -self.policy_objective(',
        '"policy_loss": self.policy_objective(',
        f"{RETURN}[terminated-A2C",
    ),
    fault(
        "REINFORCE averages over all steps",
        "algorithms/reinforce.py",
        "loss = -gain.where(batch.mask, 0.0).sum() / batch.logp.shape[1]",
        "loss = -masked_mean(gain, batch.mask)",
        f"{RETURN}[terminated-Reinforce",
    ),
    fault(
        "the total return is that of the last step",
        "algorithms/reinforce.py",
        "returns = returns[0].expand_as(returns) if",
        "returns = returns[-1].expand_as(returns) if",
        "algorithms::test_the_total_return_pays_every_action_alike",
    ),
    fault(
        "the entropy bonus is a penalty",
        "algorithms/a2c.py",
        "- self.entropy_coef * means",
        "+ self.entropy_coef * means",
        "algorithms::test_the_loss_falls_with_entropy_and_with_the_critics_error",
    ),
    fault(
        "the critic's error is weighed by half",
        "algorithms/a2c.py",
        "+ self.value_coef * means",
        "+ 0.5 * self.value_coef * means",
        "algorithms::test_the_loss_falls_with_entropy_and_with_the_critics_error",
    ),
    fault(
        "PPO never stops for the KL",
        "algorithms/ppo.py",
        '(distributed.mean(updates[-1]["kl"]) > self.target_kl)',
        '(distributed.mean(updates[-1]["kl"]) < -self.target_kl)',
        "algorithms::test_ppo_stops_early_when_it_strays",
    ),
    fault(
        "advantages are not computed anew",
        "algorithms/ppo.py",
        "batch = self.compute_advantages(rollout) if updates and self.recompute_advantage else batch",
        "batch = self.compute_advantages(rollout) if updates and self.recompute_advantage and False else batch",
        "algorithms::test_credit_is_assigned_anew_before_each_epoch_where_asked",
    ),
    fault(
        "straying is paid for by half the nat",
        "algorithms/ppo_penalty.py",
        "return ratio * advantage - self.beta *",
        "return ratio * advantage - 0.5 * self.beta *",
        "algorithms::test_straying_is_paid_for_by_the_nat",
    ),
    fault(
        "the price of straying follows the KL the wrong way",
        "nn/schedules.py",
        "torch.where(far, 1 / self.factor, torch.where(near, self.factor, 1.0))",
        "torch.where(near, 1 / self.factor, torch.where(far, self.factor, 1.0))",
        "algorithms::test_the_price_of_straying_follows_how_far_an_update_went",
        "schedules::test_an_adaptive_number_follows_the_kl_within_its_bounds",
    ),
    fault(
        "the cosine schedule is a line",
        "nn/schedules.py",
        "return super().at((1 - math.cos(math.pi * fraction)) / 2)",
        "return super().at(fraction)",
        "schedules::test_a_schedule_is_its_formula",
    ),
    fault(
        "a time limit is the end of the task",
        "algorithms/estimators.py",
        "advantage = estimators.gae(r.reward, value, next_value, r.terminated, r.done,",
        "advantage = estimators.gae(r.reward, value, next_value, r.done, r.done,",
        "algorithms::test_a_time_limit_is_not_the_end_of_the_task",
    ),
    fault(
        "the price of the reference does not follow the KL",
        "algorithms/reference.py",
        "self.coef.mul_(1 + error * episodes / self.horizon)",
        "self.coef.mul_(1 - error * episodes / self.horizon)",
        "lm_methods::test_the_price_follows_the_kl_as_published",
    ),
    fault(
        "the KL penalty is a reward",
        "algorithms/reference.py",
        "rollout.reward - self.coef *",
        "rollout.reward + self.coef *",
        "lm_methods::test_the_penalty_is_paid_by_each_token_in_the_reward_or_in_the_loss_and_nowhere_else",
    ),
    # Distributions: torch's, rlax's, integrals and sampling.
    fault(
        "a Gaussian's density lacks a factor",
        DISTRIBUTIONS,
        "return -0.5 * z.square().sum(-1) - (self.log_sigma + 0.5 * math.log(2 * math.pi)).sum(-1)",
        "return -0.5 * z.square().sum(-1) - (self.log_sigma + 0.5 * math.log(math.pi)).sum(-1)",
        "distributions::test_gaussian_agrees_with_torch",
        "numerics::test_densities_integrate_to_one_and_entropies_are_their_integrals",
    ),
    fault(
        "a Gaussian's KL is the reverse",
        DISTRIBUTIONS,
        "precision = (-2 * other.log_sigma).exp()",
        "precision = (-2 * self.log_sigma).exp()",
        "distributions::test_gaussian_agrees_with_torch",
        "distributions::test_gaussian_kl_agrees_with_rlax",
    ),
    fault(
        "a Gaussian's samples have its variance for a deviation",
        DISTRIBUTIONS,
        "torch.addcmul(self.mean, self.log_sigma.exp(), noise)",
        "torch.addcmul(self.mean, (2 * self.log_sigma).exp(), noise)",
        "numerics::test_samples_are_spread_as_the_density_says",
    ),
    fault(
        "categorical samples take the least likely",
        DISTRIBUTIONS,
        "return (self.logits - noise.log()).argmax(-1)",
        "return (self.logits - noise.log()).argmin(-1)",
        "distributions::test_categorical_samples_by_probability",
    ),
    fault(
        "a categorical's entropy is negative",
        DISTRIBUTIONS,
        "return -(self.logits.exp() * self.logits).sum(-1)",
        "return (self.logits.exp() * self.logits).sum(-1)",
        "distributions::test_categorical_agrees_with_torch",
        "distributions::test_entropy_of_the_bandit_and_its_gradient",
    ),
    fault(
        "several choices count only the first",
        DISTRIBUTIONS,
        "return torch.stack([part.log_prob(x) for part, x in each]).sum(0)",
        "return torch.stack([part.log_prob(x) for part, x in each])[0]",
        "distributions::test_several_choices_are_independent_categoricals",
    ),
    fault(
        "bits are the other way around",
        DISTRIBUTIONS,
        "return (noise < self.logits.sigmoid()).long()",
        "return (noise > self.logits.sigmoid()).long()",
        "distributions::test_entropy_and_kl_are_what_sampling_says",
    ),
    fault(
        "squashing forgets the width of the bounds",
        DISTRIBUTIONS,
        "return self.base.log_prob(x) - log_slope(x).sum(-1) - (self.high - self.low).log().sum(-1)",
        "return self.base.log_prob(x) - log_slope(x).sum(-1)",
        "distributions::test_squashed_gaussian_agrees_with_torch",
    ),
    fault(
        "squashing forgets its slope",
        DISTRIBUTIONS,
        "slope = (log_slope(self.base.mean.unsqueeze(-1) + sigma * nodes) * weights).sum((-1, -2))",
        "slope = log_slope(self.base.mean).sum(-1)",
        "distributions::test_entropy_of_a_squashed_gaussian_is_its_integral",
    ),
    fault(
        "Beta's entropy has the wrong sign",
        DISTRIBUTIONS,
        "(own + (total - 2) * total.digamma()",
        "(own - (total - 2) * total.digamma()",
        "distributions::test_beta_agrees_with_torch",
    ),
    fault(
        "sigma may reach zero",
        DISTRIBUTIONS,
        "LOG_SIGMA_RANGE = (-20.0, 20.0)",
        "LOG_SIGMA_RANGE = (-2000.0, 2000.0)",
        "distributions::test_sigma_cannot_reach_zero",
    ),
    fault(
        "masks forbid nothing",
        "nn/heads.py",
        "return logits if allowed is None else logits.masked_fill(~allowed, FORBIDDEN)",
        "return logits",
        "heads::test_what_is_not_allowed_is_never_done",
        "heads::test_a_masked_categorical_is_the_categorical_of_what_is_allowed",
    ),
    # Normalizers.
    fault(
        "moments of parts forget that the means differ",
        "nn/normalize.py",
        "(var - self.var + delta**2 * (1 - share))",
        "(var - self.var)",
        "normalize::test_moments_of_parts_are_moments_of_the_whole",
        "properties::test_running_moments_of_any_split_are_those_of_the_whole",
    ),
    fault(
        "masked cells are seen",
        "nn/normalize.py",
        "x = x.reshape(-1, *self.mean.shape).to(self.mean.dtype).where(weight, 0.0)",
        "x = x.reshape(-1, *self.mean.shape).to(self.mean.dtype)",
        "normalize::test_masked_cells_are_not_seen_whatever_they_hold",
    ),
    fault(
        "moments begin with a sample that nobody gave",
        "nn/normalize.py",
        '"count": torch.zeros(())}',
        '"count": torch.full((), 1e-4)}',
        "normalize::test_a_unit_deviation_around_any_offset_is_standardized_to_one",
    ),
    fault(
        "a large mean is subtracted in float32",
        "nn/normalize.py",
        "self.shift.copy_((self.center - self.mean) * self.scale)",
        "pass",
        "normalize::test_a_unit_deviation_around_any_offset_is_standardized_to_one",
    ),
    fault(
        "rewards are scaled by what was seen before them",
        "algorithms/base.py",
        "            self.reward_scale.update(rollout.reward, rollout.start, rollout.mask, self.gamma)\n",
        "            pass\n",
        "algorithms::test_multiplying_all_rewards_changes_nothing[PPO",
    ),
    fault(
        "a policy begins at zero wherever its Box is",
        "nn/heads.py",
        "mean = torch.addcmul(self.middle, gaussian.mean, self.half_width)",
        "mean = gaussian.mean * self.half_width",
        "heads::test_a_gaussian_acts_in_units_of_half_the_width_from_the_middle_of_its_box",
    ),
    fault(
        "observations are not clipped",
        "nn/normalize.py",
        "return x if clip is None else x.clamp(-clip, clip)",
        "return x",
        "normalize::test_standardize_is_the_identity_until_update_and_clips",
    ),
    fault(
        "the discounted return runs on into the next episode",
        "nn/normalize.py",
        "scan(reward, gamma * (~start).to(reward.dtype), self.discounted_return)",
        "scan(reward, gamma * torch.ones_like(reward), self.discounted_return)",
        "normalize::test_reward_scale_is_the_deviation_of_discounted_returns_across_rollouts",
    ),
    fault(
        "advantages are standardized over all cells",
        "types.py",
        "    return x.where(mask, 0.0).sum(cells) / count",
        "    return x.where(mask, 0.0).sum(cells) / mask.numel()",
        "normalize::test_standardized_advantages_have_unit_moments_over_real_cells",
    ),
    fault(
        "explained variance is of the prediction",
        "types.py",
        "torch.stack([target - value, target])",
        "torch.stack([value, target])",
        "normalize::test_explained_variance_of_perfect_and_constant_critics",
    ),
    # Networks and optimizers: torch's.
    fault(
        "Adam does not correct its bias",
        "nn/optim.py",
        "direction = mean / (1 - self.beta1**steps) / deviation",
        "direction = mean / deviation",
        "algorithms::test_one_flat_vector_steps_as_separate_parameters_would",
    ),
    fault(
        "RMSprop decays twice",
        "nn/optim.py",
        "square = torch.addcmul(self.square * self.alpha, gradient, gradient, value=1 - self.alpha)",
        "square = torch.addcmul(self.square * self.alpha**2, gradient, gradient, value=1 - self.alpha)",
        "algorithms::test_one_flat_vector_steps_as_separate_parameters_would",
    ),
    fault(
        "gradients are not clipped",
        "nn/optim.py",
        "gradient = gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)",
        "gradient = gradient * 1.0",
        "algorithms::test_the_gradient_norm_is_bounded_where_asked",
    ),
    fault(
        "a GRU's update gate is inverted",
        "nn/recurrent.py",
        "torch.lerp(new, hidden_state, (update + update_too).sigmoid())",
        "torch.lerp(hidden_state, new, (update + update_too).sigmoid())",
        "recurrent::test_recurrences_are_torchs_own_and_forget_where_episodes_start",
    ),
    fault(
        "a memory outlives its episode",
        "nn/recurrent.py",
        "self.step(row, torch.where(fresh, 0.0, hidden_state))",
        "self.step(row, hidden_state)",
        "recurrent::test_recurrences_are_torchs_own_and_forget_where_episodes_start",
        "recurrent::test_a_poisoned_memory_is_forgotten_too",
    ),
    fault(
        "a stretch begins with another column's memory",
        "nn/recurrent.py",
        "column = first % self.start.shape[1]",
        "column = first // self.start.shape[1]",
        "recurrent::test_stretches_side_by_side_are_steps_one_after_the_other",
    ),
    fault(
        "a GRU's written derivative leaves out what the reset gate scales",
        "nn/recurrent.py",
        "torch.mul(slope[:, 2] * new_too, 1 - reset, out=slope[:, 0])",
        "torch.mul(into_new * new_too, 1 - reset, out=slope[:, 0])",
        "recurrent::test_stretches_side_by_side_are_steps_one_after_the_other",
        "recurrent::test_derivatives_of_recurrences_are_those_of_finite_differences",
    ),
    fault(
        "an LSTM's written derivative forgets its outputs' part in its cells",
        "nn/recurrent.py",
        "through_cell.addcmul_(through, steep)",
        "through_cell.add_(0)",
        "recurrent::test_stretches_side_by_side_are_steps_one_after_the_other",
        "recurrent::test_derivatives_of_recurrences_are_those_of_finite_differences",
    ),
    fault(
        "a transformer looks ahead",
        "nn/transformer.py",
        "((column <= own) & seen.unsqueeze(1))",
        "((column <= own + 1) & seen.unsqueeze(1))",
        "lm_transformer::test_nothing_that_comes_later_is_seen",
        "lm_transformer::test_reading_token_by_token_with_the_cache_is_reading_at_once",
    ),
    # Rollouts.
    fault(
        "minibatches are not shuffled anew",
        "rollout/minibatches.py",
        "torch.randperm(size, generator=generator, device=device)",
        "torch.arange(size)",
        "rollout::test_every_epoch_is_shuffled_anew",
    ),
    fault(
        "whole episodes are not masked after their end",
        "rollout/collect.py",
        "live = live & ~self.step(t, policy, live)",
        "self.step(t, policy, live)",
        "rollout::test_whole_episodes_are_masked_after_their_end_and_collection_stops_with_the_last",
    ),
    # Tasks: gymnasium, step by step.
    fault(
        "CartPole falls later",
        CLASSIC,
        "X_LIMIT: ClassVar = 2.4",
        "X_LIMIT: ClassVar = 2.5",
        "envs::test_classic_spaces_and_limits_are_gymnasiums[CartPole]",
    ),
    fault(
        "CartPole's pole is stiffer",
        CLASSIC,
        "self.HALF_LENGTH * (4.0 / 3.0 -",
        "self.HALF_LENGTH * (4.0 / 3.1 -",
        f"{CLASSIC_TEST}[CartPole-options0",
    ),
    fault(
        "Pendulum's speed is not limited",
        CLASSIC,
        "spin = spin.clamp(-self.MAX_SPEED, self.MAX_SPEED)",
        "spin = spin * 1.0",
        f"{CLASSIC_TEST}[Pendulum-options2",
    ),
    fault(
        "Pendulum's angle is not wrapped in the cost",
        CLASSIC,
        "from_top = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi",
        "from_top = angle",
        f"{CLASSIC_TEST}[Pendulum-options2",
    ),
    fault(
        "Acrobot is integrated by Euler",
        CLASSIC,
        "(s + self.DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4))",
        "(s + self.DT * (k1 + 0 * (k2 + k3 + k4)))",
        f"{CLASSIC_TEST}[Acrobot",
    ),
    fault(
        "MountainCar's wall bounces",
        CLASSIC,
        "velocity = torch.where((position == self.LOW) & (velocity < 0), 0.0, velocity)",
        "velocity = torch.where((position == self.LOW) & (velocity < 0), -velocity, velocity)",
        f"{CLASSIC_TEST}[MountainCar-options5",
    ),
    fault(
        "MountainCar arrives at any speed",
        CLASSIC,
        "arrived = (position >= self.GOAL) & (velocity >= self.goal_velocity)",
        "arrived = position >= self.GOAL",
        f"{CLASSIC_TEST}[MountainCar-options6",
    ),
    fault(
        "MuJoCo's velocity is of the state after the step alone",
        MUJOCO,
        "        self.before.copy_(self.position())\n        super().simulate(action)",
        "        super().simulate(action)\n        self.before.copy_(self.position())",
        f"{MUJOCO_TEST}[HalfCheetah",
    ),
    fault(
        "MuJoCo's effort is not squared",
        MUJOCO,
        "velocity, effort = self.velocity(), action.square().sum(-1)",
        "velocity, effort = self.velocity(), action.abs().sum(-1)",
        f"{MUJOCO_TEST}[HalfCheetah",
    ),
    fault(
        "Hopper observes velocities beyond its limit",
        MUJOCO,
        "qvel = self.physics.qvel.clamp(-self.qvel_limit, self.qvel_limit)",
        "qvel = self.physics.qvel * 1.0",
        "envs::test_great_speeds_are_observed_as_gymnasium_does[Hopper]",
    ),
    fault(
        "Hopper falls only by height",
        MUJOCO,
        "return super().healthy() & between(state, self.healthy_state_range).all(-1)",
        "return between(self.physics.qpos[:, 1], self.healthy_z_range)",
        f"{MUJOCO_TEST}[Hopper",
    ),
    fault(
        "Ant's contact forces are not clipped",
        MUJOCO,
        'return self.physics.outputs["cfrc_ext"].clamp(*self.contact_force_range)',
        'return self.physics.outputs["cfrc_ext"] * 1.0',
        f"{MUJOCO_TEST}[Ant",
    ),
    fault(
        "Reacher's effort is free",
        MUJOCO,
        "-self.reward_dist_weight * distance - self.reward_control_weight * effort",
        "-self.reward_dist_weight * distance",
        f"{MUJOCO_TEST}[Reacher",
    ),
    fault(
        "the true successor is lost at a restart",
        "envs/task_env.py",
        "step = step._replace(obs=self._observe())",
        "step = step._replace(obs=self._observe(), next_obs=self._observe())",
        "envs::test_the_clock_truncates_reports_the_true_successor_and_starts_again",
    ),
    fault(
        "what terminates is truncated as well",
        "envs/task_env.py",
        "truncated = (self.clock >= self.max_episode_steps) & ~terminated",
        "truncated = self.clock >= self.max_episode_steps",
        "envs::test_what_terminates_is_not_truncated_as_well",
    ),
    fault(
        "Warp does not take the action",
        MUJOCO,
        "        self.physics.ctrl.copy_(action)\n",
        "        self.physics.ctrl.copy_(action if self.physics.dtype.itemsize == 8 else 0 * action)\n",
        "warp::test_one_step_is_mujocos_to_single_precision[Hopper-cpu",
    ),
    # Devices and captures: tensors without values, and the tape.
    fault(
        "minibatches are drawn on the CPU",
        "rollout/minibatches.py",
        "torch.randperm(size, generator=generator, device=device)",
        "torch.randperm(size, generator=generator)",
        "device::test_settings_leave_iterations_on_the_device[adaptive]",
    ),
    fault(
        "actions are drawn by a generator of the CPU",
        "rollout/collect.py",
        'self.generator = seeding.generator(seed, "acting", env.device)',
        'self.generator = seeding.generator(seed, "acting")',
        "device::test_environments_in_torch_stay_on_the_device[Pendulum]",
    ),
    fault(
        "the first observations are marked on the CPU",
        "rollout/collect.py",
        "torch.ones(self.env.num_envs, dtype=torch.bool, device=self.env.device)",
        "torch.ones(self.env.num_envs, dtype=torch.bool)",
        "device::test_environments_in_torch_stay_on_the_device[Pendulum]",
    ),
    fault(
        "learning rates stay on the CPU",
        "nn/optim.py",
        "torch.tensor(float(lr), device=self.flat.device)",
        "torch.tensor(float(lr))",
        "device::test_environments_in_torch_stay_on_the_device[Pendulum]",
    ),
    fault(
        "fractions of a step are computed on the CPU",
        "algorithms/trpo.py",
        "self.max_backtracks, dtype=full_step.dtype, device=full_step.device\n",
        "self.max_backtracks, dtype=full_step.dtype\n",
        "device::test_settings_leave_iterations_on_the_device[shared]",
    ),
    fault(
        "returns are summed on the CPU",
        "rollout/episodes.py",
        "self.reward = torch.zeros(num_envs, device=device, dtype=torch.float64)",
        "self.reward = torch.zeros(num_envs, dtype=torch.float64)",
        "device::test_environments_in_torch_stay_on_the_device[torch-native]",
    ),
    fault(
        "values after the end are chosen by a mask",
        "functional/estimators.py",
        "    last[-1].fill_(True)\n",
        "    last[-1].fill_(True)\n    last[done & ~last] = False\n",
        "device::test_settings_leave_iterations_on_the_device[shared]",
    ),
    fault(
        "the metrics of a learning rate are read",
        "algorithms/base.py",
        "part.lr * part.lr_scale\n",
        "part.lr * float(part.lr_scale)\n",
        "device::test_environments_in_torch_stay_on_the_device[torch-native]",
    ),
    fault(
        "tokens are generated from positions on the CPU",
        "nn/transformer.py",
        "torch.arange(half, dtype=exact, device=x.device)",
        "torch.arange(half, dtype=exact)",
        "device::test_language_models_stay_on_the_device[grpo]",
    ),
    fault(
        "the graph of an epoch does not write all that its steps write",
        "execution/loops.py",
        "    for x, end in zip(state, ends[:carried], strict=True):\n",
        "    for x, end in zip(state[1:], ends[1:carried], strict=True):\n",
        "execution::test_the_steps_of_an_epoch_are_one_graph[False]",
    ),
    fault(
        "a part of a tensor is at its beginning in the graph of a loop",
        "execution/loops.py",
        "(view, 0, first, first + x.numel())",
        "(view, 0, 0, x.numel())",
        "execution::test_a_loop_holds_a_tensor_in_its_own_shape_and_views_of_it_in_its_memory",
    ),
    fault(
        "the minibatches of the graph of an epoch are not drawn from the generator of the run",
        "execution/loops.py",
        "partition(size, parts, device, self.algorithm.generator)",
        "partition(size, parts, device)",
        "execution::test_the_steps_of_an_epoch_are_one_graph[False]",
    ),
    fault(
        "the draws of a compiled rollout are not those of the environments' generator",
        "execution/rollouts.py",
        "drawn = draws(generator=self.env.generator)",
        "drawn = draws(generator=Generator())",
        "compiled_rollouts::test_a_rollout_of_a_task_is_one_graph[CartPole-]",
    ),
    fault(
        "the first step of a compiled rollout is taken twice",
        "execution/rollouts.py",
        "            self.put(before)\n",
        "            self.put(self.own)\n",
        "compiled_rollouts::test_a_rollout_of_a_task_is_one_graph[CartPole-]",
    ),
    fault(
        "a compiled rollout holds a number of the task for constant",
        "execution/rollouts.py",
        "key = policy, c.horizon, *self.numbers().items()\n",
        "key = policy, c.horizon\n",
        "compiled_rollouts::test_a_number_of_the_task_may_change_between_rollouts[gravities0]",
    ),
    fault(
        "the state after a compiled rollout is overwritten by the next",
        "execution/rollouts.py",
        "self.put(map_tensors(Tensor.clone, self.own))\n",
        "self.put(self.own)\n",
        "compiled_rollouts::test_a_collector_resumes_exactly[compile]",
    ),
    fault(
        "a failed capture keeps the tensors that it made",
        "execution/cuda_graphs.py",
        "            state.undo()\n",
        "            pass\n",
        "cuda_graphs::test_a_capture_that_fails_leaves_the_run_as_it_is_without_one[PPO-55]",
    ),
    fault(
        "a failed capture is tried again",
        "execution/cuda_graphs.py",
        "        self.hopeless = True\n",
        "        self.hopeless = False\n",
        "cuda_graphs::test_a_capture_that_fails_leaves_the_run_as_it_is_without_one[A2C-end]",
    ),
    fault(
        "a failed capture does not say where",
        "execution/cuda_graphs.py",
        "self.leave(where + str(error)",
        "self.leave(str(error)",
        "cuda_graphs::test_a_capture_that_fails_leaves_the_run_as_it_is_without_one[PPO-55]",
        "cuda_graphs::test_a_generator_that_no_graph_was_told_of_is_found_and_named",
    ),
    fault(
        "generators of environments are not registered",
        "execution/cuda_graphs.py",
        "            self.generators.append(x)\n",
        '            self.generators += [] if ".env." in name else [x]\n',
        "cuda_graphs::test_what_is_replayed_is_what_was_written[A2C]",
    ),
    fault(
        "a generator stays captured after a capture that fails",
        "execution/cuda_graphs.py",
        "                leave_capture(generator, state)\n",
        "                generator.set_state(state)\n",
        "cuda_graphs::test_after_a_capture_that_fails_generators_draw_on_from_where_they_were",
    ),
    # Trust.
    fault(
        "any module that a file names is imported",
        "trust.py",
        "if source is not None and not source.permits(path):",
        "if source is not None and not source.permits(path) and False:",
        "trust::test_code_of_a_stranger_is_not_imported[policy.distribution]",
        "trust::test_code_of_a_stranger_is_not_imported[env.import]",
        "trust::test_code_of_a_stranger_is_not_imported[checkpoint._target_]",
    ),
    fault(
        "the objects of pgsuite's modules are called",
        "trust.py",
        'return ":" not in path and _within(path, PACKAGES)',
        "return _within(path, PACKAGES)",
        "trust::test_code_of_a_stranger_is_not_imported[env.reward of ours]",
    ),
    fault(
        "environments import what a file names before the colon",
        "envs/gym_env.py",
        "imported(name, where=where)",
        "importlib.import_module(name)",
        "trust::test_code_of_a_stranger_is_not_imported[env.id]",
        "trust::test_code_of_a_stranger_is_not_imported[env.id native]",
    ),
    fault(
        "any signature proves a run to be one's own",
        "trust.py",
        "return expected is not None and hmac.compare_digest(expected.encode(), signature.encode())",
        "return True",
        "trust::test_a_forged_signature_proves_nothing[0",
    ),
    fault(
        "resume does not ask whose the run is",
        "app/train.py",
        "            adopt(before.source)\n",
        "            pass\n",
        "trust::test_code_of_a_stranger_is_not_imported[policy.body]",
        "trust::test_what_this_command_line_names_is_trusted_on_resume",
    ),
    fault(
        "trust is kept with the run",
        "app/train.py",
        'config = config | {"resume": None, "trust": False}',
        'config = config | {"resume": None}',
        "trust::test_trust_is_of_one_call_and_not_kept_with_the_run",
    ),
    fault(
        "compressed archives are opened",
        "trust.py",
        "if unpacked > size or any(x.compress_type != zipfile.ZIP_STORED for x in members):",
        "if unpacked > 1_000_000_000 * size:",
        "trust::test_an_archive_that_unpacks_to_much_more_is_refused_unopened",
    ),
    fault(
        "settings without end are followed",
        "trust.py",
        "        if count > LARGEST:\n",
        "        if count > 1e30:\n",
        "trust::test_settings_without_end_are_refused[within itself]",
    ),
    fault(
        "pieces of a step weigh alike",
        "algorithms/base.py",
        "weights = (size / size.sum().clamp(min=1.0)).unbind()",
        "weights = torch.full_like(size, 1 / len(size)).unbind()",
        "lm_methods::test_a_step_in_pieces_is_the_step_of_the_whole_with_a_piece_in_memory[ppo]",
    ),
    fault(
        "texts are put in pieces as they come",
        "rlhf/policy.py",
        "length.argsort(stable=True).tensor_split",
        "torch.arange(len(length)).tensor_split",
        "lm_methods::test_pieces_are_of_similar_lengths_and_have_no_padding_that_none_needs",
    ),
    fault(
        "advantages are standardized within the pieces of a step",
        "algorithms/base.py",
        "pieces = [part for _, part in self.policy.body.pieces(batch, self.micro_batches)]",
        "pieces = [self.prepared(part) for _, part in self.policy.body.pieces(batch, self.micro_batches)]",
        "lm_methods::test_a_step_in_pieces_is_the_step_of_the_whole_with_a_piece_in_memory[ppo]",
    ),
    fault(
        "learning does not read the prompts",
        "rlhf/policy.py",
        "if PROMPT not in hidden_state:",
        "if True:",
        "lm_rollouts::test_a_rollout_is_as_wide_as_its_own_longest_prompt_and_response",
    ),
    fault(
        "responses follow the prompts of others",
        "rlhf/policy.py",
        "x.index_select(0, column) for name",
        "x.index_select(0, column.flip(0)) for name",
        "lm_rollouts::test_a_prompt_of_several_columns_is_computed_once_and_learns_from_all",
    ),
    fault(
        "mirrored episodes are forgotten between rollouts",
        "algorithms/symmetry.py",
        "self.memory[body.name].hidden_state.copy_(after)",
        "self.memory[body.name].hidden_state.copy_(0 * after)",
        "symmetry::test_memories_of_mirrored_episodes_are_those_of_having_lived_through_them",
    ),
    fault(
        "the margin of CPO does not tighten its constraint",
        "algorithms/cpo.py",
        "self.episodes.cost + self.margin.value - self.cost_limit",
        "self.episodes.cost - self.cost_limit",
        "constrained::test_a_margin_gathers_violations_and_is_a_lower_limit",
    ),
    fault(
        "directories of transformers may bring pickles",
        "rlhf/policy.py",
        "use_safetensors=True,\n            ",
        "",
        "trust::test_a_language_model_of_a_stranger_runs_no_code_either",
    ),
]


def copy_of_checkout(folder: Path) -> None:
    """The files of the working tree, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith("benchmarks/results") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def arguments(tests: tuple[str, ...]) -> list[str]:
    """Files, and all of their named functions."""
    return sorted({f"tests/test_{test.partition('[')[0].replace('::', '.py::')}" for test in tests})


def run_tests(folder: Path, tests: tuple[str, ...], answer: Connection) -> None:
    """In a process of its own: sends which of the tests failed, and which were there at all."""
    import pytest

    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    sys.dont_write_bytecode = True
    with open(os.devnull, "w") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
    failed: set[str] = set()
    seen: set[str] = set()

    class Watch:
        def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
            def matches(item: pytest.Item) -> bool:
                """Long ones only where a fault names their parameters."""
                named = [test for test in tests if covers(test, item.nodeid)]
                return any("[" in test or not item.get_closest_marker("long") for test in named)

            items[:] = [item for item in items if matches(item)]

        @pytest.hookimpl(trylast=True)
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            found = {test for test in tests if covers(test, report.nodeid)}
            if report.when == "call" and not report.skipped:
                seen.update(found)
            if report.failed and not hasattr(report, "wasxfail"):
                failed.update(found)

        def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
            return True if all(test in failed for test in tests if covers(test, item.nodeid)) else None

    pytest.main(["-q", "-p", "no:cacheprovider", *arguments(tests)], plugins=[Watch()])
    answer.send((sorted(failed), sorted(seen)))


def covers(test: str, node: str) -> bool:
    """Whether a test of a mutation names this node of pytest; parameters may be cut off at the right."""
    file, _, name = test.partition("::")
    return node.startswith(f"tests/test_{file}.py::{name}") and (
        "[" in name or node.partition("[")[0].endswith(f"::{name}")
    )


def outcome(folder: Path, tests: tuple[str, ...], patience: float) -> tuple[set[str], set[str]] | None:
    """Which of the tests failed and which were run; None if the process ended or did not."""
    ours, theirs = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=run_tests, args=(folder, tests, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(patience) else None
    except EOFError:
        found = None
    process.kill()
    process.join()
    return None if found is None else (set(found[0]), set(found[1]))


def judge(folder: Path, mutation: Mutation, patience: float) -> str:
    """Plant a fault, run its tests, and take it out again."""
    path = folder / "pgsuite" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return f"stale: its text stands {text.count(mutation.old)} times in pgsuite/{mutation.file}"
    planted = text.replace(mutation.old, mutation.new)
    ast.parse(planted)  # a test that fails for the syntax shows nothing
    path.write_text(planted)
    try:
        found = outcome(folder, mutation.tests, patience)
    finally:
        path.write_text(text)
    if found is None:
        return f"killed: the tests did not end within {patience:.0f} s"
    survived = [test for test in mutation.tests if test not in found[0]]
    return f"survived: {', '.join(survived)}" if survived else "killed"


# Imported here, so that the processes that are forked need not do it again.
PRELOADED = ("gymnasium", "hydra._internal.hydra", "hypothesis", "mujoco", "pytest", "torch.utils.tensorboard")
FORKED = multiprocessing.get_context("fork")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="faults whose names contain it; may be repeated"
    )
    parser.add_argument("--patience", type=float, default=180, help="seconds that the tests of a fault may take")
    wanted = parser.parse_args()
    chosen = [x for x in MUTATIONS if not wanted.only or any(part in x.name for part in wanted.only)]
    if not chosen:
        sys.exit(f"error: no fault has a name with {' or '.join(wanted.only)}; one of: {', '.join(NAMES)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "PGSUITE_LONG": "1"}
    for name in PRELOADED:
        importlib.import_module(name)
    record, bad, began = {}, [], perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_checkout(folder)
        every = tuple(dict.fromkeys(test for x in chosen for test in x.tests))
        sound = outcome(folder, every, 10 * wanted.patience)
        if sound is None:
            sys.exit("error: without any fault, the tests do not end")
        if wrong := sorted(sound[0] | (set(every) - sound[1])):
            sys.exit(f"error: without any fault, these fail, or are no tests that are run: {', '.join(wrong)}")
        print(f"without any fault, {len(every)} tests pass in {perf_counter() - began:.0f} s", flush=True)
        for mutation in chosen:
            start = perf_counter()
            record[mutation.name] = verdict = judge(folder, mutation, wanted.patience)
            bad += [mutation.name] if not verdict.startswith("killed") else []
            print(f"{perf_counter() - start:5.1f} s  {mutation.name}: {verdict}", flush=True)
    print(f"{len(chosen) - len(bad)} of {len(chosen)} faults were found, in {perf_counter() - began:.0f} s")
    if not wanted.only:
        path = ROOT / RECORD
        path.parent.mkdir(parents=True, exist_ok=True)
        faults = [{"fault": x.name, "file": x.file, "tests": x.tests, "outcome": record[x.name]} for x in chosen]
        summary = {"faults": len(chosen), "found": len(chosen) - len(bad), "seconds": round(perf_counter() - began)}
        path.write_text(json.dumps(summary | {"each": faults}, indent=1) + "\n")
    sys.exit(1 if bad else 0)


NAMES = [x.name for x in MUTATIONS]

if __name__ == "__main__":
    main()
