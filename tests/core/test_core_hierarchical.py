"""Credit on two time scales."""

import pytest
import torch

from llmac.core.hierarchical import action_advantages, subgoal_advantages, switch_advantages
from llmac.core.returns import segment_gae

REWARDS = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
LOW = torch.tensor([[0.3, 0.5, 0.55, 0.7, 0.8]], dtype=torch.float64)
HIGH = torch.tensor([[0.4, 9.0, 0.6, 9.0, 9.0]], dtype=torch.float64)
STARTS = torch.tensor([[True, False, True, False, False]])
RATES = {"gamma": 0.9, "lam": 0.95}
close = {"rtol": 0.0, "atol": 1e-6}


def doubles(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_actions_are_judged_by_where_their_subgoal_led():
    # δ_1 = .9·.6 - .5 = .04; A_0 = .9·.5 - .3 + .855·.04; A_4 = .2; A_3 = .9·.8 - .7 + .855·.2; ...
    advantages = action_advantages(REWARDS, LOW, HIGH, STARTS, **RATES)
    torch.testing.assert_close(advantages, doubles([[0.1842, 0.04, 0.243305, 0.191, 0.2]]), **close)


def test_subgoals_are_judged_by_the_whole_of_their_segment():
    # δ_1 = .81 - .6 = .21; A_0 = .81·.6 - .4 + .81·.95·.21 = .247595
    advantages = subgoal_advantages(REWARDS, HIGH, STARTS, **RATES)
    expected = doubles([[0.247595, 0.247595, 0.21, 0.21, 0.21]])
    torch.testing.assert_close(advantages, expected, **close)


@pytest.mark.parametrize(("switched", "expected"), [(True, 0.045), (False, -0.105)])
def test_the_choice_to_switch_is_judged_against_going_on(switched, expected):
    found = switch_advantages(
        torch.tensor([[switched]]), doubles([[0.7]]), doubles([[0.6]]), doubles([[0.45]])
    )
    assert found.item() == pytest.approx(expected)


@pytest.fixture
def rows():
    random = torch.Generator().manual_seed(0)
    rewards, low, high = torch.randn(3, 4, 7, generator=random, dtype=torch.float64)
    return rewards, low, high


def test_one_subgoal_a_response_leaves_the_actions_plain_gae(rows):
    rewards, low, high = rows
    starts = torch.zeros(4, 7, dtype=torch.bool)
    starts[:, 0] = True
    every = torch.ones_like(starts)
    ended = torch.zeros(4, dtype=torch.float64)
    plain = segment_gae(rewards, low, every, ended, **RATES)
    torch.testing.assert_close(action_advantages(rewards, low, high, starts, **RATES), plain)


def test_a_new_subgoal_at_every_step_makes_the_subgoals_plain_gae(rows):
    rewards, _, high = rows
    every = torch.ones(4, 7, dtype=torch.bool)
    ended = torch.zeros(4, dtype=torch.float64)
    plain = segment_gae(rewards, high, every, ended, **RATES)
    torch.testing.assert_close(subgoal_advantages(rewards, high, every, **RATES), plain)


def test_with_lambda_one_subgoals_have_the_discounted_return_minus_the_value(rows):
    rewards, _, high = rows
    starts = torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    starts[:, 0] = True
    found = subgoal_advantages(rewards, high, starts, gamma=0.9, lam=1.0)
    for row, t in starts.nonzero().tolist():
        returned = sum(0.9 ** (u - t) * rewards[row, u].item() for u in range(t, 7))
        assert found[row, t].item() == pytest.approx(returned - high[row, t].item())


def test_what_is_no_step_neither_counts_nor_discounts(rows):
    rewards, low, high = rows
    starts = torch.tensor([[True, False, False, True, False, True, False]]).expand(4, 7)
    plain = (
        action_advantages(rewards, low, high, starts, **RATES),
        subgoal_advantages(rewards, high, starts, **RATES),
    )
    widen = {
        x: torch.cat([x, torch.full((4, 2), end).to(x)], dim=1)
        for x, end in ((low, 7.0), (high, 9.0))
    }
    mask = torch.arange(9).expand(4, 9) < 7
    wide_starts = torch.cat([starts, torch.ones(4, 2, dtype=torch.bool)], dim=1)
    wide_rewards = torch.cat([rewards, torch.zeros(4, 2, dtype=torch.float64)], dim=1)
    padded = (
        action_advantages(
            wide_rewards, widen[low], widen[high], wide_starts, step_mask=mask, **RATES
        ),
        subgoal_advantages(wide_rewards, widen[high], wide_starts, step_mask=mask, **RATES),
    )
    for found, expected in zip(padded, plain, strict=True):
        torch.testing.assert_close(found[:, :7], expected)
        assert (found[:, 7:] == 0).all()


def test_the_two_choices_average_to_nothing():
    chance, high, kept = doubles([[0.3]]), doubles([[0.9]]), doubles([[0.2]])
    on, off = (
        switch_advantages(torch.tensor([[q]]), chance, high, kept).item() for q in (True, False)
    )
    assert 0.3 * on + 0.7 * off == pytest.approx(0.0)


@pytest.mark.parametrize("credit", [action_advantages, subgoal_advantages])
def test_a_response_that_begins_without_a_subgoal_is_refused(credit):
    starts = torch.tensor([[False, True, False, False, False]])
    values = (LOW, HIGH) if credit is action_advantages else (HIGH,)
    with pytest.raises(ValueError, match="row 0 begins without one"):
        credit(REWARDS, *values, starts, **RATES)
