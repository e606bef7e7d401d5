"""Policy and value losses, per token."""

import math

import pytest
import torch

from llmac.core.losses import (
    cispo,
    clipped_surrogate,
    log_ratio,
    reinforce,
    sequence_log_ratio,
    value_clipped,
    value_mse,
)
from llmac.core.masking import aggregate

# Two responses of 2 and 3 tokens, old log-probs 0, advantages +1 and -1.
LOGPROBS = torch.tensor([[0.3, -0.1, 0.0], [0.5, -0.4, 0.2]])
MASK = torch.tensor([[True, True, False], [True, True, True]])
ADVANTAGES = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
OLD = torch.zeros(2, 3)


def mean_and_gradient(loss, logprobs, how="token_mean"):
    total, weight = aggregate(loss, MASK, how, horizon=3)
    (gradient,) = torch.autograd.grad(total / weight, logprobs)
    return (total / weight).item(), gradient


def test_the_clipped_surrogate_of_two_responses():
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, clipped = clipped_surrogate(
        log_ratio(logprobs, OLD), ADVANTAGES, clip_low=0.2, clip_high=0.28, dual_clip=3.0
    )
    # row 0: -min(e^.3, 1.28), -e^-.1; row 1: e^.5, max(e^-.4, .8), e^.2
    expected = torch.tensor([[-1.28, -0.904837], [1.648721, 0.8], [1.221403, math.nan]])
    torch.testing.assert_close(loss[:, :2], expected[:2], rtol=0, atol=1e-6)
    assert loss[1, 2].item() == pytest.approx(1.221403, abs=1e-6)
    assert clipped.tolist() == [[True, False, False], [False, True, False]]

    mean, gradient = mean_and_gradient(loss, logprobs)
    assert mean == pytest.approx(0.297057, abs=1e-6)
    expected = torch.tensor([[0, -0.180967, 0], [0.329744, 0, 0.244281]])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "clip_high", "dual_clip", "expected", "has_gradient"),
    [
        (1.0, 1.5, 0.2, None, -1.2, False),
        (1.0, 1.5, 0.28, None, -1.28, False),
        (1.0, 0.5, 0.2, None, -0.5, True),
        (-1.0, 1.5, 0.2, None, 1.5, True),
        (-1.0, 0.5, 0.2, None, 0.8, False),
        (-1.0, 5.0, 0.2, None, 5.0, True),
        (-1.0, 5.0, 0.2, 3.0, 3.0, False),
        (1.0, 5.0, 0.2, 3.0, -1.2, False),  # the dual clip is for negative advantages only
    ],
)
def test_clipping_case_by_case(advantage, ratio, clip_high, dual_clip, expected, has_gradient):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, clipped = clipped_surrogate(
        log_ratio(logprobs, torch.zeros(1, 1)),
        torch.tensor([[advantage]]),
        clip_low=0.2,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.sum().backward()
    assert (logprobs.grad.abs().item() > 0) == has_gradient
    stopped_by_dual_clip = dual_clip is not None and advantage < 0
    assert clipped.item() == (not has_gradient and not stopped_by_dual_clip)


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_a_dual_clip_is_a_ratio_above_one(ratio):
    with pytest.raises(ValueError, match=f"found {ratio}"):
        clipped_surrogate(OLD, ADVANTAGES, clip_low=0.2, clip_high=0.2, dual_clip=ratio)


def test_without_clip_at_ratio_one_the_gradient_is_that_of_reinforce():
    surrogate = LOGPROBS.clone().requires_grad_()
    plain = LOGPROBS.clone().requires_grad_()
    loss, _ = clipped_surrogate(
        log_ratio(surrogate, LOGPROBS), ADVANTAGES, clip_low=math.inf, clip_high=math.inf
    )
    _, from_surrogate = mean_and_gradient(loss, surrogate)
    _, from_plain = mean_and_gradient(reinforce(plain, ADVANTAGES), plain)
    assert torch.equal(from_surrogate, from_plain)


def test_a_log_ratio_far_away_stays_finite():
    ratio = log_ratio(torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]]))
    assert ratio.tolist() == [[20.0, -20.0]]
    loss, _ = clipped_surrogate(ratio, torch.tensor([[-1.0, 1.0]]), clip_low=0.2, clip_high=0.2)
    assert loss.isfinite().all()


def test_the_sequence_ratio_is_the_geometric_mean():
    logprobs = LOGPROBS.clone().requires_grad_()
    ratio = sequence_log_ratio(logprobs, OLD, MASK)
    # both responses: (.3 - .1)/2 = (.5 - .4 + .2)/3 = .1
    torch.testing.assert_close(ratio, torch.full((2, 3), 0.1).where(MASK, 0.0))
    loss, _ = clipped_surrogate(ratio, ADVANTAGES, clip_low=0.2, clip_high=0.28)
    mean, gradient = mean_and_gradient(loss, logprobs, "sequence_mean_token_mean")
    assert mean == pytest.approx(0.0, abs=1e-6)
    # ± e^.1 / (responses · tokens)
    expected = torch.tensor([[-0.276293, -0.276293, 0.0], [0.184195] * 3])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


