"""Where values are asked."""

import pytest
import torch

from llmac.core.segments import (
    after_ends,
    at_most,
    every_n,
    every_token,
    low_probability,
    response_start,
)

MASK = torch.tensor(
    [
        [True, True, False, True, True, False],
        [False, True, True, True, True, True],
        [False] * 6,
    ]
)


def positions(starts):
    return [row.nonzero().flatten().tolist() for row in starts]


def test_each_segmenter_marks_what_it_says():
    assert positions(every_token(MASK)) == [[0, 1, 3, 4], [1, 2, 3, 4, 5], []]
    assert positions(response_start(MASK)) == [[0], [1], []]
    assert positions(every_n(MASK, 2)) == [[0, 3], [1, 3, 5], []]
    assert positions(every_n(MASK, 3)) == [[0, 4], [1, 4], []]


def test_segments_of_one_token_are_every_token():
    assert torch.equal(every_n(MASK, 1), every_token(MASK))


def test_segments_longer_than_the_response_are_the_response():
    assert torch.equal(every_n(MASK, 6), response_start(MASK))


def test_a_segment_needs_a_token():
    with pytest.raises(ValueError, match="n = 0"):
        every_n(MASK, 0)


def test_segments_begin_at_doubtful_tokens_and_at_the_first():
    probability = torch.tensor([[0.99, 0.5, 0.1, 0.95, 0.8, 0.0]]).expand(3, 6)
    starts = low_probability(probability.log(), MASK, threshold=0.9)
    assert positions(starts) == [[0, 1, 4], [1, 2, 4, 5], []]


def test_cuts_are_at_every_few_doubtful_tokens_from_the_first_on():
    probability = torch.tensor([[0.99, 0.5, 0.1, 0.95, 0.8, 0.0]]).expand(3, 6)
    cut = {"threshold": 0.9, "interval": 2}
    starts = low_probability(probability.log(), MASK, **cut, first=False)
    assert positions(starts) == [[1], [1, 4], []]
    assert positions(low_probability(probability.log(), MASK, **cut)) == [[0, 1], [1, 4], []]
    with pytest.raises(ValueError, match="interval = 0"):
        low_probability(probability.log(), MASK, threshold=0.9, interval=0)


def test_a_response_without_doubt_is_in_no_segment_unless_its_first_token_is_asked():
    certain = torch.zeros(MASK.shape)
    assert not low_probability(certain, MASK, threshold=0.9, first=False).any()
    first = low_probability(certain, MASK, threshold=0.9)
    assert torch.equal(first, response_start(MASK))


def test_the_threshold_itself_is_no_doubt():
    half = torch.full(MASK.shape, 0.5).log()
    assert not low_probability(half, MASK, threshold=0.5, first=False).any()


@pytest.mark.parametrize("k", range(1, 8))
def test_the_starts_that_stay_are_spread_evenly(k):
    starts = torch.zeros(7, 12, dtype=torch.bool)
    for n in range(7):
        starts[n, torch.randperm(12)[:n]] = True
    for n, (row, kept) in enumerate(zip(starts, at_most(starts, k), strict=True)):
        found = row.nonzero().flatten().tolist()
        expected = found if n <= k else [found[-(-j * n // k)] for j in range(k)]
        assert kept.nonzero().flatten().tolist() == expected


def test_at_most_needs_a_segment():
    with pytest.raises(ValueError, match="k = 0"):
        at_most(MASK, 0)


def test_only_sampled_tokens_end_a_segment():
    everywhere = torch.ones_like(MASK)
    assert torch.equal(after_ends(everywhere, MASK), every_token(MASK))
    assert torch.equal(after_ends(~everywhere, MASK), response_start(MASK))
    injected = torch.zeros_like(MASK)
    injected[0, 2] = True
    assert positions(after_ends(injected, MASK))[0] == [0]


@pytest.mark.parametrize(
    "segmenter",
    [
        every_token,
        response_start,
        lambda mask: every_n(mask, 2),
        lambda mask: low_probability(torch.full(mask.shape, -9.0), mask, threshold=0.9),
    ],
)
def test_starts_lie_on_action_tokens_and_include_the_first(segmenter):
    starts = segmenter(MASK)
    assert not (starts & ~MASK).any()
    assert (starts & response_start(MASK)).sum() == MASK.any(dim=1).sum()
    assert starts is not MASK
