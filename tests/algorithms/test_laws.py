"""What each card reduces to."""

import dataclasses
import math

import pytest
import torch

from llmac.algorithms import ALGORITHMS
from llmac.algorithms.base import ClippedPolicy
from llmac.core.baselines import group_mean
from llmac.core.losses import reinforce
from llmac.core.masking import aggregate, whiten
from llmac.core.returns import reward_to_go, segment_gae
from llmac.core.segments import response_start
from llmac.core.types import Credit, Values

from .making import (
    LABELS,
    card,
    card_class,
    make_rollouts,
    make_values,
    moved,
    ragged,
    values_for,
    with_rewards,
)

CLIPPED_CARDS = [name for name in ALGORITHMS if issubclass(card_class(name), ClippedPolicy)]
ONLY_ADVANTAGES = {
    "vapo": {"likelihood_coef": 0.0},
    "safe": {"entropy_coef": 0.0},
    "spo_chain": {"kl_coef": 0.0},
    "spo_tree": {"kl_coef": 0.0},
    "critique_rl": {"kl_coef": 0.0},
    "rl4f": {"kl_coef": 0.0},
    "dapo_step": {"beta": 1.0},  # else the gradient is REINFORCE's over beta
}
SUPERVISED = {"sft", "imitation", "rerank_distill", "critique_loop", "critique_filter"}
"""Cards that have no advantage, but the likelihood of what is given."""
WHITENED = {"reinforce_pp_baseline", "critique_rl"}
"""Group cards that remove the mean of the step's tokens, too."""
GROUP_CARDS = [
    name
    for name in ALGORITHMS
    if hasattr(card_class(name), "outcome_advantages")
    and not card(name).uses_values
    and name not in LABELS  # their rewards can be neither shifted nor fractions
]


def gradient_of(algorithm, rollouts, credit, logprobs):
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    return torch.autograd.grad(loss.total, logprobs)[0]


def test_grpo_without_std_is_one_segment_with_the_group_mean_as_value(rollouts):
    outcomes = rollouts.rewards.sum(-1)
    starts = response_start(rollouts.action_mask)
    values = group_mean(outcomes, rollouts.group)[0][:, None].expand_as(rollouts.rewards)
    expected = segment_gae(
        rollouts.rewards,
        values,
        starts,
        torch.zeros_like(outcomes),
        gamma=1.0,
        lam=1.0,
        action_mask=rollouts.action_mask,
    )
    full = rollouts.group != 9  # group 9 has an empty response, whose reward stands on no token
    credit = card("grpo", scale="none").credit(rollouts, None)
    assert torch.allclose(credit.advantages[full], expected[full])


def test_rloo_is_dr_grpo_times_n_over_n_minus_1(rollouts):
    dr_grpo = card("dr_grpo").credit(rollouts, None).advantages
    assert torch.allclose(card("rloo").credit(rollouts, None).advantages, dr_grpo * 4 / 3)


def test_grpo_without_std_has_dr_grpos_advantages(rollouts):
    dr_grpo = card("dr_grpo").credit(rollouts, None).advantages
    assert torch.equal(card("grpo", scale="none").credit(rollouts, None).advantages, dr_grpo)


def test_ppo_with_gamma_and_lam_1_is_return_minus_value(rollouts):
    values = make_values(rollouts)
    credit = card("ppo", gamma=1.0, lam=1.0, whiten_advantages=False).credit(rollouts, values)
    expected = reward_to_go(rollouts.rewards) - values.at
    mask = rollouts.action_mask
    assert torch.allclose(credit.advantages[mask], expected[mask])
    assert torch.allclose(credit.critic_targets.returns[mask], reward_to_go(rollouts.rewards)[mask])


def test_ppo_with_a_critic_that_says_nothing_is_reinforce_pp(rollouts):
    nothing = Values(
        at=torch.zeros_like(rollouts.rewards),
        starts=rollouts.action_mask,
        bootstrap=torch.zeros_like(rollouts.rewards[:, 0]),
    )
    shared = {"kl_coef": 0.1, "gamma": 0.9}
    ppo = card("ppo", lam=1.0, **shared).credit(rollouts, nothing).advantages
    assert torch.allclose(ppo, card("reinforce_pp", **shared).credit(rollouts, None).advantages)


def test_reinforce_pp_is_the_whitened_reward_to_go_where_nothing_is_injected():
    rollouts = make_rollouts(rewards=[1, 0, 2], lengths=[3, 5, 4], group=[0, 1, 2])
    expected = whiten(reward_to_go(rollouts.rewards, gamma=0.9), rollouts.action_mask)
    advantages = card("reinforce_pp", gamma=0.9).credit(rollouts, None).advantages
    assert torch.allclose(advantages, expected)


def test_reinforce_pp_does_not_discount_injected_tokens():
    plain = make_rollouts(rewards=[1, 0], lengths=[3, 3], group=[0, 1])
    with_tool = make_rollouts(rewards=[1, 0], lengths=[4, 3], group=[0, 1], injected=[(0, 1)])
    algorithm = card("reinforce_pp", gamma=0.5)
    expected = algorithm.credit(plain, None).advantages[0]
    assert torch.allclose(algorithm.credit(with_tool, None).advantages[0, [0, 2, 3]], expected)


