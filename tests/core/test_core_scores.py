"""Scores out of text, what they earn, and what they are compared with, against numbers worked out by hand."""

import pytest
import torch

from llmac.core.scores import (
    above_baseline,
    brier_reward,
    fraction_of,
    parse_score,
    smoothed,
    value_of_score,
)

TEN = (0, 10)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("It looks good.\n<answer>7</answer>", 7),
        ("<answer> 12 </answer>", 10),
        ("<answer>-3</answer>", 0),
        ("<answer>+4\n</answer> and <answer>5</answer>", 4),
        ("<answer>seven</answer> no: <answer>6</answer>", 6),
        ("<answer>" + "9" * 5000 + "</answer>", 10),
        ("no", None),
        ("7", None),
        ("<answer>7", None),
        ("<answer></answer>", None),
        ("<answer>7.5</answer>", None),
        ("<answer>7/10</answer>", None),
        ("<answer>٧</answer>", None),
        ("<score>7</score>", None),
    ],
)
def test_a_score_is_a_whole_number_alone_between_its_tags(text, score):
    assert parse_score(text, scale=TEN) == score


def test_tags_are_taken_literally_and_the_scale_may_be_another():
    assert parse_score("<a.b>7</a.b>", scale=(1, 5), tag="a.b") == 5
    assert parse_score("<axb>7</axb>", scale=(1, 5), tag="a.b") is None
    assert parse_score("<v>-7</v>", scale=(-5, 5), tag="v") == -5


def test_the_scale_becomes_the_range_of_rewards():
    assert [value_of_score(n, scale=(2, 6), reward_range=(-1.0, 3.0)) for n in (2, 3, 6)] == [
        *(-1.0, 0.0, 3.0)
    ]
    assert [fraction_of(z, (-1.0, 3.0)) for z in (-2.0, -1.0, 0.0, 3.0, 4.0)] == [0, 0, 0.25, 1, 1]


@pytest.mark.parametrize(
    ("value", "outcome", "reward"),
    [(0.7, 1, 0.91), (0.7, 0, 0.51), (0.5, 1, 0.75), (0.3, 0, 0.91), (None, 1, 0.0)],
)
def test_reward_is_one_minus_the_squared_distance(value, outcome, reward):
    assert brier_reward(value, [float(outcome)]) == pytest.approx(reward)


def expected_reward(value, chance):
    return chance * brier_reward(value, [1.0]) + (1 - chance) * brier_reward(value, [0.0])


def test_the_reward_is_largest_at_the_chance_of_success():
    found = [expected_reward(v, 0.3) for v in (0.0, 0.2, 0.3, 0.4, 0.5)]
    assert found == pytest.approx([0.70, 0.78, 0.79, 0.78, 0.75])
    assert expected_reward(0.3, 0.37) == pytest.approx(0.762)
    assert max(range(11), key=lambda n: expected_reward(n / 10, 0.37)) == 4


def test_a_state_with_several_outcomes_earns_the_mean_over_them():
    assert brier_reward(0.7, [1.0, 0.0, 0.0]) == pytest.approx((0.91 + 2 * 0.51) / 3)


def weights(rewards, group, outcomes, baseline):
    numbers = torch.tensor(rewards), torch.tensor(group), torch.tensor(outcomes)
    return above_baseline(*numbers, baseline).tolist()


def test_the_others_of_a_group_are_the_baseline():
    rewards = [0.91, 0.75, 0.51, 0.0]
    found = weights(rewards, [7] * 4, [1.0, 1.0, 0.0, 0.0], "leave_one_out")
    assert found == pytest.approx([0.49, 0.276667, -0.043333, -0.723333], abs=1e-6)
    two = weights([0.9, 0.5, 0.4], [0, 1, 0], [1.0] * 3, "leave_one_out")
    assert two == pytest.approx([0.5, 0.0, -0.5])  # a lone one teaches nothing
    assert weights(rewards, [7] * 4, [1.0] * 4, "none") == pytest.approx(rewards)


def test_by_outcome_only_scores_with_the_same_luck_are_compared():
    rewards, outcomes = [0.99, 0.75, 0.84, 0.96], [1.0, 1.0, 0.0, 0.5]
    found = weights(rewards, [3] * 4, outcomes, "by_outcome")
    assert found == pytest.approx([0.24, -0.24, -0.12, 0.12])
    # Groups stay apart: 2 · 0 + 1 and 2 · 1 + 0 are different.
    apart = weights(rewards, [0, 1, 0, 1], [1.0, 0.0, 1.0, 0.0], "by_outcome")
    assert apart == pytest.approx([0.15, -0.21, -0.15, 0.21])


def test_a_rate_is_smoothed_from_the_first_number_on():
    rate, told = None, []
    for batch in (0.25, 0.35, 0.50):
        rate = smoothed(rate, batch, rate=0.9)
        told.append(f"{100 * rate:.1f}%")
    assert told == ["25.0%", "26.0%", "28.4%"]
