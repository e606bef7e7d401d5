"""Every kind of head: says any mean at the start, learns towards the return, rests there, counts what it cannot say."""

import dataclasses
import math

import pytest
import torch

from llmac.core.categorical_heads import C51, HLGauss, OutcomeClasses, TwoHot
from llmac.core.distributions import gaussian_mass, open_with_mean, two_hot
from llmac.core.value_heads import (
    OUTSIDE,
    Bernoulli,
    Gaussian,
    Lesson,
    Quantile,
    Scalar,
    same_outputs,
)

HEADS = {
    "scalar": Scalar(),
    "huber": Scalar(loss="huber", clip=0.2, clip_combine="mean"),
    "bounded": Scalar(bounds=(-0.5, 1.5)),
    "bernoulli": Bernoulli(),
    "hl_gauss": HLGauss(),
    "density": HLGauss(target="density"),
    "two_hot": TwoHot(),
    "c51": C51(lam=0.9),
    "quantile": Quantile(),
    "gaussian": Gaussian(),
    "pessimistic": Gaussian(pessimism=0.5),
    "outcome_classes": OutcomeClasses(rewards=(0.0, 0.25, 1.0)),
}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


def lesson(returns, *, old=None, unit=1.0):
    """One response of as many tokens as there are returns, whose last token has the reward."""
    returns = torch.tensor([returns])
    rewards = torch.zeros_like(returns)
    rewards[0, -1] = returns[0, -1]
    return Lesson(
        returns=returns,
        old_values=returns if old is None else torch.tensor([old]),
        mask=torch.ones_like(returns, dtype=torch.bool),
        rewards=rewards,
        bootstraps=torch.tensor([False]),
        unit=unit,
    )


def says(head, mean, states):
    return head.start(mean).expand(1, states, head.outputs).clone()


@every_head
@pytest.mark.parametrize("mean", [0.05, 0.4, 0.93])
def test_an_untrained_head_can_say_any_mean(head, mean):
    raw = head.start(mean)
    assert raw.shape == (head.outputs,)
    assert raw.dtype == torch.float32
    assert float(head.decode(raw)) == pytest.approx(mean, abs=2e-6)


@every_head
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_a_mean_at_the_end_of_the_rewards_is_said_almost(head, mean):
    assert float(head.decode(head.start(mean))) == pytest.approx(mean, abs=0.0125)
    assert torch.isfinite(head.start(mean)).all()


@every_head
@pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
def test_a_step_down_the_gradient_moves_the_value_towards_the_return(head, target):
    raw = says(head, 0.6, 3).requires_grad_()
    head.learn(raw, lesson([target, target], old=[0.6, 0.6])).per_token.sum().backward()
    after = head.decode((raw - 1e-2 * raw.grad).detach())
    # All of them at once, and for c51 above all the last one, which is bootstrapped from nothing.
    moved = (after - 0.6)[0, 1]
    assert float(moved) * (target - 0.6) > 0
    assert raw.grad[0, 2].abs().sum() == 0  # the state behind the end learns nothing


@pytest.mark.parametrize(
    ("head", "raw"),
    [
        (Scalar(), torch.tensor([0.8])),
        (Scalar(loss="huber"), torch.tensor([0.8])),
        (Scalar(bounds=(0.0, 1.0)), torch.tensor([math.tan(math.pi * 0.3)])),
        (Bernoulli(), torch.tensor([math.log(4.0)])),
        (HLGauss(), gaussian_mass(torch.tensor(0.8), torch.linspace(-0.1, 1.1, 102), sigma=0.024)),
        (TwoHot(bins=5), two_hot(torch.tensor(0.8), torch.linspace(0, 1, 5))),
        (C51(bins=5), two_hot(torch.tensor(0.8), torch.linspace(0, 1, 5))),
        (Quantile(kappa=0.1), torch.full((32,), 0.8)),
        (
            OutcomeClasses(rewards=(0.0, 0.5, 1.0)),
            two_hot(torch.tensor(0.8), torch.tensor([0.0, 0.5, 1.0])),
        ),
    ],
    ids=lambda x: x.kind if hasattr(x, "kind") else "",
)
def test_the_gradient_is_zero_at_the_target_and_the_target_says_the_return(head, raw):
    if head.outputs > 1 and head.kind != "quantile":
        raw = raw.clamp(min=1e-30).log()
    assert float(head.decode(raw)) == pytest.approx(0.8, abs=1e-5)
    raw = raw.expand(1, 2, head.outputs).clone().requires_grad_()
    head.learn(raw, lesson([0.8])).per_token.sum().backward()
    assert raw.grad.abs().max() < 1e-5


