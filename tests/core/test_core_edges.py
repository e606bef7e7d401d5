"""What edges of a tree are worth, from the values of their ends."""

import pytest
import torch

from llmac.core.baselines import group_mean, leave_one_out
from llmac.core.edges import (
    baselines,
    best_of,
    in_deviations,
    informative,
    mean_and_std,
    prover,
)

ONCE = torch.ones(4, dtype=torch.int64)


def wide(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_a_tree_of_two_children_by_hand():
    # a has leaves 1, 1; b has 0, 1.  V: a 1, b .5, root .75
    a, std_a = mean_and_std(wide(1, 1), ONCE[:2])
    b, std_b = mean_and_std(wide(0, 1), ONCE[:2])
    root, std = mean_and_std(torch.stack([a, b]), ONCE[:2])
    assert (a, b, root, std_a, std_b, std) == (1, 0.5, 0.75, 0, 0.5, 0.25)
    upper, below_a, below_b = wide(1, 0.5) - root, wide(1, 1) - a, wide(0, 1) - b
    assert upper.tolist() == [0.25, -0.25]
    assert below_a.tolist() == [0, 0]
    assert below_b.tolist() == [-0.5, 0.5]
    scaled = [in_deviations(*x) for x in ((upper, std.expand(2)), (below_b, std_b.expand(2)))]
    assert torch.allclose(torch.stack(scaled), wide(1, -1, -1, 1).view(2, 2))
    assert in_deviations(below_a, std_a.expand(2)).tolist() == [0, 0]
    kept = informative(torch.stack([root, root, a, b]), wide(1, 0.5, 1, 0))
    assert kept.tolist() == [True, True, False, True]


def test_best_of_four_by_hand():
    # 1 - .75^4 = 1 - 81/256, 1 - .5^4, 1 - .25^4
    found = best_of(wide(0, 0.25, 0.5, 0.75, 1), 4.0)
    assert torch.allclose(found, wide(0, 0.68359375, 0.9375, 0.99609375, 1))
    assert torch.allclose(
        prover(wide(0.75, 0.75), wide(0.5, 1), attempts=4.0), wide(-0.05859375, 0.00390625)
    )
    assert torch.allclose(
        best_of(wide(-1, 0, 1, 3), 2.0, reward_range=(-1.0, 1.0)), wide(0, 0.75, 1, 1)
    )


def test_one_level_by_hand_and_as_group_baselines_have_it():
    rewards, group = wide(1, 1, 0, 1), torch.zeros(4, dtype=torch.int64)
    mean, std = mean_and_std(rewards, ONCE)
    centred = rewards - baselines(rewards, ONCE, how="rloo")
    assert torch.equal(centred, rewards - group_mean(rewards, group)[0])
    assert torch.equal(centred, wide(0.25, 0.25, -0.75, 0.25))
    # Population deviation √3/4
    expected = wide(0.57735, 0.57735, -1.73205, 0.57735)
    assert torch.allclose(in_deviations(centred, std.expand(4)), expected, atol=1e-5)
    others = rewards - baselines(rewards, ONCE, how="leave_one_out")
    assert torch.allclose(others, wide(1 / 3, 1 / 3, -1, 1 / 3))
    assert torch.allclose(others, leave_one_out(rewards, group))
    assert torch.equal(baselines(rewards, ONCE, how="grpo"), mean.expand(4))


def test_a_child_with_copies_counts_as_often_as_it_was_sampled():
    merged, copies = wide(1, 0.25, 0), torch.tensor([3, 1, 2])
    apart = merged.repeat_interleave(copies)
    once = torch.ones(6, dtype=torch.int64)
    for ours, theirs in zip(mean_and_std(merged, copies), mean_and_std(apart, once), strict=True):
        assert torch.allclose(ours, theirs)
    for how in ("rloo", "leave_one_out"):
        each = baselines(merged, copies, how=how).repeat_interleave(copies)
        assert torch.allclose(each, baselines(apart, once, how=how))


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.3])
def test_equal_children_say_exactly_nothing(reward):
    values, copies = torch.full((7,), reward, dtype=torch.float64), torch.arange(1, 8)
    mean, std = mean_and_std(values, copies)
    assert (mean, std) == (reward, 0)
    for how in ("rloo", "grpo", "leave_one_out"):
        starts = baselines(values, copies, how=how)
        assert torch.equal(starts, values)
        assert not informative(starts, values).any()


@pytest.mark.parametrize("attempts", [1.0, 2.5, 4.0])
def test_an_edge_says_something_exactly_where_its_ends_differ(attempts):
    ends = torch.linspace(-1, 2, 25, dtype=torch.float64)
    parent, child = torch.meshgrid(ends, ends, indexing="ij")
    kept = informative(parent, child)
    assert torch.equal(kept, parent != child)
    gained = prover(parent, child, attempts=attempts)
    assert torch.equal(kept, (child - parent + gained).abs() > 1e-9)  # as SPO's code has it
    # Rounding is no difference.
    assert not informative(ends, ends + 1e-12).any()
    assert (gained.sign() * (child - parent).sign() >= 0).all()


def test_a_single_segment_has_no_others():
    with pytest.raises(ValueError, match="leave_one_out compares a segment with the others"):
        baselines(wide(1.0), ONCE[:1], how="leave_one_out")
    assert baselines(wide(1.0), ONCE[:1], how="rloo").tolist() == [1.0]