def test_the_narrow_clip_of_gspo():
    ratio = sequence_log_ratio(LOGPROBS, OLD, MASK)
    loss, clipped = clipped_surrogate(ratio, ADVANTAGES, clip_low=3e-4, clip_high=4e-4)
    torch.testing.assert_close(loss[:, 0], torch.tensor([-1.0004, 1.105171]), rtol=0, atol=1e-6)
    assert clipped[:, 0].tolist() == [True, False]


def test_the_gradient_of_token_wise_gspo_is_that_of_the_sequence_objective():
    ours = LOGPROBS.double().requires_grad_()
    loss, _ = clipped_surrogate(
        sequence_log_ratio(ours, OLD.double(), MASK),
        ADVANTAGES.double(),
        clip_low=math.inf,
        clip_high=math.inf,
    )
    total, weight = aggregate(loss, MASK, "sequence_mean_token_mean", horizon=3)
    (ours_gradient,) = torch.autograd.grad(total / weight, ours)

    plain = LOGPROBS.double().requires_grad_()
    means = torch.stack([plain[0, :2].mean(), plain[1].mean()])
    (sequence_gradient,) = torch.autograd.grad(
        -(means.exp() * torch.tensor([1.0, -1.0])).mean(), plain
    )
    torch.testing.assert_close(ours_gradient, sequence_gradient)


def test_the_sequence_ratio_of_a_response_without_tokens_is_one():
    empty = torch.zeros(1, 3, dtype=torch.bool)
    junk = torch.full((1, 3), math.nan)
    assert torch.equal(sequence_log_ratio(junk, OLD[:1], empty), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("cap_low", "cap_high", "expected"),
    [(0.8, 1.28, 0.054153), (0.0, 5.0, 0.097208), (0.0, 1.28, 0.064527)],
)
def test_cispo_with_the_caps_of_its_peers(cap_low, cap_high, expected):
    logprobs = LOGPROBS.clone().requires_grad_()
    loss = cispo(logprobs, log_ratio(logprobs, OLD), ADVANTAGES, cap_low=cap_low, cap_high=cap_high)
    mean, _ = mean_and_gradient(loss, logprobs)
    assert mean == pytest.approx(expected, abs=1e-6)


def test_cispo_gives_every_token_a_gradient():
    logprobs = LOGPROBS.clone().requires_grad_()
    loss = cispo(logprobs, log_ratio(logprobs, OLD), ADVANTAGES, cap_low=0.8, cap_high=1.28)
    _, gradient = mean_and_gradient(loss, logprobs)
    # the capped ratio / 5, with the sign of -advantage
    expected = torch.tensor([[-0.256, -0.180967, 0], [0.256, 0.16, 0.244281]])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


def test_reinforce_averaged_over_tokens():
    logprobs = LOGPROBS.clone().requires_grad_()
    mean, gradient = mean_and_gradient(reinforce(logprobs, ADVANTAGES), logprobs)
    assert mean == pytest.approx(0.02, abs=1e-6)  # (-.3 + .1 + .5 - .4 + .2) / 5
    torch.testing.assert_close(gradient, (-ADVANTAGES / 5).where(MASK, 0.0))


@pytest.mark.parametrize(
    ("old", "new", "target", "clip", "expected"),
    [
        (0.5, 1.2, 1.0, 0.2, 0.045),  # clamped to .7: ½ · .3²
        (0.5, 0.9, 0.0, 0.2, 0.405),  # the unclamped error is the larger: ½ · .9²
        (0.5, 0.65, 1.0, 0.2, 0.06125),  # inside: ½ · .35²
        (0.5, 1.2, 1.0, 0.5, 0.02),  # clamped to 1.0, and ½ · .2² is the larger
    ],
)
def test_the_clipped_value_loss_takes_the_larger_error(old, new, target, clip, expected):
    loss = value_clipped(
        torch.tensor([[new]]), torch.tensor([[old]]), torch.tensor([[target]]), clip=clip
    )
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_value_beyond_the_clip_on_the_way_to_its_target_gets_no_gradient():
    values = torch.tensor([[0.8, 0.2, 0.8]], requires_grad=True)
    old = torch.full((1, 3), 0.5)
    targets = torch.tensor([[1.0, 1.0, 0.0]])  # too far ahead; away from it; away from it
    value_clipped(values, old, targets, clip=0.2).sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.8, 0.8]]))


def test_a_wide_value_clip_is_no_clip():
    values, targets = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        value_clipped(values, torch.zeros(2, 5), targets, clip=100.0), value_mse(values, targets)
    )
    assert value_mse(torch.tensor([[3.0]]), torch.tensor([[1.0]])).item() == 2.0
