"""Estimators against a world whose values, advantages and policy gradient are known exactly."""

import itertools

import pytest
import torch

from llmac.core.baselines import group_relative, leave_one_out
from llmac.core.losses import clipped_surrogate, log_ratio, reinforce
from llmac.core.returns import reward_to_go, segment_gae
from llmac.core.segments import every_n, every_token, low_probability, response_start

close = {"rtol": 0.0, "atol": 1e-12}


def enough_twos(tokens):
    """Success iff the finished response holds at least two 2s."""
    return float(len(tokens) == 4 and tokens.count(2) >= 2)


def paid_on_the_way(tokens):
    """Some reward at every token, none of it alike."""
    return 0.1 * tokens[-1] + 0.3 * (tokens[0] == 1) - 0.05 * len(tokens)


@pytest.fixture(params=[enough_twos, paid_on_the_way])
def world(request, exact_world):
    return exact_world(symbols=3, horizon=4, reward=request.param, seed=1)


@pytest.fixture
def stopping_world(exact_world):
    return exact_world(symbols=3, horizon=4, reward=paid_on_the_way, stop=0, seed=2)


def true_gradient(world):
    every = world.responses()
    return world.gradient((every.chance * every.rewards.sum(dim=1)).sum())


def estimated_gradient(world, every, advantages):
    loss = reinforce(every.logprobs, advantages).where(every.mask, 0.0).sum(dim=1)
    return -world.gradient((every.chance.detach() * loss).sum())


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_gae_with_exact_values_averages_to_the_exact_advantage(exact_world, lam, gamma):
    world = exact_world(symbols=3, horizon=4, reward=paid_on_the_way, stop=0, gamma=gamma, seed=3)
    every = world.responses()
    estimate = segment_gae(
        every.rewards, every.values, every.mask, every.bootstrap, gamma=gamma, lam=lam
    )
    torch.testing.assert_close(
        world.expected_by_decision(every, estimate),
        every.advantages.where(every.mask, 0.0),
        **close,
    )


def test_lambda_zero_with_a_wrong_critic_is_biased_and_lambda_one_is_not(stopping_world):
    every = stopping_world.responses()
    wrong = every.values + 0.3 * torch.arange(4, dtype=torch.float64).sin()
    truth = true_gradient(stopping_world)

    def gradient(lam):
        advantages = segment_gae(
            every.rewards, wrong, every.mask, every.bootstrap, gamma=1.0, lam=lam
        )
        return estimated_gradient(stopping_world, every, advantages)

    torch.testing.assert_close(gradient(1.0), truth, **close)
    assert (gradient(0.0) - truth).abs().max() > 0.01


@pytest.mark.parametrize("segmenter", [every_token, response_start, lambda mask: every_n(mask, 2)])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_segments_with_exact_values_give_the_exact_policy_gradient(world, segmenter, lam):
    every = world.responses()
    starts = segmenter(every.mask)
    advantages = segment_gae(
        every.rewards, every.values, starts, every.bootstrap, gamma=1.0, lam=lam
    )
    torch.testing.assert_close(
        estimated_gradient(world, every, advantages), true_gradient(world), **close
    )


def test_finer_segments_have_less_variance(exact_world):
    world = exact_world(symbols=3, horizon=4, reward=enough_twos, seed=1)
    every = world.responses()

    def variance(segmenter):
        advantages = segment_gae(
            every.rewards, every.values, segmenter(every.mask), every.bootstrap, gamma=1.0, lam=0.0
        )
        mean = world.expected_by_decision(every, advantages)
        return (every.chance.detach()[:, None] * (advantages - mean).square()).sum()

    token, pair, response = (
        variance(segmenter)
        for segmenter in (every_token, lambda mask: every_n(mask, 2), response_start)
    )
    assert token < 1e-20
    assert token < pair < response


def test_cutting_before_an_unlikely_token_is_slightly_biased(world):
    # The end of the segment is chosen by looking at the token after it, so V(s) replaces Q(s, a)
    # only for some a. A cut decided by the state alone has no such bias.
    every = world.responses()
    logprobs = every.logprobs.detach()
    starts = low_probability(logprobs, every.mask, threshold=0.3)
    truth = true_gradient(world)

    def error(starts):
        advantages = segment_gae(
            every.rewards, every.values, starts, every.bootstrap, gamma=1.0, lam=0.0
        )
        return (estimated_gradient(world, every, advantages) - truth).abs().max()

    doubtful_state = (every.decision // 3) % 2 == 0
    assert error(starts) > 1e-4
    assert error(every.mask & (doubtful_state | response_start(every.mask))) < 1e-12


def test_a_truncated_response_bootstrapped_with_the_exact_value_stays_unbiased(world):
    every = world.responses()
    cut = 2
    bootstrap = torch.tensor(
        [world.value(tokens[:cut]) for tokens in every.tokens], dtype=torch.float64
    )
    estimate = torch.zeros_like(every.rewards)
    estimate[:, :cut] = segment_gae(
        every.rewards[:, :cut],
        every.values[:, :cut],
        every.mask[:, :cut],
        bootstrap,
        gamma=1.0,
        lam=0.9,
    )
    mean = world.expected_by_decision(every, estimate)
    torch.testing.assert_close(mean[:, :cut], every.advantages[:, :cut], **close)

    terminal = segment_gae(
        every.rewards[:, :cut],
        every.values[:, :cut],
        every.mask[:, :cut],
        torch.zeros_like(bootstrap),
        gamma=1.0,
        lam=0.9,
    )
    assert (terminal - estimate[:, :cut]).abs().max() > 0.05


def test_reward_to_go_gives_the_exact_policy_gradient(stopping_world):
    every = stopping_world.responses()
    torch.testing.assert_close(
        estimated_gradient(stopping_world, every, reward_to_go(every.rewards)),
        true_gradient(stopping_world),
        **close,
    )


def pairs_gradient(world, advantage):
    """Expectation over all pairs of siblings of the gradient their mean loss has."""
    every = world.responses()
    outcome, chance = every.rewards.sum(dim=1), every.chance.detach()
    score = every.logprobs.sum(dim=1)
    total = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.product(range(len(outcome)), repeat=2):
        both = torch.stack([outcome[i], outcome[j]])
        credit = advantage(both, torch.zeros(2, dtype=torch.long))
        total = total + chance[i] * chance[j] * (credit * torch.stack([score[i], score[j]])).mean()
    return world.gradient(total)


@pytest.fixture
def pair_world(exact_world):
    return exact_world(symbols=3, horizon=2, reward=paid_on_the_way, seed=4)


def test_leave_one_out_gives_the_exact_policy_gradient(pair_world):
    torch.testing.assert_close(
        pairs_gradient(pair_world, leave_one_out), true_gradient(pair_world), **close
    )


def test_the_group_mean_shrinks_the_policy_gradient_by_one_part_in_g(pair_world):
    shrunk = pairs_gradient(pair_world, lambda r, g: group_relative(r, g, scale="none"))
    torch.testing.assert_close(shrunk, true_gradient(pair_world) / 2, **close)


def test_on_policy_the_clipped_surrogate_has_the_exact_policy_gradient(world):
    every = world.responses()
    loss, clipped = clipped_surrogate(
        log_ratio(every.logprobs, every.logprobs.detach()),
        every.advantages,
        clip_low=0.2,
        clip_high=0.2,
    )
    estimate = -world.gradient(
        (every.chance.detach() * loss.where(every.mask, 0.0).sum(dim=1)).sum()
    )
    assert not clipped.any()
    torch.testing.assert_close(estimate, true_gradient(world), **close)