def test_c51_learns_half_from_what_it_says_next_and_half_from_what_came():
    raw = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = C51(bins=5, lam=0.5).learn(raw, lesson([1.0, 1.0])).per_token
    next_says = raw[0, 1].detach().softmax(-1)
    came = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    expected = -((0.5 * next_says + 0.5 * came) * raw[0, 0].log_softmax(-1)).sum()
    torch.testing.assert_close(loss[0, 0], expected)
    loss[0, 0].backward()
    assert raw.grad[0, 1].abs().sum() == 0  # a target is constant


def test_returns_a_head_cannot_say_are_counted_and_taken_as_the_nearest():
    bounded = [
        Scalar(bounds=(0.0, 1.0)),
        Bernoulli(),
        HLGauss(),
        TwoHot(),
        OutcomeClasses(rewards=(0.0, 1.0)),
    ]
    for head in bounded:
        raw = says(head, 0.5, 4)
        low, high = (-0.1, 1.1) if head.kind == "hl_gauss" else (0.0, 1.0)
        found = head.learn(raw, lesson([low - 1.0, high + 1.0, 0.5]))
        assert found.shares[OUTSIDE].tolist() == [[True, True, False]]
        nearest = head.learn(raw, lesson([low, high, 0.5]))
        assert nearest.shares[OUTSIDE].tolist() == [[False, False, False]]
        torch.testing.assert_close(found.per_token, nearest.per_token)
    for head in (Scalar(), Quantile(), Gaussian()):
        assert OUTSIDE not in head.learn(says(head, 0.5, 2), lesson([9.0])).shares


def test_rounding_does_not_count_as_outside():
    found = TwoHot().learn(says(TwoHot(), 0.5, 2), lesson([1.0 + 1e-6]))
    assert not found.shares[OUTSIDE].any()


def test_bernoulli_and_bins_work_on_any_range():
    bernoulli = Bernoulli(low=-2.0, high=6.0)
    assert float(bernoulli.decode(torch.tensor([0.0]))) == 2.0
    # G = 0 is a chance of .25
    loss = bernoulli.learn(torch.full((1, 2, 1), 0.4), lesson([0.0])).per_token
    assert float(loss) == pytest.approx(0.813015, abs=1e-6)
    gauss = HLGauss(low=-12.0, high=12.0, sigma=0.48)
    assert float(gauss.decode(gauss.start(-7.0))) == pytest.approx(-7.0, abs=1e-4)


@pytest.mark.parametrize(
    ("head", "old", "new", "target", "expected", "moved"),
    [
        (Scalar(clip=0.2), 0.5, 1.2, 1.0, 0.045, True),
        (Scalar(clip=0.2), 0.5, 0.9, 0.0, 0.405, True),
        (Scalar(clip=0.2), 0.5, 0.65, 1.0, 0.06125, False),
        (Scalar(clip=0.5), 0.5, 1.2, 1.0, 0.02, True),
        (Scalar(clip=0.2, clip_combine="mean", loss="huber"), 0.5, 0.9, 0.0, 0.275, True),
    ],
)
def test_a_scalar_head_has_the_clipped_loss_of_the_cards(head, old, new, target, expected, moved):
    found = head.learn(torch.full((1, 2, 1), new), lesson([target], old=[old]))
    assert float(found.per_token) == pytest.approx(expected)
    assert found.shares["critic/vf_clipfrac"].item() is moved


def test_errors_are_measured_in_the_unit_of_the_lesson():
    raw = torch.full((1, 2, 1), 3.0)
    # ½ · ((3 - 1) / 4)² = .125
    assert float(Scalar().learn(raw, lesson([1.0], unit=4.0)).per_token) == pytest.approx(0.125)


def test_a_pessimistic_head_says_less_than_the_mean_by_its_deviation():
    # r = 0, γ = 1, μ = .7, σ = .2, β = .5 -> .6
    head = Gaussian(pessimism=0.5, smallest_deviation=0.05)
    raw = torch.tensor([0.7, math.log(math.expm1(0.15))])
    assert float(head.deviation(raw)) == pytest.approx(0.2)
    assert float(head.decode(raw)) == pytest.approx(0.6)


