"""SPO-chain: segments between doubtful tokens, worth what continuations say."""

import dataclasses
import math
import threading

import pytest
import torch

from llmac.core.kl import kl_estimate
from llmac.core.masking import whiten
from llmac.core.types import Finish, Values

from .making import card, known, make_rollouts, make_values, moved, padded, ragged

UNTOUCHED = {"train_below": None, "whiten": "none", "kl_coef": 0.0}


def chain_of(probabilities, worth, *, score=1.0, **fields):
    """One response, its card, and the values that continuations from each state have."""
    algorithm = card("spo_chain", **fields)
    rollouts = known(old=[[math.log(p) for p in probabilities]], rewards=[score])
    at = torch.full_like(rollouts.rewards, torch.nan)
    for t, value in worth.items():
        at[0, t] = value
    starts = algorithm.segments(rollouts)
    assert starts[0].nonzero().flatten().tolist() == sorted(worth)
    values = Values(at=at, starts=starts, bootstrap=torch.zeros(1, dtype=torch.float64))
    return algorithm, rollouts, values


EIGHT = [0.99, 0.5, 0.95, 0.8, 0.97, 0.6, 0.99, 0.3]
# Before tokens 1 and 5, the first and the third in doubt, 4 and 6 of 9 continuations succeed.
WORTH = {1: 4 / 9, 5: 6 / 9}


def test_a_segment_is_worth_the_change_between_its_cuts_and_the_first_is_worth_nothing():
    fields = {**UNTOUCHED, "cut_interval": 2}
    algorithm, rollouts, values = chain_of(EIGHT, WORTH, **fields)
    advantages = algorithm.credit(rollouts, values).advantages[0]
    assert advantages.tolist() == pytest.approx([0, *[2 / 9] * 4, *[3 / 9] * 3])


def test_near_certain_tokens_have_no_advantage():
    algorithm, rollouts, values = chain_of(EIGHT, WORTH, whiten="none", cut_interval=2)
    credit = algorithm.credit(rollouts, values)
    expected = [0, 2 / 9, 0, 2 / 9, 0, 3 / 9, 0, 3 / 9]
    assert credit.advantages[0].tolist() == pytest.approx(expected)
    assert credit.policy_mask[0].nonzero().flatten().tolist() == [1, 3, 5, 7]
    assert credit.metrics["actor/trained_tokens"].value == 0.5
    assert credit.metrics["rollout/segments"].value == 2


def test_advantages_are_whitened_over_the_tokens_in_doubt():
    # mean 5/18, unbiased standard deviation 1/18 · 2/sqrt(3): the eps of 1e-8 is seen at 1e-6
    algorithm, rollouts, values = chain_of(EIGHT, WORTH, cut_interval=2)
    advantages = algorithm.credit(rollouts, values).advantages[0, 1::2]
    expected = [-0.866024, -0.866024, 0.866024, 0.866024]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_first_token_in_doubt_is_asked_about():
    algorithm, rollouts, values = chain_of(
        [0.5, 0.95, 0.8, 0.97], {0: 3 / 9, 2: 5 / 9}, whiten="none", cut_interval=1
    )
    advantages = algorithm.credit(rollouts, values).advantages[0]
    assert advantages.tolist() == pytest.approx([2 / 9, 0, 4 / 9, 0])


def test_a_first_segment_may_be_asked_about_too():
    fields = {**UNTOUCHED, "cut_interval": 2, "first_segment": "value"}
    algorithm, rollouts, values = chain_of(EIGHT, {0: 1 / 9, **WORTH}, **fields)
    advantages = algorithm.credit(rollouts, values).advantages[0]
    assert advantages.tolist() == pytest.approx([3 / 9, *[2 / 9] * 4, *[3 / 9] * 3])


def test_a_response_without_doubt_is_worth_nothing_and_trained_if_there_is_no_other():
    algorithm, rollouts, values = chain_of([0.95, 0.99], {})
    credit = algorithm.credit(rollouts, values)
    assert credit.policy_mask.all()
    assert (credit.advantages == 0).all()
    assert credit.metrics["rollout/uncut_responses"].value == 1
    both = known(old=[[math.log(0.95)] * 2, [math.log(0.5)] * 2], rewards=[1.0, 0.0])
    credit = algorithm.credit(both, make_values(both))
    assert credit.policy_mask.tolist() == [[False, False], [True, True]]


def test_no_token_is_in_doubt_only_if_none_is_on_any_rank():
    algorithm, rollouts, _ = chain_of([0.95, 0.99], {})
    assert algorithm.trained(rollouts).all()
    assert not algorithm.trained(rollouts, lambda here: here + 1).any()


