"""What critiques are worth: every number of the papers' tables by hand."""

import itertools

import pytest
import torch

from llmac.core.mixtures import set_weights
from llmac.core.refinement import (
    Outcome,
    RepairReward,
    SoftFilter,
    StageReward,
    numbers_in,
    passes_barrier,
)


def outcome(before, after, *, true=True):
    return Outcome(
        before=float(before),
        before_right=bool(before),
        after=(float(after),),
        after_right=(bool(after),),
        agreement=float(true),
    )


@pytest.mark.parametrize(
    ("form", "true", "false"), [("additive", 1, 0), ("gated", 1, -1)], ids=lambda x: str(x)
)
def test_stage_1_pays_the_verdict_and_nothing_else(form, true, false):
    reward = StageReward(stage=1, form=form)
    for before, after in itertools.product((0, 1), repeat=2):
        assert reward.worth(outcome(before, after)) == true
        assert reward.worth(outcome(before, after, true=False)) == false


@pytest.mark.parametrize(
    ("mode", "before", "after", "worth"),
    [
        ("refine", 0, 1, 1.2),
        ("refine", 0, 0, 0.2),
        ("refine", 1, 1, 1.2),
        ("refine", 1, 0, 0.2),
        ("delta", 1, 0, -0.8),
        ("delta", 1, 1, 0.2),
        ("correction", 1, 1, 0.4),
        ("correction", 0, 1, 1.2),
        ("correction", 0, 0, 0.2),
    ],
)
def test_stage_2_adds_the_verdict_or_stands_behind_it_as_a_gate(mode, before, after, worth):
    gated = StageReward(stage=2, form="gated", refine_reward=mode)
    additive = StageReward(stage=2, form="additive", refine_reward=mode, beta1=0.2)
    assert gated.worth(outcome(before, after)) == pytest.approx(worth)
    assert additive.worth(outcome(before, after)) == pytest.approx(worth)
    assert gated.worth(outcome(before, after, true=False)) == -1
    assert additive.worth(outcome(before, after, true=False)) == pytest.approx(worth - 0.2)


def test_several_refinements_are_averaged_and_open_ended_ones_keep_their_rewards():
    several = Outcome(
        before=0.25,
        before_right=False,
        after=(0.5, 1.0),
        after_right=(False, True),
        agreement=0.5,
    )
    reward = StageReward(stage=2, beta1=0.4, refine_reward="delta")
    assert reward.worth(several) == pytest.approx(0.5 + 0.2)
    graded = StageReward(stage=2, beta1=0.4, refine_reward="delta", binary=False)
    assert graded.worth(several) == pytest.approx(0.75 - 0.25 + 0.2)
    assert RepairReward(mode="diff_or_exact").worth(several) == pytest.approx((0.25 + 1.0) / 2)


def test_without_refinements_there_is_nothing_to_pay_for():
    none = Outcome(before=0.0, before_right=False)
    for reward in (StageReward(stage=2), RepairReward(), SoftFilter()):
        with pytest.raises(ValueError, match="refined answer"):
            reward.worth(none)


@pytest.mark.parametrize(
    ("mode", "before", "after", "worth"),
    [
        ("abs", 0.4, 0.3, 0.3),
        ("diff", 0.4, 0.3, -0.1),
        ("diff_or_exact", 5 / 11, 1.0, 1.0),  # d = .5455, exact
        ("diff_or_exact", 5 / 11, 5 / 11, 0.0),  # d = 0, not exact
        ("diff_or_exact", 0.25, 0.5, 0.25),
        ("diff_or_exact", 1.0, 1.0, 1.0),  # still exact
        ("diff_or_exact", 0.4, 0.3, -0.1),
    ],
)
def test_a_repair_is_paid_for_what_it_is_or_for_what_it_gained(mode, before, after, worth):
    repaired = Outcome(
        before=before, before_right=False, after=(after,), after_right=(after >= 1.0,)
    )
    assert RepairReward(mode=mode).worth(repaired) == pytest.approx(worth)


def test_an_exact_repair_that_scores_less_than_the_answer_is_a_loss():
    odd = Outcome(before=1.5, before_right=True, after=(1.0,), after_right=(True,))
    assert RepairReward(mode="diff_or_exact").worth(odd) == pytest.approx(-0.5)


def test_the_barrier_stops_answers_that_have_stopped_reasoning():
    gold, answer = "1 2 3 4 5 6", "1 2 3 4 5 6 7 8"
    assert (numbers_in(gold), numbers_in(answer)) == (6, 8)
    assert not passes_barrier("1 2 3", answer, gold)
    assert passes_barrier("1 2 3 4", answer, gold)
    assert not passes_barrier("1 2 3 4 5", answer, None)
    assert passes_barrier("1 2 3 4 5 6", answer, None)


def test_the_soft_filter_keeps_what_helps_and_what_does_no_harm():
    def kept(right, shares):
        helped = tuple(bool(x) for x in shares)
        return SoftFilter(tau=0.3).worth(
            Outcome(
                before=float(right),
                before_right=right,
                after=tuple(map(float, helped)),
                after_right=helped,
            )
        )

    assert kept(False, [1, 0, 0, 1, 0, 0, 1, 0, 0, 0]) == 1  # .3 >= .3
    assert kept(False, [1, 0, 0, 1, 0, 0, 0, 0, 0, 0]) == 0
    assert kept(True, [1] * 7 + [0] * 3) == 1  # .7 >= 1 - .3
    assert kept(True, [1] * 6 + [0] * 4) == 0


def test_a_mixed_loss_is_the_weighted_sum_of_the_means_of_its_sets():
    # Right answers .7 nats a token, refined ones .9, general data 1.2, β .8: .8 (.7 + .9) + .2 · 1.2
    member = torch.tensor([2, 0, 1, 0])
    mask = torch.tensor(
        [[True, True, True], [True, False, False], [True, True, False], [False] * 3]
    )
    nll = torch.tensor([0.7, 0.9, 1.2])[member][:, None].expand(4, 3)
    weights = set_weights(member, mask, (0.8, 0.8, 0.2))
    assert (weights * nll)[mask].sum().item() / mask.sum().item() == pytest.approx(1.52)
    assert not weights[~mask].any()


def test_sets_of_all_ranks_are_counted_and_an_empty_set_changes_nothing():
    member, mask = torch.tensor([0, 1, 0]), torch.ones(3, 2, dtype=torch.bool)
    whole = set_weights(member, mask, (0.5, 0.5, 7.0))
    counts = [torch.tensor([2.0, 2.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])]

    def other(rank):
        return lambda own: own + counts[1 - rank]

    first = set_weights(member[:2], mask[:2], (0.5, 0.5, 7.0), sum_across=other(0))
    second = set_weights(member[2:], mask[2:], (0.5, 0.5, 7.0), sum_across=other(1))
    assert torch.equal(torch.cat([first, second]), whole)
    assert whole[:, 0].tolist() == [0.75, 1.5, 0.75]
