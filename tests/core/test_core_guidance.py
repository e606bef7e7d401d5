"""Guidance by values: closed forms, limits, and laws of votes and beams."""

import math

import pytest
import torch

from llmac.core.guidance import (
    best_of_n_kl,
    blockwise_kl,
    kept_beams,
    partition,
    pick,
    reweighted,
    shifted_logits,
    value_ratio,
    value_tilt,
    vote,
)
from llmac.core.returns import segment_gae

P = torch.tensor([[0.5, 0.3, 0.2]])
ALL = torch.tensor([[0, 1, 2]])


def assert_close(found, expected):
    torch.testing.assert_close(found, torch.tensor([expected]), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (1.0, [0.29633, 0.48330, 0.22037]),
        (2.0, [0.14671, 0.65045, 0.20284]),
        (0.0, [0.5, 0.3, 0.2]),
    ],
)
@pytest.mark.parametrize("others", ["zero", "keep"])
def test_ratio_of_success_reweights_the_candidates(lam, expected, others):
    weights = value_ratio(torch.zeros(1), torch.tensor([[-1.0, 1.0, 0.0]]), lam=lam)
    assert_close(reweighted(P, ALL, weights, others=others), expected)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [(1.0, [0.37029, 0.33144, 0.29827]), (5.0, [0.05353, 0.23734, 0.70912])],
)
def test_exponential_of_values_reweights_the_candidates(lam, expected):
    values = torch.tensor([[0.2, 0.6, 0.9]])
    assert_close(found := reweighted(P, ALL, value_tilt(values, lam=lam)), expected)
    if lam == 1:
        assert float((found * values).sum()) == pytest.approx(0.54136, abs=1e-5)


def test_tokens_that_nobody_valued_get_nothing_or_stay_as_they_were():
    two, after = torch.tensor([[2, 1]]), torch.tensor([[0.8, 0.4]])
    weights = value_ratio(torch.tensor([0.4]), after, scale="probability")
    # 0.2 x 0.8/0.4 = 0.4, 0.3 x 1 = 0.3
    assert_close(reweighted(P, two, weights), [0.0, 0.3 / 0.7, 0.4 / 0.7])
    assert_close(reweighted(P, two, weights, others="keep"), [0.5 / 1.2, 0.3 / 1.2, 0.4 / 1.2])


def test_exact_probabilities_of_success_give_the_policy_given_success():
    success = torch.tensor([[0.2, 0.6, 0.9]])
    before = (P * success).sum(dim=1)  # 0.46
    weights = value_ratio(before, success, scale="probability")
    assert_close(reweighted(P, ALL, weights), [0.10 / 0.46, 0.18 / 0.46, 0.18 / 0.46])
    assert float((P * weights.exp()).sum()) == pytest.approx(1.0)  # Bayes needs no normalising


def test_values_that_are_no_probabilities_are_refused_as_such():
    with pytest.raises(ValueError, match=r"1\.2.*\[0, 1\]"):
        value_ratio(torch.ones(1), torch.tensor([[1.2]]), scale="probability")
    # One that rounds to 0 is none of these.
    sure = value_ratio(torch.zeros(1), torch.tensor([[0.0, 0.5]]), scale="probability")
    assert sure.isfinite().all()


def test_a_token_without_probability_stays_without():
    probs = torch.tensor([[0.6, 0.4, 0.0]])
    for others in ("zero", "keep"):
        found = reweighted(probs, ALL, torch.tensor([[0.0, 0.0, 9.0]]), others=others)
        assert_close(found, [0.6, 0.4, 0.0])


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (0.0, [0.66524, 0.24473, 0.09003]),
        (0.5, [0.57410, 0.34821, 0.07770]),
        (1.0, [0.46831, 0.46831, 0.06338]),
    ],
)
def test_difference_of_small_models_shifts_the_large_one(lam, expected):
    base, tuned, reference = (torch.tensor([x]) for x in ([2.0, 1, 0], [1.0, 2, 0], [1.0, 1, 0]))
    assert_close(shifted_logits(base, [(tuned, reference)], lam=lam).softmax(dim=1), expected)
    # A constant of a row cancels, and two pairs add up.
    twice = shifted_logits(base, [(tuned + 3, reference - 1)] * 2, lam=lam / 2)
    assert_close(twice.softmax(dim=1), expected)


