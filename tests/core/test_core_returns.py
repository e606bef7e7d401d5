"""Advantages over segments, returns, and where an outcome reward stands."""

import math

import pytest
import torch

from llmac.core.returns import place_outcome_rewards, reward_to_go, segment_gae

REWARDS = torch.tensor([[0.0, 0.0, 1.0]])
VALUES = torch.tensor([[0.2, 0.5, 0.8]])
EVERY = torch.ones(1, 3, dtype=torch.bool)
ENDED = torch.zeros(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (1.0, [0.8, 0.5, 0.2]),
        (0.95, [0.7655, 0.49, 0.2]),  # .2; .3 + .95·.2; .3 + .95·.49
        (0.5, [0.5, 0.4, 0.2]),
        (0.0, [0.3, 0.3, 0.2]),
    ],
)
def test_a_start_at_every_token_is_textbook_gae(dtype, lam, expected):
    advantages = segment_gae(
        REWARDS.to(dtype), VALUES.to(dtype), EVERY, ENDED.to(dtype), gamma=1.0, lam=lam
    )
    assert advantages.dtype == dtype
    torch.testing.assert_close(advantages, torch.tensor([expected], dtype=dtype))


def test_a_decoupled_critic_target_is_a_second_call():
    # The policy uses λ = .95, the critic's target λ = 1: [1, 1, 1] and not [.9655, .99, 1].
    target = VALUES + segment_gae(REWARDS, VALUES, EVERY, ENDED, gamma=1.0, lam=1.0)
    torch.testing.assert_close(target, torch.ones(1, 3))


def test_a_long_trace_forgets_the_reward():
    values, rewards = torch.full((1, 101), 0.5), torch.zeros(1, 101)
    rewards[0, -1] = 1.0
    starts = torch.ones(1, 101, dtype=torch.bool)
    short = segment_gae(rewards, values, starts, ENDED, gamma=1.0, lam=0.95)
    full = segment_gae(rewards, values, starts, ENDED, gamma=1.0, lam=1.0)
    assert short[0, 0].item() == pytest.approx(0.002960, abs=1e-6)  # .5 · .95^100
    assert full[0, 0].item() == pytest.approx(0.5)


def test_injected_tokens_are_skipped_whatever_their_value():
    mask = torch.tensor([[True, False, True, True]])
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    for junk in (9.9, -3.0, math.nan):
        values = torch.tensor([[0.2, junk, 0.5, 0.8]])
        advantages = segment_gae(
            rewards, values, mask, ENDED, gamma=1.0, lam=0.95, action_mask=mask
        )
        torch.testing.assert_close(advantages, torch.tensor([[0.7655, 0.0, 0.49, 0.2]]))


def test_starts_on_injected_tokens_are_ignored():
    mask = torch.tensor([[True, False, True, True]])
    values = torch.tensor([[0.2, 9.9, 0.5, 0.8]])
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    everywhere = torch.ones_like(mask)
    advantages = segment_gae(
        rewards, values, everywhere, ENDED, gamma=0.9, lam=0.95, action_mask=mask
    )
    expected = segment_gae(rewards, values, mask, ENDED, gamma=0.9, lam=0.95, action_mask=mask)
    assert torch.equal(advantages, expected)


def test_inserting_injected_tokens_changes_no_credit():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    bootstrap = torch.randn(3, generator=generator, dtype=torch.float64)
    mask = torch.ones(3, 6, dtype=torch.bool)
    plain = segment_gae(rewards, values, mask, bootstrap, gamma=0.9, lam=0.8, action_mask=mask)

    kept = torch.tensor([0, 1, 4, 5, 7, 8])  # positions 2, 3, 6 are tool output
    wide_mask = torch.zeros(3, 9, dtype=torch.bool)
    wide_mask[:, kept] = True

    def widen(x):
        wide = torch.full((3, 9), 0.0, dtype=torch.float64)
        wide[:, kept] = x
        return wide

    wide = segment_gae(
        widen(rewards), widen(values), wide_mask, bootstrap,
        gamma=0.9, lam=0.8, action_mask=wide_mask,
    )  # fmt: skip
    torch.testing.assert_close(wide[:, kept], plain)


def test_a_reward_on_an_injected_token_belongs_to_the_action_before_it():
    mask = torch.tensor([[True, True, False, True]])
    values = torch.tensor([[0.1, 0.2, 0.0, 0.3]])
    on_tool = torch.tensor([[0.0, 0.0, 0.7, 1.0]])
    on_action = torch.tensor([[0.0, 0.7, 0.0, 1.0]])
    first, second = (
        segment_gae(rewards, values, mask, ENDED, gamma=0.9, lam=0.9, action_mask=mask)
        for rewards in (on_tool, on_action)
    )
    assert torch.equal(first, second)
    assert first[0, 1].item() == pytest.approx(0.7 + 0.9 * 0.3 - 0.2 + 0.81 * 0.7)


def test_one_segment_with_lambda_one_is_return_minus_value():
    starts = torch.tensor([[True, False, False]])
    advantages = segment_gae(
        torch.tensor([[0.5, 0.25, 1.0]]), VALUES, starts, ENDED, gamma=1.0, lam=1.0
    )
    torch.testing.assert_close(advantages, torch.full((1, 3), 1.75 - 0.2))