@pytest.mark.parametrize(("whitening", "below"), [("step", 0.5), ("rows", 0.5), ("none", None)])
def test_normalized_advantages_are_zero_where_nothing_is_trained(whitening, below, rollouts):
    algorithm = card("spo_chain", train_below=below, whiten=whitening)
    advantages = algorithm.normalized(torch.ones_like(rollouts.rewards) + 0.1, rollouts)
    assert (advantages[~algorithm.trained(rollouts)] == 0).all()


def test_a_token_at_the_threshold_keeps_its_advantage_and_is_not_trained():
    fields = {"train_below": 0.5, "whiten": "none"}
    algorithm, rollouts, values = chain_of(
        [0.5, 0.75, 0.25], {0: 0.25}, cut_below=0.6, cut_interval=3, **fields
    )
    credit = algorithm.credit(rollouts, values)
    assert credit.policy_mask.tolist() == [[False, False, True]]
    # If nothing was in doubt everything is trained, and then its advantage is seen.
    algorithm, rollouts, values = chain_of(
        [0.5, 0.75], {0: 0.25}, cut_below=0.6, cut_interval=3, **fields
    )
    credit = algorithm.credit(rollouts, values)
    assert credit.policy_mask.tolist() == [[True, True]]
    assert credit.advantages.tolist() == [[0.75, 0.0]]


def loss_with_ratios(ratios, advantages, **fields):
    """Mean loss of the given tokens, a row each list, without a KL."""
    old = padded([[-1.0] * len(row) for row in ratios])
    rollouts = known(old=old.tolist(), rewards=[0.0] * len(ratios))
    algorithm = card("spo_chain", kl_coef=0.0, **fields)
    credit = algorithm.credit(rollouts, make_values(rollouts))
    credit = dataclasses.replace(credit, advantages=torch.tensor(advantages, dtype=torch.float64))
    logprobs = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    return loss.total.item() / loss.weight.item(), gradient, loss.metrics


def test_the_loss_is_clipped_and_averaged_over_trained_tokens():
    loss, _, _ = loss_with_ratios([[1.3, 0.7]], [[-0.866024, 0.866024]])
    assert loss == pytest.approx(0.259807, abs=1e-6)


def test_a_response_left_far_behind_adds_nothing_and_still_counts():
    # mean ratios 10.5 and 1; the first is left out, and the mean is still over four tokens
    loss, gradient, metrics = loss_with_ratios([[20.0, 1.0], [1.0, 1.0]], [[-1.0, -1.0]] * 2)
    assert loss == pytest.approx((0 + 0 + 1 + 1) / 4)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).all()
    assert metrics["actor/skipped_responses"].value == 1
    loss, _, metrics = loss_with_ratios(
        [[20.0, 1.0], [1.0, 1.0]], [[-1.0, -1.0]] * 2, skip_ratio_above=None
    )
    assert loss == pytest.approx((20 + 1 + 1 + 1) / 4)
    assert "actor/skipped_responses" not in metrics


def test_log_ratios_are_clamped():
    ratios = [[math.exp(11.0)] + [1.0] * 9]
    for clamp, expected in ((10.0, math.exp(10.0)), (12.0, math.exp(11.0))):
        loss, gradient, _ = loss_with_ratios(
            ratios, [[-1.0] * 10], log_ratio_clamp=clamp, skip_ratio_above=None
        )
        assert loss == pytest.approx((expected + 9) / 10)
        assert (gradient[0, 0] == 0) == (clamp == 10.0)


def test_the_kl_is_summed_over_trained_tokens_and_averaged_over_responses(rollouts):
    values, logprobs = make_values(rollouts), moved(rollouts)
    for aggregation in ("token_mean", "sequence_mean_token_sum"):
        with_kl, without = (
            card("spo_chain", kl_coef=coef, aggregation=aggregation, train_below=0.15)
            for coef in (0.5, 0.0)
        )
        credit = with_kl.credit(rollouts, values)
        assert credit.policy_mask.any(dim=1).sum() < 11  # in some rows nothing was in doubt
        loss = with_kl.policy_loss(logprobs, rollouts, credit)
        plain = without.policy_loss(logprobs, rollouts, without.credit(rollouts, values))
        k3 = kl_estimate(logprobs, rollouts.ref_logprobs, "k3").where(credit.policy_mask, 0.0)
        expected = k3.sum() / 11  # one of twelve rows is empty
        assert torch.allclose((loss.total - plain.total) / loss.weight, 0.5 * expected)


