"""Masked statistics and the four ways to average a loss."""

import math

import pytest
import torch

from llmac.core.masking import aggregate, aggregation_weight, masked_mean, masked_var, whiten

HOWS = [
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_sum_norm",
]


def test_mean_and_variance_see_only_what_counts():
    x = torch.tensor([[1.0, math.nan], [4.0, math.inf]])
    mask = torch.tensor([[True, False], [True, False]])
    assert masked_mean(x, mask).item() == 2.5  # (1 + 4) / 2
    assert masked_var(x, mask).item() == 4.5  # (1.5² + 1.5²) / 1
    assert masked_var(x, mask, unbiased=False).item() == 2.25  # / 2


def test_the_mean_of_nothing_is_zero():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.full((2, 3), math.nan)
    assert masked_mean(x, nothing).item() == 0.0
    assert masked_var(x, nothing).item() == 0.0
    assert torch.equal(whiten(x, nothing), torch.zeros(2, 3))


def test_whitening_matches_hand_computed_advantages():
    advantages = torch.tensor([[0.7655, 0.49, 0.2]])  # mean .485167, unbiased std .282781
    mask = torch.ones(1, 3, dtype=torch.bool)
    unbiased = torch.tensor([[0.991344, 0.017092, -1.008436]])
    biased = torch.tensor([[1.214144, 0.020934, -1.235077]])
    torch.testing.assert_close(whiten(advantages, mask), unbiased, rtol=0, atol=2e-6)
    torch.testing.assert_close(whiten(advantages, mask, unbiased=False), biased, rtol=0, atol=2e-6)


def test_whitening_after_padding_matches_hand_computed_advantages():
    # mean .630554, unbiased std .334079, padding stays 0
    advantages = torch.tensor([[0.789912, 0.73675, 0.665, 0.6, 0.0]])
    mask = torch.tensor([[True, True, True, False, False]])
    expected = torch.tensor([[0.946909, 0.098839, -1.045748, 0.0, 0.0]])
    torch.testing.assert_close(whiten(advantages, mask), expected, rtol=0, atol=2e-5)


def test_whitened_elements_have_mean_zero_and_variance_one():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 40
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    white = whiten(x, mask)
    assert abs(masked_mean(white, mask).item()) < 1e-6
    assert masked_var(white, mask).item() == pytest.approx(1.0, abs=1e-5)
    assert (white[~mask] == 0).all()
    torch.testing.assert_close(whiten(5 * x - 3, mask), white, rtol=0, atol=1e-4)


def test_without_centering_the_mean_survives_whitening():
    x, mask = torch.tensor([[9.0, 11.0, 0.0]]), torch.tensor([[True, True, False]])
    # std √2, so 10 ± 1/√2
    expected = torch.tensor([[10 - 0.5**0.5, 10 + 0.5**0.5, 0.0]])
    torch.testing.assert_close(whiten(x, mask, center=False), expected)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.3, 1e6 + 0.1])
def test_equal_elements_whiten_to_exactly_zero(value):
    x = torch.full((9, 11), value)
    assert torch.equal(whiten(x, torch.ones_like(x, dtype=torch.bool)), torch.zeros_like(x))


def test_a_single_element_whitens_to_zero():
    mask = torch.tensor([[False, True]])
    assert torch.equal(whiten(torch.tensor([[3.0, 5.0]]), mask), torch.zeros(1, 2))


def test_statistics_over_ranks_equal_those_of_one_process():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    together = whiten(x, mask)
    here, there = slice(0, 1), slice(1, 6)

    def both_ranks(part):
        """Each rank's partial sums are [mean terms], then [squares around the global mean]."""
        mean = masked_mean(x, mask)
        other = there if part == here else here
        stages = iter(
            [
                torch.stack([x[other].where(mask[other], 0.0).sum(), mask[other].sum().double()]),
                torch.stack(
                    [
                        (x[other] - mean).square().where(mask[other], 0.0).sum(),
                        mask[other].sum().double(),
                    ]
                ),
            ]
        )
        return lambda partial: partial + next(stages)

    for part in (here, there):
        apart = whiten(x[part], mask[part], sum_across=both_ranks(part))
        torch.testing.assert_close(apart, together[part], rtol=0, atol=1e-12)


