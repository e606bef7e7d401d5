"""Several heads, one value; and running moments."""

import math

import pytest
import torch

from llmac.core.ensembles import Combination, soft_min, spread
from llmac.core.moments import Moments


@pytest.mark.parametrize(
    ("pair", "expected"),
    [((1.0, 1.0), 1.0), ((1.0, 0.0), 0.197428), ((2.0, -1.0), -0.792069), ((0.5, 0.4), 0.445852)],
)
def test_soft_min(pair, expected):
    assert float(soft_min(torch.tensor(pair), temperature=0.3)) == pytest.approx(expected, abs=1e-5)


def test_soft_min_lies_between_the_smallest_and_a_bound_and_pulls_on_the_smallest():
    # gradient weight .965555 on the smaller of (1, 0), bound α·ln 2 = .207944
    values = torch.tensor([1.0, 0.0], requires_grad=True)
    soft_min(values, temperature=0.3).backward()
    assert values.grad.tolist() == pytest.approx([1 - 0.965555, 0.965555], abs=1e-6)
    assert 0.3 * math.log(2) == pytest.approx(0.207944, abs=1e-6)
    many = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    above = soft_min(many, temperature=0.3) - many.amin(-1)
    assert (above >= -1e-6).all()
    assert (above <= 0.3 * math.log(4) + 1e-6).all()


@pytest.mark.parametrize(
    ("how", "expected"), [("min", 0.5), ("mean", 0.6), ("min_max", 0.55), ("soft_min", 0.583584)]
)
def test_two_heads_become_one_value(how, expected):
    # soft-min: -.3 · ln((e^(-.7/.3) + e^(-.5/.3)) / 2) = .583584
    assert float(Combination(how=how)(torch.tensor([0.7, 0.5]))) == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize("how", ["min", "mean", "min_max", "soft_min"])
def test_heads_that_agree_say_what_they_say_and_their_order_does_not_matter(how):
    combine = Combination(how=how)
    assert combine(torch.full((3, 5), 0.4)).tolist() == pytest.approx([0.4] * 3)
    values = torch.tensor([0.1, 0.9, 0.4])
    assert float(combine(values)) == pytest.approx(float(combine(values.flip(0))))


def test_the_spread_is_largest_minus_smallest():
    assert spread(torch.tensor([[0.1, 0.9, 0.4], [2.0, 2.0, 2.0]])).tolist() == pytest.approx(
        [0.8, 0]
    )


def everything(x):
    return torch.ones_like(x, dtype=torch.bool)


def test_the_first_batch_decides_the_running_moments():
    batch = torch.tensor([1.0, 2.0, 3.0])
    after = Moments().after(batch, everything(batch))
    assert (after.mean, after.variance) == pytest.approx((1.999933, 1.000133), abs=1e-6)
    white = (batch - after.mean) / after.deviation
    assert white.tolist() == pytest.approx([-0.999867, 0.000067, 1.0], abs=1e-4)


def test_moments_of_parts_are_those_of_the_whole_with_bessels_correction_per_part():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 3 + 7
    moments = Moments()
    for part in x.split(100):
        moments = moments.after(part, everything(part))
    assert moments.mean == pytest.approx(float(x.mean()), rel=1e-4)
    assert moments.variance == pytest.approx(float(x.var()), rel=2e-2)
    assert moments.count == pytest.approx(1000)


def test_moments_do_not_see_what_does_not_count():
    x, mask = torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False])
    assert Moments().after(x, mask) == Moments().after(x[:2], mask[:2])
    assert Moments().after(x, torch.zeros_like(mask)) == Moments()