def test_the_kl_may_be_averaged_like_the_policy_term(rollouts):
    values, logprobs = make_values(rollouts), moved(rollouts)
    fields = {"kl_coef": 0.5, "kl_aggregation": "like_policy"}
    with_kl, without = card("spo_chain", **fields), card("spo_chain", kl_coef=0.0)
    credit = with_kl.credit(rollouts, values)
    assert credit.kl_scale is None
    loss, plain = (a.policy_loss(logprobs, rollouts, credit) for a in (with_kl, without))
    k3 = kl_estimate(logprobs, rollouts.ref_logprobs, "k3")[credit.policy_mask]
    assert torch.allclose((loss.total - plain.total) / loss.weight, 0.5 * k3.mean())


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7]])
def test_parts_of_a_step_add_up_also_where_responses_are_skipped(sizes, rollouts):
    algorithm = card("spo_chain", skip_ratio_above=1.3, kl_coef=0.1)
    credit = algorithm.credit(rollouts, make_values(rollouts))
    logprobs = moved(rollouts, spread=1.0)
    whole = algorithm.policy_loss(logprobs, rollouts, credit)
    (gradient,) = torch.autograd.grad(whole.total, logprobs)
    assert 0 < whole.metrics["actor/skipped_responses"].value < 12
    total = 0.0
    for index in torch.arange(12).split(sizes):
        part = rollouts.rows(index)
        width = part.action_mask.shape[1]
        piece = credit.rows(index, width)
        total = total + algorithm.policy_loss(logprobs[index, :width], part, piece).total
    (of_parts,) = torch.autograd.grad(total, logprobs)
    assert torch.allclose(of_parts, gradient)


def test_rows_are_whitened_a_chunk_at_a_time(rollouts):
    values = make_values(rollouts)

    def advantages(**fields):
        return card("spo_chain", **fields).credit(rollouts, values).advantages

    raw = advantages(whiten="none")
    mask = card("spo_chain").doubtful(rollouts)
    chunks = [whiten(raw[a : a + 5], mask[a : a + 5]) for a in (0, 5, 10)]
    assert torch.allclose(advantages(whiten="rows", whiten_rows=5), torch.cat(chunks))
    assert torch.allclose(advantages(whiten="rows", whiten_rows=12), advantages())


def test_chunks_are_pooled_over_ranks_that_have_different_numbers_of_rows(rollouts):
    algorithm = card("spo_chain", whiten="rows", whiten_rows=2)
    values, shares = make_values(rollouts), [torch.arange(0, 8), torch.arange(8, 12)]
    meeting, offered, found = threading.Barrier(2), [None, None], [None, None]

    def rank(r):
        def sum_across(x):
            offered[r] = x
            meeting.wait(timeout=10)
            total = offered[0] + offered[1]  # fails unless the shapes are equal
            meeting.wait(timeout=10)
            return total

        part = rollouts.rows(shares[r])
        width = part.action_mask.shape[1]
        given = Values(
            at=values.at[shares[r], :width],
            starts=values.starts[shares[r], :width],
            bootstrap=values.bootstrap[shares[r]],
        )
        found[r] = algorithm.credit(part, given, sum_across=sum_across).advantages

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    raw = card("spo_chain", whiten="none").credit(rollouts, values).advantages
    mask = algorithm.doubtful(rollouts)
    for own, others in (([0, 1], [8, 9]), ([2, 3], [10, 11]), ([4, 5], []), ([6, 7], [])):
        pooled = whiten(raw[own + others], mask[own + others])
        for place, row in enumerate(own + others):
            advantages = found[0][row] if row < 8 else found[1][row - 8]
            assert torch.allclose(advantages, pooled[place, : len(advantages)])


def test_segments_add_up_to_the_outcome_minus_the_first_value(rollouts):
    algorithm = card("spo_chain", first_segment="value", cut_interval=2, cut_below=0.5, **UNTOUCHED)
    values = dataclasses.replace(make_values(rollouts), starts=algorithm.segments(rollouts))
    advantages = algorithm.credit(rollouts, values).advantages
    total = (advantages * values.starts).sum(dim=1)
    first = values.starts & (values.starts.cumsum(dim=1) == 1)
    expected = rollouts.rewards.sum(dim=1) - (values.at * first).sum(dim=1)
    assert torch.allclose(total, expected)


