"""Errors of critics, per token."""

import math

import pytest
import torch

from llmac.core.losses import value_clipped
from llmac.core.value_losses import (
    between,
    binary_cross_entropy,
    either,
    gaussian_nll,
    huber,
    near,
    quantile_huber,
    squared,
)


def t(x):
    return torch.tensor(x, dtype=torch.float32)


@pytest.mark.parametrize(("error", "expected"), [(0.3, 0.045), (-0.3, 0.045), (1.0, 0.375)])
def test_huber(error, expected):
    assert float(huber(t(error), delta=0.5)) == pytest.approx(expected)


def test_huber_is_smooth_where_it_turns_and_pulls_no_harder_than_delta():
    error = t([0.4999, 0.5001, 3.0, -3.0]).requires_grad_()
    huber(error, delta=0.5).sum().backward()
    assert error.grad.tolist() == pytest.approx([0.4999, 0.5, 0.5, -0.5], abs=1e-6)


def test_safes_value_loss_is_the_average_of_both_errors():
    # v = .9, old = .5, G = 0: .5 · (Huber(.9) + Huber(.7)) = .5 · (.325 + .225)
    both = (huber(x, delta=0.5) for x in (t(0.9), near(t(0.9), t(0.5), clip=0.2)))
    assert float(either(*both, how="mean")) == pytest.approx(0.275)


@pytest.mark.parametrize(
    ("old", "new", "target", "clip", "expected"),
    [
        (0.5, 1.2, 1.0, 0.2, 0.045),
        (0.5, 0.9, 0.0, 0.2, 0.405),
        (0.5, 0.65, 1.0, 0.2, 0.06125),
        (0.5, 1.2, 1.0, 0.5, 0.02),
    ],
)
def test_ppos_value_loss(old, new, target, clip, expected):
    close = near(t([[new]]), t([[old]]), clip=clip)
    found = either(squared(t([[new]]) - target), squared(close - target), how="max")
    assert float(found) == pytest.approx(expected)
    peers = value_clipped(t([[new]]), t([[old]]), t([[target]]), clip=clip)
    assert float(found) == float(peers)


def test_bernoulli_with_a_soft_label():
    logits = t(0.4).requires_grad_()
    loss = binary_cross_entropy(logits, t(0.25))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.813015, abs=1e-6)
    assert float(logits.grad) == pytest.approx(0.348688, abs=1e-6)


def test_bounded_values():
    found = between(t([0.0, 1.0, -1.0, 5.0]), low=0.0, high=1.0)
    assert found.tolist() == pytest.approx([0.5, 0.75, 0.25, 0.937167], abs=1e-6)
    scaled = between(t([0.0, 1.0]), low=-2.0, high=6.0)
    assert scaled.tolist() == pytest.approx([2.0, 4.0])


@pytest.mark.parametrize(("error", "expected"), [(0.5, 0.03125), (-0.5, 0.09375), (2.0, 0.375)])
def test_the_quantile_loss_at_level_a_quarter(error, expected):
    # of two quantiles the first has level (0 + .5) / 2 = .25
    found = quantile_huber(t([0.0, 0.0]), t(error), kappa=1.0)
    assert float(found[0]) == pytest.approx(expected)


def test_the_quantile_loss_without_kappa_is_the_limit_of_small_kappa():
    outputs, target = t([0.1, 0.4, 0.9]), t(0.5)
    sharp = quantile_huber(outputs, target, kappa=0.0)
    torch.testing.assert_close(
        quantile_huber(outputs, target, kappa=1e-5), sharp, rtol=0, atol=1e-5
    )


def test_quantiles_of_a_coin_average_to_its_chance_and_expectiles_do_not():
    """Why kappa is 0 by default: with rewards 0 and 1, QR-DQN's kappa = 1 biases the value."""
    outcomes = t([1.0] + [0.0] * 9)

    def gradient(outputs, kappa):
        outputs = outputs.clone().requires_grad_()
        # the mean over outcomes, of the loss summed over quantiles
        quantile_huber(outputs.expand(10, -1), outcomes, kappa=kappa).mean(0).sum().backward()
        return outputs.grad

    outputs = torch.full((32,), 0.5)
    for step in range(200):
        outputs -= 0.98**step * gradient(outputs, 0.0)
    assert float(outputs.mean()) == pytest.approx(0.1, abs=1 / 64 + 0.01)

    levels = (torch.arange(32) + 0.5) / 32
    expectiles = 0.1 * levels / (0.1 * levels + 0.9 * (1 - levels))
    assert gradient(expectiles, 1.0).abs().max() < 1e-6
    assert float(expectiles.mean()) == pytest.approx(0.184, abs=0.001)


def test_gaussian_likelihood():
    assert float(gaussian_nll(t(0.7), t(0.2), t(1.0))) == pytest.approx(0.434501, abs=1e-6)
    assert float(gaussian_nll(t(0.0), t(1.0), t(0.0))) == pytest.approx(0.5 * math.log(2 * math.pi))


def test_the_deviation_does_not_learn_from_beyond_its_reach_and_the_mean_does():
    def gradients(target, reach):
        mean, deviation = t(0.0).requires_grad_(), t(0.5).requires_grad_()
        gaussian_nll(mean, deviation, t(target), reach=reach).backward()
        return float(mean.grad), float(deviation.grad)

    assert gradients(0.3, 1.0) == pytest.approx(gradients(0.3, None))
    # ∂/∂σ = 1/σ - x²/σ³ with x = 1, not 3;  ∂/∂μ = -3/σ²
    assert gradients(3.0, 1.0) == pytest.approx((-12.0, 2.0 - 8.0))
    assert gradients(3.0, None) == pytest.approx((-12.0, 2.0 - 72.0))
