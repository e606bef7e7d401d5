"""What every card with a critic offers: λ by rule, V-trace, clipped advantages."""

import dataclasses

import pytest
import torch

from llmac.algorithms import ALGORITHMS
from llmac.algorithms.critic_credit import CriticCredit
from llmac.core.masking import whiten
from llmac.core.returns import segment_gae
from llmac.core.segments import response_start
from llmac.core.traces import doubt_lam, length_lam
from llmac.core.types import Values
from llmac.core.vtrace import segment_ratios, vtrace

from .making import card, card_class, known, make_values

# VAPO adds a term of its own to this credit, and T-PPO teaches the critic at other tokens: they have
# their own tests. VinePPO and GenAC are PPO with other defaults, λ among them.
CRITIC_CARDS = [
    n
    for n in ALGORITHMS
    if card_class(n).credit is CriticCredit.credit and n not in ("vineppo", "genac", "t_ppo")
]
every_card = pytest.mark.parametrize("name", CRITIC_CARDS)
RAW = {"kl_coef": 0.0, "whiten_advantages": False}


def three_tokens(*, values=(0.2, 0.5, 0.8), **kinds):
    rollouts = known(old=[[-1.0, -1.0, -1.0]], rewards=[1.0], **kinds)
    at = torch.tensor([values], dtype=torch.float64)
    nothing = torch.zeros(1, dtype=torch.float64)
    return rollouts, Values(at=at, starts=rollouts.action_mask, bootstrap=nothing)


def test_there_are_cards_to_test():
    assert {"ppo", "a2c"} <= set(CRITIC_CARDS)


@every_card
def test_the_critic_learns_the_return_while_the_policy_has_its_own_lambda(name):
    credit = card(name, lam=0.95, critic_lam=1.0, **RAW).credit(*three_tokens())
    assert credit.advantages[0].tolist() == pytest.approx([0.7655, 0.49, 0.2])
    assert credit.critic_targets.returns[0].tolist() == pytest.approx([1.0, 1.0, 1.0])
    coupled = card(name, lam=0.95, **RAW).credit(*three_tokens())
    assert coupled.critic_targets.returns[0].tolist() == pytest.approx([0.9655, 0.99, 1.0])


@every_card
def test_lambda_by_length_is_that_of_each_row(name, rollouts):
    values = make_values(rollouts)
    credit = card(name, lam_rule="length", lam_alpha=0.5, **RAW).credit(rollouts, values)
    expected = segment_gae(
        rollouts.rewards,
        values.at,
        values.starts,
        torch.zeros_like(values.bootstrap),
        gamma=1.0,
        lam=length_lam(rollouts.action_mask, alpha=0.5),
        action_mask=rollouts.action_mask,
    )
    assert torch.allclose(credit.advantages, expected)
    assert torch.allclose(credit.critic_targets.returns, (expected + values.at) * values.starts)


@every_card
def test_lambda_by_doubt_reads_the_probabilities_at_collection(name, rollouts):
    values = make_values(rollouts)
    credit = card(name, lam_rule="doubt", lam=0.5, doubt_below=0.3, **RAW).credit(rollouts, values)
    lam = doubt_lam(rollouts.old_logprobs, rollouts.action_mask, lam=0.5, threshold=0.3)
    assert {0.5, 1.0} <= set(lam[rollouts.action_mask].tolist())
    expected = segment_gae(
        rollouts.rewards,
        values.at,
        values.starts,
        torch.zeros_like(values.bootstrap),
        gamma=1.0,
        lam=lam,
        action_mask=rollouts.action_mask,
    )
    assert torch.allclose(credit.advantages, expected)


@every_card
@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_vtrace_where_engine_and_trainer_agree_is_gae(name, lam, rollouts):
    agreed = dataclasses.replace(rollouts, sampler_logprobs=rollouts.old_logprobs)
    values = make_values(agreed)
    fields = {"lam": lam, "critic_lam": 1.0, "on_truncation": "bootstrap"}
    plain = card(name, **fields).credit(agreed, values)
    corrected = card(name, off_policy="vtrace", **fields).credit(agreed, values)
    assert torch.allclose(corrected.advantages, plain.advantages)
    assert torch.allclose(corrected.critic_targets.returns, plain.critic_targets.returns)
    assert corrected.metrics["actor/vtrace_weight"].value == pytest.approx(1.0)
    assert "actor/vtrace_weight" not in plain.metrics