def test_with_cuts_everywhere_and_all_tokens_trained_it_is_ppo_with_lambda_0(rollouts):
    values, logprobs = make_values(rollouts), moved(rollouts)
    chain = card(
        "spo_chain", segmenter="every_token", train_below=None, kl_coef=0.0, skip_ratio_above=None
    )
    ppo = card("ppo", lam=0.0)
    assert torch.equal(chain.segments(rollouts), ppo.segments(rollouts))
    ours, theirs = (a.credit(rollouts, values) for a in (chain, ppo))
    assert torch.allclose(ours.advantages, theirs.advantages)
    losses = [a.policy_loss(logprobs, rollouts, c) for a, c in ((chain, ours), (ppo, theirs))]
    assert torch.allclose(losses[0].total, losses[1].total)
    assert ours.critic_targets is None


def test_groups_compare_what_a_chain_does_not():
    # For contrast: outcomes 1, 1, 0, 1 of siblings, in deviations of the group, and leave-one-out.
    # The authors' baseline divides by the deviation of the population, which gives .57735 and
    # -1.73205; our GRPO by that of a sample, sqrt(4/3) as large.
    rollouts = make_rollouts(rewards=[1, 1, 0, 1], lengths=[1] * 4, group=[0] * 4)
    expected = {
        "grpo": [x * (3 / 4) ** 0.5 for x in (0.57735, 0.57735, -1.73205, 0.57735)],
        "rloo": [1 / 3, 1 / 3, -1, 1 / 3],
    }
    for name, advantages in expected.items():
        found = card(name).credit(rollouts, None).advantages[:, 0]
        assert found.tolist() == pytest.approx(advantages, abs=1e-5)


def test_only_own_tokens_of_a_row_are_trained_and_paused_rows_are_not_cut():
    rollouts = ragged()
    changed = list(rollouts.trajectories)
    changed[1] = dataclasses.replace(changed[1], fresh_from=5)  # truncated
    changed[4] = dataclasses.replace(changed[4], fresh_from=3, finish=Finish.PAUSED)
    rollouts = dataclasses.replace(rollouts, trajectories=tuple(changed))
    for name in ("spo_chain", "ppo"):
        mask = card(name, mask_truncated=True).policy_mask(rollouts)
        assert not mask[1].any()
        assert mask[4].tolist() == [False] * 3 + [True] * 5
        mask = card(name).policy_mask(rollouts)
        assert mask[1].tolist() == [False] * 5 + [True] * 3


def test_a_kl_in_the_reward_is_paid_by_the_segment_it_is_in(rollouts):
    fields = {"segmenter": "response_start", "train_below": None, "whiten": "none"}
    paying = card("spo_chain", kl_coef=0.3, kl_placement="reward", kl_estimator="k1", **fields)
    free = card("spo_chain", kl_coef=0.0, **fields)
    values = dataclasses.replace(make_values(rollouts), starts=free.segments(rollouts))
    gap = [a.credit(rollouts, values).advantages for a in (free, paying)]
    mask = rollouts.action_mask
    k1 = (rollouts.old_logprobs - rollouts.ref_logprobs).where(mask, 0.0).sum(dim=1, keepdim=True)
    assert torch.allclose((gap[0] - gap[1])[mask], (0.3 * k1).expand_as(mask)[mask])


def test_it_needs_values(rollouts):
    with pytest.raises(ValueError, match=r"critic: \{name: monte_carlo\}"):
        card("spo_chain").credit(rollouts, None)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"train_below": 0.0}, "train_below of SPOChain must be None, or in"),
        ({"whiten_rows": 0, "whiten": "rows"}, "whiten_rows of SPOChain must be at least 1"),
        ({"whiten_rows": 4}, "whiten_rows of SPOChain .* no effect; set whiten to rows"),
        ({"log_ratio_clamp": 0.0}, "log_ratio_clamp of SPOChain must be above 0"),
        ({"skip_ratio_above": 1.0}, "skip_ratio_above of SPOChain must be None, or above 1"),
        (
            {"kl_coef": 0.0, "kl_aggregation": "like_policy"},
            "kl_aggregation of SPOChain .* no effect; set kl_coef above 0",
        ),
        (
            {"aggregation": "sequence_mean_token_mean"},
            "kl_aggregation of SPOChain must be like_policy while aggregation is sequence_mean",
        ),
        ({"lam": 1.5}, "lam of SPOChain must be in"),
        ({"gamma": -0.1}, "gamma of SPOChain must be in"),
        (
            {"segmenter": "every_n", "first_segment": "value"},
            "first_segment of SPOChain .* no effect; set segmenter to low_probability",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields, says):
    with pytest.raises(ValueError, match=says):
        card("spo_chain", **fields)