def test_kl_in_the_reward_costs_each_token_the_kl_that_follows(rollouts):
    values = make_values(rollouts)
    free = card("ppo", whiten_advantages=False).credit(rollouts, values).advantages
    paid = card("ppo", whiten_advantages=False, kl_coef=0.3).credit(rollouts, values).advantages
    k1 = torch.where(rollouts.action_mask, rollouts.old_logprobs - rollouts.ref_logprobs, 0.0)
    mask = rollouts.action_mask
    assert torch.allclose((free - paid)[mask], 0.3 * reward_to_go(k1)[mask])


def test_gspo_is_token_ppo_for_responses_of_one_token():
    rollouts = make_rollouts(rewards=[1, 0, 1, 0], lengths=[1] * 4, group=[0] * 4)
    clips = {"clip_low": 0.1, "clip_high": 0.2}
    gspo, grpo = card("gspo", **clips), card("grpo", **clips)
    credit = grpo.credit(rollouts, None)
    logprobs = moved(rollouts)
    ours, token = (a.policy_loss(logprobs, rollouts, credit) for a in (gspo, grpo))
    assert torch.equal(ours.total, token.total)
    assert torch.equal(
        gradient_of(gspo, rollouts, credit, logprobs), gradient_of(grpo, rollouts, credit, logprobs)
    )


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n not in SUPERVISED])
def test_before_the_policy_moves_every_card_has_reinforces_gradient(name, rollouts):
    algorithm = card(name, aggregation="token_mean", **ONLY_ADVANTAGES.get(name, {}))
    rollouts = dataclasses.replace(rollouts, ref_logprobs=rollouts.old_logprobs)
    credit = algorithm.credit(rollouts, values_for(algorithm, rollouts))
    logprobs = rollouts.old_logprobs.clone().requires_grad_()
    per_token = reinforce(logprobs, credit.advantages)
    total, _ = aggregate(per_token, credit.policy_mask, "token_mean", horizon=1)
    expected = torch.autograd.grad(total, logprobs)[0]
    assert torch.allclose(gradient_of(algorithm, rollouts, credit, logprobs), expected)


@pytest.mark.parametrize("name", [n for n in CLIPPED_CARDS if n != "gspo"])
def test_without_a_clip_the_gradient_is_the_ratio_times_reinforces(name, rollouts):
    fields = {"clip_low": math.inf, "clip_high": math.inf, **ONLY_ADVANTAGES.get(name, {})}
    algorithm = card(name, aggregation="token_mean", **fields)
    credit = algorithm.credit(rollouts, values_for(algorithm, rollouts))
    logprobs = moved(rollouts)
    ratio = (logprobs - rollouts.old_logprobs).exp().detach()
    expected = torch.where(credit.policy_mask, -credit.advantages * ratio, 0.0)
    assert torch.allclose(gradient_of(algorithm, rollouts, credit, logprobs), expected)


@pytest.mark.parametrize("name", GROUP_CARDS)
def test_a_constant_added_to_a_groups_rewards_changes_nothing(name, rollouts):
    outcomes = [t.reward for t in rollouts.trajectories]
    shifted = with_rewards(
        rollouts, [r + 3.0 * (g == 4) for r, g in zip(outcomes, rollouts.group, strict=True)]
    )
    before, after = (card(name).credit(r, None).advantages for r in (rollouts, shifted))
    assert torch.allclose(before, after)


@pytest.mark.parametrize(
    ("name", "factor"), [("grpo", 1), ("dr_grpo", 5), ("rloo", 5), ("cispo", 1)]
)
def test_rewards_times_five(name, factor, rollouts):
    larger = with_rewards(rollouts, [5 * t.reward for t in rollouts.trajectories])
    before, after = (card(name).credit(r, None).advantages for r in (rollouts, larger))
    assert torch.allclose(after, factor * before, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in GROUP_CARDS if n not in WHITENED])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, -1e4 - 0.1])
def test_equal_rewards_earn_exactly_nothing_in_float32(name, reward):
    rollouts = ragged(dtype=torch.float32)
    outcomes = [
        reward if g == 4 else t.reward
        for g, t in zip(rollouts.group, rollouts.trajectories, strict=True)
    ]
    algorithm = card(name, **({"overlong_buffer_tokens": 0} if name == "dapo" else {}))
    advantages = algorithm.credit(with_rewards(rollouts, outcomes), None).advantages
    assert (advantages[rollouts.group == 4] == 0).all()
    assert (advantages[rollouts.group == 0] != 0).any()