def test_what_sampler_and_reference_are_compared_on_was_sampled_in_this_step(rollouts):
    fields = {"off_policy": "vtrace", "kl_coef": 0.1, "kl_placement": "reward"}
    rows = [
        dataclasses.replace(t, fresh_from=(0, 2)[row % 2], age=(0, 1)[row % 3 == 0])
        for row, t in enumerate(rollouts.trajectories)
    ]
    rollouts = dataclasses.replace(rollouts, trajectories=tuple(rows))
    counted = sum(sum(t.action_mask[t.fresh_from :]) for t in rollouts.trajectories if t.age == 0)
    assert 0 < counted < rollouts.action_mask.sum()
    metrics = card("ppo", **fields).credit(rollouts, make_values(rollouts)).metrics
    for name in ("sampler_kl", "sampler_logprob_diff_mean", "ref_kl", "vtrace_weight"):
        assert float(metrics[f"actor/{name}"].weight) == counted, name


@every_card
def test_vtrace_of_three_tokens(name):
    # ratios π_old/μ = 2, 1/2, 1
    sampler = [[-1.0 - torch.log(torch.tensor(r)).item() for r in (2.0, 0.5, 1.0)]]
    credit = card(name, off_policy="vtrace", **RAW).credit(*three_tokens(sampler=sampler))
    assert credit.advantages[0].tolist() == pytest.approx([0.55, 0.25, 0.2])
    assert credit.critic_targets.returns[0].tolist() == pytest.approx([0.75, 0.75, 1.0])
    assert credit.metrics["actor/vtrace_weight"].value == pytest.approx((1 + 0.5 + 1) / 3)


@every_card
def test_vtrace_works_on_segments_with_their_own_ratios(name, rollouts):
    starts = response_start(rollouts.action_mask)
    values = dataclasses.replace(make_values(rollouts), starts=starts)
    credit = card(name, off_policy="vtrace", rho_max=1.5, **RAW).credit(rollouts, values)
    mask = rollouts.action_mask
    ratios = segment_ratios(rollouts.old_logprobs, rollouts.sampler_logprobs, starts, mask)
    expected, targets = vtrace(
        rollouts.rewards,
        values.at,
        ratios,
        starts,
        torch.zeros_like(values.bootstrap),
        gamma=1.0,
        lam=1.0,
        rho_max=1.5,
        c_max=1.0,
        action_mask=mask,
    )
    assert torch.allclose(credit.advantages, expected)
    assert torch.allclose(credit.critic_targets.returns, targets * starts)
    assert torch.equal(credit.critic_targets.value_mask, starts)


@every_card
def test_advantages_are_clipped_before_whitening_and_targets_are_not(name, rollouts):
    values = make_values(rollouts)
    mask = rollouts.action_mask
    raw = card(name, **RAW).credit(rollouts, values)
    clipped = card(name, advantage_clip=0.3, **RAW).credit(rollouts, values)
    assert torch.allclose(clipped.advantages, raw.advantages.clamp(-0.3, 0.3))
    assert torch.equal(clipped.critic_targets.returns, raw.critic_targets.returns)
    share = (raw.advantages[mask].abs() > 0.3).double().mean().item()
    assert 0 < share < 1
    assert clipped.metrics["critic/advantages/clipfrac"].value == pytest.approx(share)

    whitening = {**RAW, "whiten_advantages": True}
    white = card(name, advantage_clip=0.3, **whitening).credit(rollouts, values)
    assert torch.allclose(white.advantages, whiten(raw.advantages.clamp(-0.3, 0.3), mask))


@every_card
def test_a_bound_beyond_every_advantage_is_none(name, rollouts):
    values = make_values(rollouts)
    free = card(name).credit(rollouts, values).advantages
    bound = card(name, advantage_clip=50.0).credit(rollouts, values)
    assert torch.equal(bound.advantages, free)
    assert bound.metrics["critic/advantages/clipfrac"].value == 0
