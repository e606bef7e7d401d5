"""λ by the length of the response and by the doubt of the policy."""

import math

import pytest
import torch

from llmac.core.returns import segment_gae
from llmac.core.traces import doubt_lam, length_lam

REWARDS = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]])
VALUES = torch.tensor([[0.2, 0.3, 0.6, 0.7, 0.9]])
EVERY = torch.ones(1, 5, dtype=torch.bool)
LOGPROBS = torch.tensor([[0.9, 0.95, 0.1, 0.9, 0.9]]).log()
ENDED = torch.zeros(1)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (10, 0.0),  # 1 - 1/.5 = -1, clamped
        (20, 0.0),
        (40, 0.5),
        (100, 0.8),
        (1000, 0.98),
        (8192, 0.997559),
        (100_000, 0.999),  # 1 - 1/5000 = .9998, clamped
    ],
)
def test_lambda_grows_with_the_length_of_the_response(length, expected):
    lam = length_lam(torch.ones(1, length, dtype=torch.bool), alpha=0.05)
    assert lam.shape == (1, length)
    assert (lam == lam[0, 0]).all()
    assert lam[0, 0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("length", "covered"), [(100, 5), (1000, 50)])
def test_the_weights_of_a_trace_add_up_to_alpha_times_the_length(length, covered):
    lam = length_lam(torch.ones(1, length, dtype=torch.bool), alpha=0.05)[0, 0].item()
    assert 1 / (1 - lam) == pytest.approx(covered, rel=1e-4)
    # Cut off after l terms, the sum is smaller by λ^l, which is e^(-1/α) = e^-20.
    assert sum(lam**k for k in range(length)) == pytest.approx(covered, rel=1e-4)


def test_length_counts_the_states_that_have_a_value_row_by_row():
    starts = torch.tensor([[True, True, False, True], [True, False, False, False], [False] * 4])
    lam = length_lam(starts, alpha=0.5)
    # three starts: 1 - 1/1.5; one or none: 1 - 2, clamped
    torch.testing.assert_close(lam[:, 0], torch.tensor([1 / 3, 0.0, 0.0]))


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_a_share_of_nothing_is_refused(alpha):
    with pytest.raises(ValueError, match=r"share of the response, above 0 .*; found"):
        length_lam(EVERY, alpha=alpha)


def test_credit_decays_only_before_the_doubtful_token():
    lam = doubt_lam(LOGPROBS, EVERY, lam=0.5, threshold=0.2)
    torch.testing.assert_close(lam, torch.tensor([[1.0, 0.5, 1.0, 1.0, 0.5]]))
    # δ = .1, .3, .1, .2, .1; from the right: .1; .2 + .1; .1 + .3; .3 + .5·.4; .1 + .5
    advantages = segment_gae(REWARDS, VALUES, EVERY, ENDED, gamma=1.0, lam=lam)
    torch.testing.assert_close(advantages, torch.tensor([[0.6, 0.5, 0.4, 0.3, 0.1]]))


def test_a_plain_lambda_would_say_something_else():
    plain = segment_gae(REWARDS, VALUES, EVERY, ENDED, gamma=1.0, lam=0.5)
    torch.testing.assert_close(plain, torch.tensor([[0.30625, 0.4125, 0.225, 0.25, 0.1]]))
    full = segment_gae(REWARDS, VALUES, EVERY, ENDED, gamma=1.0, lam=1.0)
    torch.testing.assert_close(full, torch.tensor([[0.8, 0.7, 0.4, 0.3, 0.1]]))


def test_a_policy_sure_of_everything_has_lambda_one_and_one_sure_of_nothing_lambda():
    sure = doubt_lam(torch.full((1, 5), math.log(0.99)), EVERY, lam=0.5, threshold=0.2)
    assert sure.tolist() == [[1.0, 1.0, 1.0, 1.0, 0.5]]
    unsure = doubt_lam(torch.full((1, 5), math.log(0.01)), EVERY, lam=0.5, threshold=0.2)
    assert (unsure == 0.5).all()


def test_doubt_is_looked_for_at_the_next_start_over_tool_output_and_inside_segments():
    starts = torch.tensor([[True, False, False, True, True]])
    logprobs = torch.tensor([[0.9, 0.01, math.nan, 0.1, 0.9]]).log()
    lam = doubt_lam(logprobs, starts, lam=0.5, threshold=0.2)
    # 0: the next start, 3, was in doubt, what is between does not count; 3: 4 was not; 4: the last
    assert lam[0, [0, 3, 4]].tolist() == [0.5, 1.0, 0.5]


@pytest.mark.parametrize("threshold", [0.0, 1.0, math.nan])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(ValueError, match=r"probability between 0 and 1; found"):
        doubt_lam(LOGPROBS, EVERY, lam=0.5, threshold=threshold)


def test_responses_without_tokens_have_no_lambda():
    nothing = torch.zeros(2, 0)
    assert doubt_lam(nothing, nothing.bool(), lam=0.5, threshold=0.2).shape == (2, 0)
    assert length_lam(nothing.bool(), alpha=0.05).shape == (2, 0)