def test_reinforce_pp_baseline_moves_equal_groups_by_the_mean_of_the_step(rollouts):
    outcomes = [
        0.5 if g == 4 else t.reward
        for g, t in zip(rollouts.group, rollouts.trajectories, strict=True)
    ]
    credit = card("reinforce_pp_baseline").credit(with_rewards(rollouts, outcomes), None)
    mask = credit.policy_mask
    assert credit.advantages[mask].mean().item() == pytest.approx(0, abs=1e-9)
    assert credit.advantages[mask].var().item() == pytest.approx(1, abs=1e-6)
    assert len(credit.advantages[mask & (rollouts.group == 4)[:, None]].unique()) == 1


def test_a_response_without_tokens_still_counts_among_its_siblings(rollouts):
    empty = (~rollouts.action_mask.any(-1)).nonzero().item()
    outcomes = [t.reward for t in rollouts.trajectories]
    lower = [0.0 if row == empty else r for row, r in enumerate(outcomes)]
    before, after = (
        card("dr_grpo").credit(with_rewards(rollouts, r), None).advantages
        for r in (outcomes, lower)
    )
    siblings = (rollouts.group == 9)[:, None] & rollouts.action_mask
    # its reward falls by 1, so the mean of four falls by 1/4
    assert torch.allclose((after - before)[siblings], torch.tensor(0.25, dtype=torch.float64))


def test_masked_truncated_responses_stay_out_of_both_losses_and_in_the_group(rollouts):
    masked = card("grpo", mask_truncated=True).credit(rollouts, None)
    kept = card("grpo").credit(rollouts, None)
    assert not masked.policy_mask[rollouts.truncated].any()
    whole = ~rollouts.truncated
    assert torch.equal(masked.policy_mask[whole], kept.policy_mask[whole])
    assert torch.equal(masked.advantages[whole], kept.advantages[whole])
    targets = (
        card("ppo", mask_truncated=True).credit(rollouts, make_values(rollouts)).critic_targets
    )
    assert not targets.value_mask[rollouts.truncated].any()


def test_whitening_leaves_out_what_the_policy_does_not_learn_from(rollouts):
    credit = card("ppo", mask_truncated=True).credit(rollouts, make_values(rollouts))
    learned = credit.advantages[credit.policy_mask]
    assert learned.mean().item() == pytest.approx(0, abs=1e-9)
    assert learned.var().item() == pytest.approx(1, abs=1e-6)


def test_sparse_values_give_segments_and_targets_only_where_a_value_was_asked(rollouts):
    values = make_values(rollouts)
    sparse = dataclasses.replace(values, starts=response_start(rollouts.action_mask))
    credit = card("ppo", whiten_advantages=False).credit(rollouts, sparse)
    outcomes = rollouts.rewards.sum(-1)
    first = sparse.starts.int().argmax(-1)
    expected = outcomes - values.at.gather(1, first[:, None]).squeeze(1)
    some = rollouts.action_mask.any(-1)
    assert torch.allclose(
        credit.advantages.gather(1, first[:, None]).squeeze(1)[some], expected[some]
    )
    assert torch.equal(credit.critic_targets.value_mask, sparse.starts)


def test_weights_of_one_leave_the_loss_as_it_is(rollouts):
    algorithm = card("grpo")
    credit = algorithm.credit(rollouts, None)
    ones = dataclasses.replace(credit, importance=torch.ones_like(credit.advantages))
    half = dataclasses.replace(credit, importance=torch.full_like(credit.advantages, 0.5))
    logprobs = moved(rollouts)
    plain, one, halved = (
        algorithm.policy_loss(logprobs, rollouts, c).total for c in (credit, ones, half)
    )
    assert torch.equal(plain, one)
    assert torch.allclose(plain * 0.5, halved)


def test_the_entropy_bonus_pulls_towards_more_entropy(rollouts):
    algorithm = card("grpo", entropy_coef=0.25, aggregation="token_mean")
    zero = Credit(advantages=torch.zeros_like(rollouts.rewards), policy_mask=rollouts.action_mask)
    entropy = torch.ones_like(rollouts.rewards, requires_grad=True)
    loss = algorithm.policy_loss(rollouts.old_logprobs, rollouts, zero, entropy=entropy)
    (gradient,) = torch.autograd.grad(loss.total, entropy)
    assert torch.equal(gradient, -0.25 * rollouts.action_mask)


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if card(n).uses_values])
def test_a_card_says_truly_whether_it_teaches_its_critic(name, rollouts):
    algorithm = card(name)
    memory = algorithm.memory()
    remembered = {} if memory is None else {"memory": memory}
    targets = algorithm.credit(rollouts, make_values(rollouts), **remembered).critic_targets
    assert (targets is not None) == algorithm.teaches_critic
    assert algorithm.teaches_critic == (name not in {"dapo_step", "tempo", "spo_chain", "spo_tree"})


@pytest.mark.parametrize(
    ("name", "fields", "keeps"),
    [
        *(
            (n, {}, n not in {"t_ppo", "spo_tree", "sft", "critique_loop", "critique_filter"})
            for n in ALGORITHMS
        ),
        ("dapo_step", {"rollouts": "stored.parquet"}, False),
    ],
)
def test_siblings_are_in_one_step_unless_responses_are_windowed_or_replayed(name, fields, keeps):
    assert card(name, **fields).keeps_groups == keeps