def test_outcome_classes_are_a_softmax_over_what_happened():
    # CodeRL's loss on four tokens in numbers: probability of the true class at each token, and of the largest
    # logits over time.
    logits = torch.tensor([[1.0, 0, 2, -1], [0, 0, 2.5, 0], [-1, 0, 3, 1]])
    head = OutcomeClasses()
    q = logits.softmax(-1)[:, 2]
    assert q.tolist() == pytest.approx([0.64391, 0.80240, 0.83095], abs=1e-5)
    raw = torch.cat([logits, logits[-1:]])[None]
    loss = head.learn(raw, lesson([-0.3, -0.3, -0.3])).per_token
    assert loss[0].exp().reciprocal().tolist() == pytest.approx(q.tolist())
    pooled = logits.amax(0).expand(1, 2, 4)
    assert float(head.learn(pooled, lesson([-0.3])).per_token) == pytest.approx(0.27798, abs=1e-5)
    values = head.decode(logits)
    assert values[0] == pytest.approx(
        float((logits[0].softmax(-1) * torch.tensor(head.rewards)).sum())
    )


def test_which_heads_can_go_on_with_whose_weights():
    assert same_outputs(HLGauss(), HLGauss(sigma=0.05, target="density"))
    assert not same_outputs(HLGauss(), HLGauss(bins=51))
    assert not same_outputs(TwoHot(), C51(bins=101))
    assert not same_outputs(Scalar(), Scalar(bounds=(0.0, 1.0)))


@every_head
def test_what_the_outputs_mean_is_among_the_fields(head):
    names = {field.name for field in dataclasses.fields(head)}
    assert set(head.foretells) <= names


def test_a_smoothed_head_agrees_with_an_exact_one_on_a_coin():
    """The best softmax for returns of 1 in 30 % of cases says .3, smoothed or not."""
    for head, lr in ((HLGauss(), 20.0), (TwoHot(bins=11), 2.0)):
        raw = head.start(0.6).expand(1, 11, -1).clone()[:, :1].requires_grad_()
        returns = [1.0] * 3 + [0.0] * 7
        for _ in range(60):
            full = raw.expand(1, 11, head.outputs)
            (gradient,) = torch.autograd.grad(
                head.learn(full, lesson(returns)).per_token.mean(), raw
            )
            raw = (raw - lr * gradient).detach().requires_grad_()
        assert float(head.decode(raw.detach())) == pytest.approx(0.3, abs=0.02)


def test_an_even_start_is_known_from_the_atoms_alone():
    torch.testing.assert_close(
        TwoHot(bins=3).start(0.25), open_with_mean(0.25, torch.tensor([0.0, 0.5, 1.0]))
    )


@pytest.mark.parametrize("bootstraps", [False, True])
def test_c51_puts_behind_a_cut_response_what_the_returns_put_there(bootstraps):
    raw = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0))
    about = dataclasses.replace(lesson([0.0]), bootstraps=torch.tensor([bootstraps]), gamma=1.0)
    loss = C51(bins=5, lam=1.0).learn(raw, about).per_token[0, 0]
    behind = raw[0, 1].softmax(-1) if bootstraps else torch.eye(5)[0]
    torch.testing.assert_close(loss, -(behind * raw[0, 0].log_softmax(-1)).sum())


def test_c51_discounts_as_the_returns_do():
    raw = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    about = dataclasses.replace(lesson([0.5, 1.0]), gamma=0.5)
    loss = C51(bins=5, lam=1.0).learn(raw, about).per_token[0]
    torch.testing.assert_close(loss, -raw[0, :2].log_softmax(-1)[[0, 1], [2, 4]])


@pytest.mark.parametrize("width", [1e-3, 1.0, 2000.0, 1e6])
def test_a_gaussian_head_starts_on_any_width_of_returns(width):
    head = Gaussian(smallest_deviation=0.05 * width, first_deviation=0.5 * width)
    raw = head.start(0.3 * width)
    assert float(head.decode(raw)) == pytest.approx(0.3 * width)
    assert float(head.deviation(raw)) == pytest.approx(0.5 * width)
