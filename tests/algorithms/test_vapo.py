"""VAPO: PPO, with a λ that grows with the response and likelihood on right answers."""

import dataclasses
import threading

import pytest
import torch

from llmac.core.masking import aggregation_weight
from llmac.core.types import Values

from .making import card, known, make_values, moved, with_rewards

AS_PPO = {"group_size": 1, "lam_rule": "fixed", "critic_lam": None, "clip_high": 0.2}


def loss_of(algorithm, rollouts, logprobs):
    credit = algorithm.credit(rollouts, make_values(rollouts))
    return algorithm.policy_loss(logprobs, rollouts, credit)


def test_with_its_additions_off_vapo_is_ppo(rollouts):
    logprobs = moved(rollouts)
    vapo = loss_of(card("vapo", likelihood_coef=0.0, **AS_PPO), rollouts, logprobs)
    ppo = loss_of(card("ppo"), rollouts, logprobs)
    assert torch.equal(vapo.total, ppo.total)
    assert torch.equal(vapo.weight, ppo.weight)


def test_three_right_tokens_add_a_tenth_of_their_mean_nll():
    # NLL (.5 + 1 + .2) / 3 = .566667, times μ = .1
    rollouts = known(old=[[-0.5, -1.0, -0.2], [-0.7, -0.3]], rewards=[1.0, 0.0])
    with_term, without = (
        loss_of(card("vapo", likelihood_coef=mu), rollouts, rollouts.old_logprobs)
        for mu in (0.1, 0.0)
    )
    added = (with_term.total - without.total) / with_term.weight
    assert added.item() == pytest.approx(0.0566667, abs=1e-6)


def test_the_term_is_its_coefficient_times_the_mean_nll_of_right_tokens(rollouts):
    logprobs = moved(rollouts)
    right = rollouts.action_mask & (rollouts.rewards.sum(-1) > 0.5)[:, None]
    expected = 0.3 * -logprobs.detach()[right].mean()
    with_term, without = (
        loss_of(card("vapo", likelihood_coef=mu), rollouts, logprobs) for mu in (0.3, 0.0)
    )
    added = (with_term.total - without.total) / with_term.weight
    assert torch.allclose(added.detach(), expected)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # every nll is 1: μ times the mean over the right row's tokens, or its sum, or its sum / H
        ("token_mean", 0.1),
        ("sequence_mean_token_mean", 0.1),
        ("sequence_mean_token_sum", 0.1 * 2),
        ("sequence_mean_token_sum_norm", 0.1 * 2 / 8),
    ],
)
def test_the_coefficient_is_the_weight_of_the_mean_that_the_aggregation_takes(
    aggregation, expected
):
    rollouts = known(old=[[-1.0] * 2, [-1.0] * 8, [-1.0] * 8], rewards=[1.0, 0.0, 0.0])
    assert rollouts.length_limit == 8
    with_term, without = (
        loss_of(
            card("vapo", aggregation=aggregation, likelihood_coef=mu),
            rollouts,
            rollouts.old_logprobs,
        )
        for mu in (0.1, 0.0)
    )
    added = (with_term.total - without.total) / with_term.weight
    assert added.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [3, 3, 6]])
def test_no_split_into_micro_batches_changes_the_gradient(sizes, rollouts):
    algorithm = card("vapo", likelihood_coef=0.5)
    credit = algorithm.credit(rollouts, make_values(rollouts))
    logprobs = moved(rollouts)
    weight = algorithm.loss_weight(rollouts, credit)
    whole = algorithm.policy_loss(logprobs, rollouts, credit).total / weight
    (expected,) = torch.autograd.grad(whole, logprobs)
    total = torch.zeros((), dtype=torch.float64)
    for index in torch.arange(12).split(sizes):
        part = rollouts.rows(index)
        width = part.action_mask.shape[1]
        piece = algorithm.policy_loss(logprobs[index, :width], part, credit.rows(index, width))
        total = total + piece.total / weight
    (found,) = torch.autograd.grad(total, logprobs)
    assert torch.allclose(found, expected)