def test_vocabularies_of_other_widths_meet_in_the_narrowest():
    base = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    tuned, reference = torch.tensor([[1.0, 0.0, 5.0]]), torch.tensor([[0.0, 0.0, 0.0, 7.0, 7.0]])
    found = shifted_logits(base, [(tuned, reference)])
    assert found.tolist() == [[2.0, 2.0, 8.0, -math.inf]]
    narrow = shifted_logits(base[:, :2], [(tuned, reference)])
    assert narrow.tolist() == [[2.0, 2.0]]


def test_a_model_shifted_from_itself_becomes_the_tuned_one():
    base, tuned = torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(shifted_logits(base, [(tuned, base)]), tuned)


def test_the_best_finished_response_is_picked_and_a_cut_one_only_if_all_are():
    values = torch.tensor([0.1, 0.9, 0.7, 0.7])
    assert pick(values, torch.tensor([True, False, True, True])) == 2
    assert pick(values, torch.tensor([False] * 4)) == 1
    assert pick(-values, torch.tensor([True, False, True, True])) == 0


def test_answers_are_grouped_the_same_in_any_order():
    def near(a, b):
        return abs(a - b) < 0.5

    numbers = [3.0, 1.0, 2.2, 1.4, 1.8, 9.0]  # 1 ~ 1.4 ~ 1.8 ~ 2.2, and neither 3 nor 9
    assert partition(numbers, near) == [0, 1, 1, 1, 1, 2]
    assert partition(numbers[::-1], near) == [0, 1, 1, 1, 1, 2]
    assert partition([2.2, 1.4, 1.8], near) == [0, 0, 0]  # joined by the last
    assert partition([[1], [1], [2]], list.__eq__) == [0, 0, 1]  # lists have no hash
    assert partition([], near) == []


def test_equal_answers_are_compared_once():
    asked = []

    def same(a, b):
        asked.append((a, b))
        return False

    assert partition(["x", "y", "x", "x", "y"], same) == [0, 1, 0, 0, 1]
    assert asked == [("x", "y")]


def test_values_outvote_the_majority():
    groups = partition([7, 7, 8, 9], int.__eq__)
    assert vote(groups, [0.3, 0.2, 0.6, 0.1]) == groups[2]
    assert vote(groups, [1.0] * 4) == groups[0]


def test_ties_of_a_vote_go_to_the_larger_group_then_to_the_first():
    assert vote([0, 1, 1], [0.5, 0.25, 0.25]) == 1
    assert vote([2, 0], [0.5, 0.5]) == 2


def test_finished_beams_keep_their_places():
    values = [0.9, 0.1, 0.5, 0.7]
    nobody, second = [False] * 4, [False, True, False, False]
    assert kept_beams(values, nobody, width=2) == [0, 3]
    assert kept_beams(values, second, width=2) == [0, 1]
    assert kept_beams(values, second, width=1) == [1]
    assert kept_beams(values, nobody, width=9) == [0, 1, 2, 3]
    assert kept_beams([0.5, 0.5], [False] * 2, width=1) == [0]


def test_bounds_of_the_distance_from_the_policy():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(0.63629, abs=1e-5)
    assert blockwise_kl(4, block_tokens=32, tokens=128) == pytest.approx(2.54518, abs=1e-5)


def test_best_of_n_stays_within_its_bound():
    n, p = 3, torch.tensor([0.5, 0.3, 0.2])  # responses in the order of their values
    below = torch.cat([torch.zeros(1), p.cumsum(0)])
    best = below[1:] ** n - below[:-1] ** n
    distance = float((best * (best / p).log()).sum())
    assert 0 < distance <= best_of_n_kl(n)


def test_the_critic_of_critic_control_learns_from_gae():
    values, rewards = torch.tensor([[0.2, 0.4, 0.1]]), torch.tensor([[0.0, 0.0, 1.0]])
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    found = segment_gae(rewards, values, everywhere, torch.zeros(1), gamma=0.99, lam=0.95)
    assert_close(found, [0.709, 0.54545, 0.9])
    assert float((found**2).sum()) == pytest.approx(1.61019, abs=1e-5)
