"""Estimates of the divergence from the reference."""

import pytest
import torch

from llmac.core.kl import kl_estimate, kl_shaped_rewards


@pytest.mark.parametrize(
    ("logprob", "reference", "kind", "expected"),
    [
        (-1.0, -1.5, "k1", 0.5),
        (-1.0, -1.5, "k2", 0.125),
        (-1.0, -1.5, "k3", 0.106531),  # e^-.5 - 1 + .5
        (-1.0, -1.5, "k3+", 0.106531),
        (-1.5, -1.0, "k1", -0.5),
        (-1.5, -1.0, "k2", 0.125),
        (-1.5, -1.0, "k3", 0.148721),  # e^.5 - 1 - .5
    ],
)
def test_estimators_at_one_token(logprob, reference, kind, expected):
    estimate = kl_estimate(torch.tensor([[logprob]]), torch.tensor([[reference]]), kind)
    assert estimate.item() == pytest.approx(expected, abs=1e-6)


def test_k1_and_k3_average_to_the_divergence_and_k2_does_not():
    policy, reference = (
        torch.tensor([0.7, 0.2, 0.1]).double(),
        torch.tensor([0.5, 0.3, 0.2]).double(),
    )

    def average(kind):
        return (policy * kl_estimate(policy.log()[None], reference.log()[None], kind)[0]).sum()

    # .7 ln(.7/.5) + .2 ln(.2/.3) + .1 ln(.1/.2)
    assert average("k1").item() == pytest.approx(0.085123, abs=1e-6)
    assert average("k3").item() == pytest.approx(0.085123, abs=1e-6)
    assert average("k2").item() == pytest.approx(0.080088, abs=1e-6)


def gradient_as_loss(kind):
    """Expected gradient of the per-token loss at tokens sampled from π, with respect to logits."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.4, -0.1], dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    chance = logprobs.detach().exp()
    loss = (chance * kl_estimate(logprobs[None], reference[None], kind)[0]).sum()
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    return (
        torch.autograd.grad(loss, logits, retain_graph=True)[0],
        torch.autograd.grad(exact, logits)[0],
    )


@pytest.mark.parametrize("kind", ["k2", "k3+"])
def test_k2_and_k3_plus_have_the_gradient_of_the_divergence(kind):
    estimate, exact = gradient_as_loss(kind)
    torch.testing.assert_close(estimate, exact)


def test_k1_as_a_loss_teaches_nothing_and_k3_something_else():
    estimate, exact = gradient_as_loss("k1")
    assert estimate.abs().max() < 1e-12
    estimate, _ = gradient_as_loss("k3")
    assert (estimate - exact).abs().max() > 0.01


def test_k3_is_never_negative_and_never_infinite():
    difference = torch.linspace(-1000, 1000, 4001)[None]
    for kind in ("k3", "k3+"):
        estimate = kl_estimate(difference, torch.zeros_like(difference), kind)
        assert estimate.isfinite().all()
        assert (estimate >= 0).all()
    assert kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k3").item() == 0.0


def test_k3_keeps_its_digits_near_zero():
    # d = 1e-4: d²/2 - d³/6 = 4.99983e-9, lost in float32 by exp(-d) - 1 + d
    tiny = kl_estimate(torch.tensor([[1e-4]]), torch.zeros(1, 1), "k3").item()
    assert tiny == pytest.approx(4.99983e-9, rel=2e-3)


def test_leaving_the_reference_costs_reward_on_action_tokens_only():
    # kl = .2, -.1, .1 nats at .05 a nat; the score stands on the last action token.
    logprobs = torch.tensor([[-1.0, -0.5, -0.2, 3.0]], requires_grad=True)
    reference = torch.tensor([[-1.2, -0.4, -0.3, -7.0]])
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    shaped = kl_shaped_rewards(rewards, logprobs, reference, mask, coef=0.05, kind="k1")
    torch.testing.assert_close(shaped, torch.tensor([[-0.01, 0.005, 0.995, 0.0]]))
    assert not shaped.requires_grad


def test_an_unknown_estimator_is_named():
    with pytest.raises(Exception, match="k4"):  # ValueError; a type error under run-time checks
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")