def test_two_ranks_weigh_right_tokens_as_one_process_does(rollouts):
    algorithm = card("vapo")
    values = make_values(rollouts)
    alone = algorithm.credit(rollouts, values).likelihood
    shares = [torch.arange(0, 8), torch.arange(8, 12)]
    meeting, offered, found = threading.Barrier(2), [None, None], [None, None]

    def rank(r):
        def sum_across(x):
            offered[r] = x
            meeting.wait(timeout=10)
            total = offered[0] + offered[1]
            meeting.wait(timeout=10)
            return total

        part = rollouts.rows(shares[r])
        width = part.action_mask.shape[1]
        here = Values(
            at=values.at[shares[r], :width],
            starts=values.starts[shares[r], :width],
            bootstrap=values.bootstrap[shares[r]],
        )
        found[r] = algorithm.credit(part, here, sum_across=sum_across).likelihood

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    for share, likelihood in zip(shares, found, strict=True):
        assert torch.allclose(likelihood, alone[share, : likelihood.shape[1]])
    assert alone.max() > 0


def test_only_right_responses_are_imitated_and_only_where_the_policy_learns(rollouts):
    half = card("vapo").credit(rollouts, make_values(rollouts)).likelihood
    outcomes = rollouts.rewards.sum(-1)
    assert ((half > 0) == (rollouts.action_mask & (outcomes > 0.5)[:, None])).all()
    lower = card("vapo", correct_above=0.2).credit(rollouts, make_values(rollouts)).likelihood
    assert ((lower > 0) == (rollouts.action_mask & (outcomes > 0.2)[:, None])).all()
    # Row 4 was cut, with a reward of .5: masked, it is neither imitated nor counted.
    algorithm = card("vapo", correct_above=0.2, mask_truncated=True)
    masked = algorithm.credit(rollouts, make_values(rollouts))
    assert (masked.likelihood[rollouts.truncated] == 0).all()
    right = masked.policy_mask & (outcomes > 0.2)[:, None]
    weight = 0.1 * masked.policy_mask.sum() / right.sum()
    assert torch.allclose(masked.likelihood[right], weight.double())


def test_right_is_judged_by_the_rewards_before_the_kl(rollouts):
    values = make_values(rollouts)
    plain = card("vapo").credit(rollouts, values).likelihood
    assert torch.equal(card("vapo", kl_coef=5.0).credit(rollouts, values).likelihood, plain)


def test_a_step_without_a_right_response_has_no_term(rollouts):
    wrong = with_rewards(rollouts, [0.0] * 12)
    credit = card("vapo").credit(wrong, make_values(wrong))
    assert (credit.likelihood == 0).all()
    assert credit.metrics["actor/correct_nll"].value == 0


def test_the_nll_of_right_tokens_is_watched(rollouts):
    credit = card("vapo").credit(rollouts, make_values(rollouts))
    right = credit.likelihood > 0
    expected = -rollouts.old_logprobs[right].mean().item()
    assert credit.metrics["actor/correct_nll"].value == pytest.approx(expected)


def test_the_term_is_neither_clipped_nor_corrected(rollouts):
    far = (rollouts.old_logprobs + 2.0).requires_grad_()  # every ratio is beyond every clip
    algorithm = card("vapo", mismatch="token_truncate", mismatch_high=1.01)
    credit = algorithm.credit(rollouts, make_values(rollouts))
    alone = dataclasses.replace(credit, advantages=torch.zeros_like(credit.advantages))
    loss = algorithm.policy_loss(far, rollouts, alone)
    (gradient,) = torch.autograd.grad(loss.total, far)
    right = credit.likelihood > 0
    tokens = aggregation_weight(credit.policy_mask, "token_mean")
    assert torch.allclose(gradient, torch.where(right, -0.1 * tokens / right.sum(), 0.0).double())


def test_the_policys_lambda_grows_with_the_response_and_the_critics_is_one():
    rollouts = known(old=[[-1.0] * 3, [-1.0] * 2], rewards=[1.0, 1.0])
    at = torch.tensor([[0.2, 0.5, 0.8], [0.2, 0.5, 0.0]], dtype=torch.float64)
    values = Values(at=at, starts=rollouts.action_mask, bootstrap=torch.zeros(2).double())
    credit = card("vapo", lam_alpha=0.5, whiten_advantages=False).credit(rollouts, values)
    # l = 3: λ = 1 - 1/1.5 = 1/3: .2; .3 + .2/3; .3 + .366667/3.  l = 2: λ = 0: .5; .3
    expected = [[0.4222222, 0.3666667, 0.2], [0.3, 0.5, 0.0]]
    assert torch.allclose(credit.advantages, torch.tensor(expected, dtype=torch.float64))
    returns = credit.critic_targets.returns
    assert torch.allclose(returns, rollouts.action_mask.double())
