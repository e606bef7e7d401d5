"""Baselines from siblings."""

import math

import pytest
import torch

from llmac.core.baselines import group_mean, group_relative, group_std, leave_one_out
from llmac.core.masking import whiten

# Two groups of four: A = [1, 1, 0, 0], B = [1, 0, 0, 0].
REWARDS = torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 0])
GROUP = torch.tensor([0] * 4 + [1] * 4)


@pytest.mark.parametrize(
    ("eps", "a", "b"),
    [
        (1e-6, [0.866024, 0.866024, -0.866024, -0.866024], [1.499997] + [-0.499999] * 3),
        (1e-4, [0.865875, 0.865875, -0.865875, -0.865875], [1.4997] + [-0.4999] * 3),
    ],
)
def test_grpo_divides_by_the_sample_std_of_the_group(eps, a, b):
    # std A = √(4·.25/3) = .577350, std B = .5
    torch.testing.assert_close(
        group_relative(REWARDS, GROUP, eps=eps), torch.tensor(a + b), rtol=0, atol=2e-6
    )


def test_dr_grpo_does_not_divide():
    expected = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.75, -0.25, -0.25, -0.25])
    assert torch.equal(group_relative(REWARDS, GROUP, scale="none"), expected)


def test_batch_scale_divides_by_the_std_of_all_rewards():
    # mean 3/8; Σ (r - mean)² = 3·(5/8)² + 5·(3/8)² = 1.875; / 7
    std = math.sqrt(1.875 / 7)
    expected = group_relative(REWARDS, GROUP, scale="none") / (std + 1e-6)
    torch.testing.assert_close(group_relative(REWARDS, GROUP, scale="batch"), expected)


def test_batch_scale_sums_over_ranks():
    # This rank holds group A; the other's partial sums of group B are added by `sum_across`.
    others = iter([torch.tensor([1.0, 4.0]), torch.tensor([(5 / 8) ** 2 + 3 * (3 / 8) ** 2, 4.0])])
    here = group_relative(
        REWARDS[:4], GROUP[:4], scale="batch", sum_across=lambda part: part + next(others)
    )
    torch.testing.assert_close(here, group_relative(REWARDS, GROUP, scale="batch")[:4])


def test_leave_one_out_compares_with_the_others():
    expected = torch.tensor([2 / 3, 2 / 3, -2 / 3, -2 / 3, 1, -1 / 3, -1 / 3, -1 / 3])
    torch.testing.assert_close(leave_one_out(REWARDS, GROUP), expected)


def test_leave_one_out_needs_somebody_to_compare_with():
    with pytest.raises(ValueError, match="group 9 has one response"):
        leave_one_out(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([4, 4, 9]))


def test_a_lone_response_is_not_better_than_itself():
    rewards, group = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([4, 4, 9])
    for scale in ("group", "batch", "none"):
        assert group_relative(rewards, group, scale=scale)[2].item() == 0.0


@pytest.mark.parametrize(
    ("solved", "with_std", "without"), [(1, 4.95, 1.75), (4, 7.48, 4.0), (7, 4.95, 1.75)]
)
def test_dividing_by_the_std_favours_the_extremes(solved, with_std, without):
    # 1.75 / 4.0 is .44, but 4.95 / 7.48 is .66: prompts nearly always solved weigh relatively more.
    rewards = torch.tensor([1.0] * solved + [0.0] * (8 - solved))
    group = torch.zeros(8, dtype=torch.long)
    assert group_relative(rewards, group).abs().sum().item() == pytest.approx(with_std, abs=5e-3)
    assert group_relative(rewards, group, scale="none").abs().sum().item() == pytest.approx(without)


def test_each_reward_normalised_apart_then_whitened_ignores_their_scales():
    keys = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0]])
    group, tokens = torch.zeros(4, dtype=torch.long), torch.ones(4, 1, dtype=torch.bool)
    expected = torch.tensor([1.224745, 0.0, 0.0, -1.224745])
    for scale in (1.0, 10.0):
        total = group_relative(scale * keys[0], group) + group_relative(keys[1], group)
        torch.testing.assert_close(
            whiten(total[:, None], tokens)[:, 0], expected, rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 16, 61])
def test_equal_rewards_give_exactly_zero(scale, dtype, size):
    rewards = torch.full((size,), 0.1, dtype=dtype)
    group = torch.zeros(size, dtype=torch.long)
    assert torch.equal(group_relative(rewards, group, scale=scale), torch.zeros_like(rewards))
    assert torch.equal(leave_one_out(rewards, group), torch.zeros_like(rewards))
    assert torch.equal(group_std(rewards, group), torch.zeros_like(rewards))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_sum_to_zero_within_each_group_in_any_row_order(scale):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(12, generator=generator, dtype=torch.float64)
    group = torch.tensor([5, 5, 5, 1, 1, 8, 8, 8, 8, 1, 5, 8])
    advantages = group_relative(rewards, group, scale=scale)
    for name in (1, 5, 8):
        assert abs(advantages[group == name].sum().item()) < 1e-12
    order = torch.randperm(12, generator=generator)
    torch.testing.assert_close(
        group_relative(rewards[order], group[order], scale=scale), advantages[order]
    )


@pytest.mark.parametrize("advantage", [group_relative, leave_one_out])
def test_shifting_all_rewards_of_a_group_changes_nothing(advantage):
    shift = torch.where(GROUP == 0, 4.0, -2.0)
    torch.testing.assert_close(advantage(REWARDS + shift, GROUP), advantage(REWARDS, GROUP))


def test_other_groups_change_nothing():
    changed = torch.where(GROUP == 1, 7.0 * REWARDS - 3, REWARDS)
    torch.testing.assert_close(
        group_relative(changed, GROUP)[:4], group_relative(REWARDS, GROUP)[:4], rtol=0, atol=0
    )


def test_group_statistics_match_torch_on_uneven_groups():
    rewards = torch.tensor([3.0, 1.0, -2.0, 5.0, 5.5], dtype=torch.float64)
    group = torch.tensor([2, 0, 2, 0, 2])
    mean, size = group_mean(rewards, group)
    std = group_std(rewards, group)
    for name in (0, 2):
        members = group == name
        torch.testing.assert_close(mean[members], rewards[members].mean().expand(members.sum()))
        torch.testing.assert_close(std[members], rewards[members].std().expand(members.sum()))
        assert (size[members] == members.sum()).all()