def test_cut_points_with_lambda_zero_are_value_differences():
    values = torch.tensor([[0.2, 77.0, 0.6, -5.0]])
    starts = torch.tensor([[True, False, True, False]])
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    advantages = segment_gae(rewards, values, starts, ENDED, gamma=1.0, lam=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[0.4, 0.4, 0.4, 0.4]]))


def test_time_passes_once_a_segment():
    starts = torch.tensor([[True, False, True]])
    values = torch.tensor([[0.0, 0.0, 0.5]])
    advantages = segment_gae(REWARDS, values, starts, ENDED, gamma=0.5, lam=1.0)
    # last segment: 1 - .5; first: .5·.5 - 0 + .5·.5
    torch.testing.assert_close(advantages, torch.tensor([[0.5, 0.5, 0.5]]))


def test_tokens_before_the_first_start_get_no_credit():
    starts = torch.tensor([[False, True, False]])
    advantages = segment_gae(
        torch.tensor([[5.0, 0.0, 1.0]]), VALUES, starts, ENDED, gamma=1.0, lam=1.0
    )
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 0.5, 0.5]]))


def test_a_truncated_response_bootstraps_and_a_terminated_one_does_not():
    both = segment_gae(
        torch.zeros(2, 1),
        torch.full((2, 1), 0.25),
        torch.ones(2, 1, dtype=torch.bool),
        torch.tensor([0.0, 1.0]),
        gamma=0.5,
        lam=1.0,
    )
    torch.testing.assert_close(both, torch.tensor([[-0.25], [0.25]]))


def test_a_window_bootstrapped_with_the_next_value_is_part_of_the_whole():
    # With λ = 0 a window that ends in the critic's value is the same as the uncut response.
    whole = segment_gae(REWARDS, VALUES, EVERY, ENDED, gamma=0.9, lam=0.0)
    window = segment_gae(
        REWARDS[:, :2], VALUES[:, :2], EVERY[:, :2], VALUES[:, 2], gamma=0.9, lam=0.0
    )
    torch.testing.assert_close(window, whole[:, :2])


def test_rates_may_be_given_for_each_token():
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 4, 5, generator=generator)
    starts = torch.ones(4, 5, dtype=torch.bool)
    bootstrap = torch.zeros(4)
    scalar = segment_gae(rewards, values, starts, bootstrap, gamma=0.9, lam=0.7)
    table = segment_gae(
        rewards, values, starts, bootstrap,
        gamma=torch.full((4, 5), 0.9), lam=torch.full((4, 5), 0.7),
    )  # fmt: skip
    torch.testing.assert_close(table, scalar)

    # One λ a row, as with length-adaptive λ: each row as if computed alone.
    lam = torch.tensor([0.0, 0.5, 0.8, 1.0])
    rows = segment_gae(rewards, values, starts, bootstrap, gamma=0.9, lam=lam[:, None].expand(4, 5))
    for row in range(4):
        alone = segment_gae(
            rewards[row : row + 1], values[row : row + 1], starts[row : row + 1], ENDED,
            gamma=0.9, lam=lam[row].item(),
        )  # fmt: skip
        torch.testing.assert_close(rows[row : row + 1], alone)


def test_padding_and_row_order_change_no_advantage():
    generator = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(2, 4, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 0, 1, 3])[:, None]
    rewards, bootstrap = rewards.where(mask, 0.0), torch.randn(4, generator=generator)

    def gae(rows, pad):
        def grow(x, fill):
            return torch.cat([x[rows], torch.full((4, pad), fill, dtype=x.dtype)], dim=1)

        wide = grow(mask, False)
        return segment_gae(
            grow(rewards, 0.0), grow(values, math.nan), wide, bootstrap[rows],
            gamma=0.9, lam=0.8, action_mask=wide,
        )[:, :5]  # fmt: skip

    same, shuffled = torch.arange(4), torch.tensor([2, 0, 3, 1])
    assert torch.equal(gae(same, 0), gae(same, 3))
    assert torch.equal(gae(same, 0)[shuffled], gae(shuffled, 1))
    assert (gae(same, 0)[1] == 0).all()


def test_a_batch_without_tokens_has_no_advantages():
    nothing = torch.zeros(2, 0)
    advantages = segment_gae(nothing, nothing, nothing.bool(), torch.zeros(2), gamma=1.0, lam=1.0)
    assert advantages.shape == reward_to_go(nothing).shape == (2, 0)


def test_reward_to_go_discounts_a_token():
    rewards = torch.tensor([[1.0, 0.0, 4.0]])
    assert torch.equal(reward_to_go(rewards, gamma=0.5), torch.tensor([[2.0, 2.0, 4.0]]))
    assert torch.equal(reward_to_go(rewards), torch.tensor([[5.0, 4.0, 4.0]]))


def test_reward_to_go_is_gae_without_a_critic():
    rewards = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    gae = segment_gae(
        rewards, torch.zeros(3, 6), torch.ones(3, 6, dtype=torch.bool), torch.zeros(3),
        gamma=0.9, lam=1.0,
    )  # fmt: skip
    torch.testing.assert_close(gae, reward_to_go(rewards, gamma=0.9))


def test_the_outcome_stands_on_the_last_action_token():
    mask = torch.tensor(
        [[True, True, False, True, False], [True, False, False, False, False], [False] * 5]
    )
    placed = place_outcome_rewards(torch.tensor([2.0, -1.0, 3.0]), mask)
    expected = torch.tensor([[0.0, 0, 0, 2, 0], [-1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(placed, expected)
