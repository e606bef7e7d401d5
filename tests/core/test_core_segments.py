"""Where values are asked."""

import pytest
import torch

from llmac.core.segments import every_n, every_token, low_probability, response_start

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
