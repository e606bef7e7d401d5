"""GenAC's card: where a critic that writes is asked, and what its scores become."""

import dataclasses

import pytest
import torch

from llmac.core.segments import after_ends, ends_in_doubt, every_n, thinned_ends
from llmac.core.types import Values

from .making import card, known, make_rollouts, make_values

PROBABILITIES = (0.9, 0.1, 0.95, 0.8, 0.15, 0.99, 0.7)
RAW = {"center_advantages": False}


def response(outcome, **fields):
    """(a response with those probabilities, scores of .3, .5 and .2 at its three segments)"""
    old = torch.tensor([PROBABILITIES], dtype=torch.float64).log().tolist()
    rollouts = known(old=old, rewards=[outcome], **fields)
    starts = card("genac").segments(rollouts)
    at = torch.zeros(1, 7, dtype=torch.float64)
    at[starts] = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    return rollouts, Values(at=at, starts=starts, bootstrap=torch.zeros(1, dtype=torch.float64))


def positions(marked):
    return [row.nonzero().flatten().tolist() for row in marked]


def test_a_segment_ends_with_a_token_in_doubt_and_the_last_with_the_response():
    rollouts, values = response(1.0)
    ends = ends_in_doubt(rollouts.old_logprobs, rollouts.action_mask, threshold=0.2)
    assert positions(ends) == [[1, 4, 6]]
    assert positions(values.starts) == [[0, 2, 5]]


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (1.0, [0.7, 0.7, 0.5, 0.5, 0.5, 0.8, 0.8]),
        (0.0, [-0.3, -0.3, -0.5, -0.5, -0.5, -0.2, -0.2]),
    ],
)
def test_every_token_of_a_segment_has_the_outcome_less_the_score_before_it(outcome, expected):
    credit = card("genac", **RAW).credit(*response(outcome))
    assert credit.advantages[0].tolist() == pytest.approx(expected)
    centred = card("genac").credit(*response(outcome)).advantages[0]
    mean = sum(expected) / 7
    assert centred.tolist() == pytest.approx([a - mean for a in expected])


@pytest.mark.parametrize(
    ("lam", "expected"),
    [(1.0, [0.7, 0.5, 0.8]), (0.95, [0.637, 0.46, 0.8]), (0.0, [0.2, -0.3, 0.8])],
)
def test_below_one_lambda_passes_once_a_segment_and_the_critic_still_learns_the_outcome(
    lam, expected
):
    credit = card("genac", lam=lam, **RAW).credit(*response(1.0))
    assert credit.advantages[0, [0, 2, 5]].tolist() == pytest.approx(expected)
    targets = credit.critic_targets
    assert positions(targets.value_mask) == [[0, 2, 5]]
    assert targets.returns[0, [0, 2, 5]].tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_the_mean_is_that_of_all_tokens_that_count_and_of_all_ranks(rollouts):
    values = make_values(rollouts)
    raw = card("genac", mask_truncated=True, **RAW).credit(rollouts, values)
    mask = raw.policy_mask
    centred = card("genac", mask_truncated=True).credit(rollouts, values).advantages
    mean = raw.advantages[mask].mean()
    assert torch.allclose(centred[mask], raw.advantages[mask] - mean)
    assert (centred[~mask] == 0).all()
    assert centred[mask].std() == pytest.approx(raw.advantages[mask].std().item())
    twice = card("genac", mask_truncated=True).credit(rollouts, values, sum_across=lambda x: 2 * x)
    assert torch.allclose(twice.advantages, centred)  # another rank with the same rows
    other = torch.tensor([mask.sum() * 2.0, float(mask.sum())])  # with advantages of 2 everywhere

    def with_other(x):
        return x + other if x.shape == (2,) else x

    moved = card("genac").scaled(raw.advantages, mask, sum_across=with_other)
    assert torch.allclose(moved[mask], raw.advantages[mask] - (mean + 2) / 2)


def test_forty_ends_become_sixteen_and_ten_become_four():
    forty = torch.ones(1, 40, dtype=torch.bool)
    kept = [0, 3, 5, 8, 10, 13, 16, 18, 21, 23, 26, 29, 31, 34, 36, 39]
    assert positions(thinned_ends(forty, 16)) == [kept]
    assert positions(thinned_ends(forty[:, :10], 4)) == [[0, 3, 6, 9]]


@pytest.mark.parametrize("k", [1, 2, 5, 11, 16])
def test_ends_are_thinned_as_python_rounds_and_few_are_left_alone(k):
    for n in (0, 1, k, k + 1, 46, 86):  # 46 and 86: halves that a division too early moves
        ends = torch.zeros(1, 100, dtype=torch.bool)
        places = torch.randperm(100)[:n].sort().values
        ends[0, places] = True
        kept = range(n)
        if n > k:
            kept = [n - 1] if k == 1 else [round(j * (n - 1) / (k - 1)) for j in range(k)]
        assert positions(thinned_ends(ends, k)) == [[int(places[i]) for i in kept]]
    with pytest.raises(ValueError, match="k = 0"):
        thinned_ends(ends, 0)


def test_pieces_of_a_fixed_length_end_with_their_last_token():
    six, five = torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    ends = torch.tensor([[False, False, True, False, False, True]])
    assert torch.equal(every_n(six, 3), after_ends(ends, six))
    assert positions(every_n(five, 10)) == [[0]]


def test_what_a_tool_said_neither_ends_a_segment_nor_begins_one():
    rollouts, _ = response(1.0)
    injected = dataclasses.replace(
        rollouts, action_mask=torch.tensor([[True, False, True, True, True, False, False]])
    )
    ends = ends_in_doubt(injected.old_logprobs, injected.action_mask, threshold=0.2)
    assert positions(ends) == [[4]]
    assert positions(card("genac").segments(injected)) == [[0]]
    assert not ends_in_doubt(torch.zeros(1, 3), torch.zeros(1, 3).bool(), threshold=0.2).any()


def test_a_probability_of_the_threshold_is_no_doubt():
    half = torch.full((1, 4), 0.5).log()
    assert positions(ends_in_doubt(half, torch.ones(1, 4).bool(), threshold=0.5)) == [[3]]


def test_no_more_states_are_asked_than_the_card_says_and_others_may_be_chosen():
    rollouts = make_rollouts(rewards=[1.0], lengths=[40], group=[0], length_limit=64)
    unsure = dataclasses.replace(rollouts, old_logprobs=torch.full((1, 40), -3.0))
    assert int(card("genac").segments(unsure).sum()) == 16
    assert int(card("genac", max_segments=None).segments(unsure).sum()) == 40
    assert positions(card("genac", max_segments=1).segments(unsure)) == [[0]]
    sure = dataclasses.replace(rollouts, old_logprobs=torch.full((1, 40), -0.1))
    assert positions(card("genac").segments(sure)) == [[0]]
    pieces = card("genac", segmenter="every_n", segment_tokens=16, cut_below=0.2)
    assert positions(pieces.segments(unsure)) == [[0, 16, 32]]


def test_the_settings_are_those_of_the_accounts():
    algorithm = card("genac")
    assert algorithm.wanted_critic == "generative"
    assert (algorithm.gamma, algorithm.lam, algorithm.clip_low, algorithm.clip_high) == (
        1,
        1,
        0.2,
        0.2,
    )
    assert (algorithm.kl_coef, algorithm.entropy_coef, algorithm.group_size) == (0, 0, 8)
    assert (algorithm.cut_below, algorithm.max_segments) == (0.2, 16)
