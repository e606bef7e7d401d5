"""Imitation of what went better than the critic expected."""

import dataclasses
import math

import pytest
import torch

from llmac.algorithms.imitation import advantage_weights
from llmac.core.masking import aggregate

from .making import card, make_rollouts, make_values, moved, ragged


def surprised():
    """One response of four tokens, worth 1, of which the critic expected .5, 1.5, 0 and 2."""
    rollouts = make_rollouts(rewards=[1], lengths=[4], group=[0])
    at = torch.tensor([[0.5, 1.5, 0.0, 2.0]], dtype=torch.float64)
    return rollouts, dataclasses.replace(make_values(rollouts), at=at)


def gradient_of(algorithm, rollouts, credit, logprobs):
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    return torch.autograd.grad(loss.total / loss.weight, logprobs)[0]


def test_weights_are_exponentials_of_advantages_up_to_a_bound():
    advantages = torch.tensor([[0.5, -0.5, 1.0, 9.0, 1e6]])
    weights = advantage_weights(advantages, beta=0.5, max_weight=20.0)[0].tolist()
    assert weights == pytest.approx([math.e, 1 / math.e, math.e**2, 20.0, 20.0])
    assert weights[:3] == pytest.approx([2.71828, 0.36788, 7.38906], abs=1e-5)


def test_tokens_that_went_better_than_expected_are_imitated_and_no_others():
    rollouts, values = surprised()
    algorithm = card("imitation")
    credit = algorithm.credit(rollouts, values)  # A = 1 - V = .5, -.5, 1, -1
    assert credit.policy_mask.tolist() == [[True, False, True, False]]
    assert credit.metrics["actor/imitation_weight"].value == 0.5
    assert credit.metrics["critic/advantages/mean"].value == 0.0  # of all tokens
    gradient = gradient_of(algorithm, rollouts, credit, moved(rollouts))
    assert gradient.tolist() == [[-0.5, 0.0, -0.5, 0.0]]  # a mean over the two, wherever π is
    higher = card("imitation", threshold=0.7).credit(rollouts, values)
    assert higher.policy_mask.tolist() == [[False, False, True, False]]
    assert card("imitation", threshold=1.0).credit(rollouts, values).policy_mask.sum() == 0


def test_weighted_examples_are_all_tokens():
    rollouts, values = surprised()
    algorithm = card("imitation", weight="exp", beta=0.5, max_weight=5.0)
    credit = algorithm.credit(rollouts, values)
    gradient = gradient_of(algorithm, rollouts, credit, moved(rollouts))
    weights = [math.e, 1 / math.e, 5.0, math.exp(-2)]  # e^2 is above the bound
    assert gradient[0].tolist() == pytest.approx([-w / 4 for w in weights])
    assert credit.metrics["actor/imitation_clipfrac"].value == 0.25
    assert credit.metrics["actor/imitation_weight"].value == pytest.approx(sum(weights) / 4)


def test_the_critic_learns_what_ppos_learns():
    rollouts = ragged()
    values = make_values(rollouts)
    fields = {"lam": 0.9, "critic_lam": 1.0, "mask_truncated": True}
    ours = card("imitation", **fields).credit(rollouts, values)
    ppos = card("ppo", **fields).credit(rollouts, values)
    assert torch.equal(ours.critic_targets.returns, ppos.critic_targets.returns)
    assert torch.equal(ours.critic_targets.value_mask, ppos.critic_targets.value_mask)
    assert (ours.advantages == 0).all()
    assert not (ours.policy_mask & ~ppos.policy_mask).any()


def test_examples_of_an_unlikely_sampler_weigh_what_advantages_would():
    rollouts = ragged()
    values = make_values(rollouts)
    fields = {"mismatch": "token_truncate", "mismatch_high": 1.1}
    plain = card("imitation", weight="exp").credit(rollouts, values)
    algorithm = card("imitation", weight="exp", **fields)
    credit = algorithm.credit(rollouts, values)
    ratio = (rollouts.old_logprobs - rollouts.sampler_logprobs).exp().clamp(max=1.1)
    mask = credit.policy_mask
    assert torch.allclose(credit.likelihood[mask], (plain.likelihood * ratio)[mask])
    # The same weights as advantages: REINFORCE's gradient.
    logprobs = moved(rollouts)
    total, weight = aggregate(-credit.likelihood * logprobs, mask, "token_mean", horizon=1)
    (expected,) = torch.autograd.grad(total / weight, logprobs)
    assert torch.allclose(gradient_of(algorithm, rollouts, credit, logprobs), expected)