def test_reinforce_plus_plus_numbers_follow_from_whitening():
    # Rewards [1,1,0,0 | 1,0,0,0] of responses with these lengths, reward of each at all its tokens.
    lengths = torch.tensor([2, 4, 3, 1, 4, 2, 2, 3])
    mask = torch.arange(4) < lengths[:, None]
    outcome = torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 0])[:, None].expand(8, 4)
    white = whiten(outcome, mask)[:, 0]
    expected = torch.where(outcome[:, 0] > 0, 1.023533, -0.930484)
    torch.testing.assert_close(white, expected, rtol=0, atol=2e-6)

    centred = outcome - torch.tensor([0.5] * 4 + [0.25] * 4)[:, None]
    baseline = torch.tensor(
        [0.789958, 0.789958, -1.220844, -1.220844, 1.292658, -0.718143, -0.718143, -0.718143]
    )
    torch.testing.assert_close(whiten(centred, mask)[:, 0], baseline, rtol=0, atol=2e-6)
    biased = torch.tensor(
        [0.809466, 0.809466, -1.250992, -1.250992, 1.32458, -0.735878, -0.735878, -0.735878]
    )
    torch.testing.assert_close(
        whiten(centred, mask, unbiased=False)[:, 0], biased, rtol=0, atol=2e-6
    )


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token_mean", 1.25),  # 5 / 4
        ("sequence_mean_token_mean", 1.5),  # (2/1 + 3/3) / 2
        ("sequence_mean_token_sum", 2.5),  # (2 + 3) / 2
        ("sequence_mean_token_sum_norm", 0.833333),  # 2.5 / 3
    ],
)
def test_aggregations_of_two_unequal_responses(how, expected):
    loss = torch.tensor([[2.0, math.nan, math.nan], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    total, weight = aggregate(loss, mask, how, horizon=3)
    assert (total / weight).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("how", "horizon", "expected"),
    [
        ("token_mean", 3, 0.297057),
        ("sequence_mean_token_sum", 3, 0.742643),
        ("sequence_mean_token_sum_norm", 3, 0.247548),
        ("sequence_mean_token_sum_norm", 8, 0.092830),
        ("sequence_mean_token_mean", 3, 0.065478),
    ],
)
def test_aggregations_of_clipped_losses(how, horizon, expected):
    loss = torch.tensor([[-1.28, -0.904837, 0.0], [1.648721, 0.8, 1.221403]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    total, weight = aggregate(loss, mask, how, horizon=horizon)
    assert (total / weight).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_totals_and_weights_of_any_split_add_up(how):
    generator = torch.Generator().manual_seed(3)
    loss = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 0, 1, 3, 2, 0, 4])[:, None]
    whole, weight = aggregate(loss, mask, how, horizon=9)
    assert weight == aggregation_weight(mask, how)
    for cuts in ([7], [1, 6], [2, 3, 2], [1] * 7):
        parts = [
            aggregate(part, part_mask, how, horizon=9)
            for part, part_mask in zip(loss.split(cuts), mask.split(cuts), strict=True)
        ]
        torch.testing.assert_close(sum(total for total, _ in parts), whole)
        assert sum(weight for _, weight in parts) == weight


@pytest.mark.parametrize("how", HOWS)
def test_padding_changes_no_aggregate(how):
    loss = torch.tensor([[2.0, 1.0], [3.0, 5.0]])
    mask = torch.tensor([[True, False], [True, True]])
    wider = torch.cat([loss, torch.full((2, 4), math.nan)], dim=1)
    wider_mask = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    assert aggregate(loss, mask, how, horizon=8) == aggregate(wider, wider_mask, how, horizon=8)


@pytest.mark.parametrize("how", HOWS)
def test_a_response_without_tokens_weighs_nothing(how):
    loss = torch.tensor([[2.0, 1.0], [3.0, 5.0]])
    mask = torch.tensor([[True, True], [False, False]])
    assert aggregate(loss, mask, how, horizon=2) == aggregate(loss[:1], mask[:1], how, horizon=2)
    empty = aggregate(loss[1:], mask[1:], how, horizon=2)
    assert [part.item() for part in empty] == [0.0, 0.0]


@pytest.mark.parametrize("how", HOWS)
def test_uncounted_tokens_get_no_gradient(how):
    loss = torch.ones(2, 3, requires_grad=True)
    mask = torch.tensor([[True, False, False], [True, True, False]])
    total, _ = aggregate(loss, mask, how, horizon=3)
    (gradient,) = torch.autograd.grad(total, loss)
    assert torch.equal(gradient != 0, mask)


@pytest.mark.parametrize("how", HOWS)
def test_half_precision_losses_keep_their_dtype(how):
    total, weight = aggregate(
        torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bool), how, horizon=2
    )
    assert total.dtype == weight.dtype == torch.bfloat16
