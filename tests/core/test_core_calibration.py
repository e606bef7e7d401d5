"""Error, bias, calibration and ranking of values against a truth that is known."""

import itertools
import math

import pytest
import torch

from llmac.core.calibration import (
    CalibrationCurve,
    bias,
    calibration_curve,
    expected_calibration_error,
    mean_squared_error,
    percentile_interval,
    ranking_auc,
    resamples,
    variance_explained,
)
from llmac.core.diagnostics import explained_variance

ONE = torch.ones(4)
PREDICTIONS, OUTCOMES = torch.tensor([0.9, 0.6, 0.2, 0.4]), torch.tensor([1.0, 0.0, 0.0, 1.0])


def world(states=400, rollouts=64, seed=0):
    """Chances of success, and the outcomes of `rollouts` continuations of each state."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(states, generator=generator)
    outcomes = (torch.rand(states, rollouts, generator=generator) < chance[:, None]).float()
    return chance, outcomes


def test_the_four_predictions_of_the_card():
    # Errors -.1, .6, .2, -.6: squares .01 + .36 + .04 + .36 = .77, /4 = .1925.
    # Their mean is .025, so Var = .1925 - .000625 = .191875, and EV = 1 - .191875 / .25 = .2325.
    assert float(mean_squared_error(PREDICTIONS, OUTCOMES, ONE)) == pytest.approx(0.1925)
    assert float(variance_explained(PREDICTIONS, OUTCOMES, ONE)) == pytest.approx(0.2325)
    assert float(bias(PREDICTIONS, OUTCOMES, ONE)) == pytest.approx(0.025)


def test_the_seven_scores_of_the_card():
    # Group 1: 1 success above 2 failures, 2 of 2 pairs. Group 2: .2 and .6 against .6 and .1 is 0, 1, .5, 1 of 4.
    values = torch.tensor([0.9, 0.8, 0.3, 0.2, 0.6, 0.6, 0.1])
    labels = torch.tensor([1.0, 0, 0, 1, 1, 0, 0])
    group = torch.tensor([5, 5, 5, 2, 2, 2, 2])
    first, second = group == 5, group == 2

    def auc(rows):
        label = labels[rows]
        return float(
            ranking_auc(values[rows], label, 1 - label, group[rows], torch.ones(len(label)))
        )

    assert auc(first) == pytest.approx(1.0)
    assert auc(second) == pytest.approx(0.625)
    assert auc(first | second) == pytest.approx((3 * 1.0 + 4 * 0.625) / 7)  # .785714


@pytest.mark.parametrize("grouped", [False, True])
def test_the_auc_counts_pairs(grouped):
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(5, (30,), generator=generator).float()  # with many ties
    won = torch.randint(4, (30,), generator=generator).float()
    lost = torch.randint(4, (30,), generator=generator).float()
    group = torch.arange(30) % (3 if grouped else 1)
    total = size = 0.0
    for g in group.unique():
        rows = (group == g).nonzero().flatten().tolist()
        pairs = [(i, j) for i in rows for j in rows]
        right = sum(
            float(won[i] * lost[j]) * ((values[i] > values[j]) + 0.5 * (values[i] == values[j]))
            for i, j in pairs
        )
        total += len(rows) * float(right / (won[rows].sum() * lost[rows].sum()))
        size += len(rows)
    found = ranking_auc(values, won, lost, group, torch.ones(30))
    assert float(found) == pytest.approx(total / size)


def test_a_group_with_one_outcome_says_nothing_about_ranking():
    values, labels = torch.tensor([0.9, 0.1, 0.5, 0.6]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    group = torch.tensor([0, 0, 1, 1])
    assert float(ranking_auc(values, labels, 1 - labels, group, ONE)) == 1.0
    assert math.isnan(float(ranking_auc(values, ONE, 0 * ONE, group, ONE)))


def test_knowing_only_the_prompt_ranks_across_and_not_within():
    # Prompt 0 is solved three times in four, prompt 1 once in four; the value is that of the prompt.
    prompt = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    labels = torch.tensor([1.0, 1, 1, 0, 1, 0, 0, 0])
    values = torch.where(prompt == 0, 0.75, 0.25)
    across = ranking_auc(values, labels, 1 - labels, torch.zeros_like(prompt), torch.ones(8))
    within = ranking_auc(values, labels, 1 - labels, prompt, torch.ones(8))
    assert float(across) == pytest.approx((3 * 3 + 0.5 * (3 * 1 + 1 * 3)) / 16)
    assert float(within) == 0.5


def test_a_weight_is_a_multiplicity():
    generator = torch.Generator().manual_seed(0)
    values, truth = torch.rand(2, 12, generator=generator)
    group = torch.arange(12) % 3
    count = torch.randint(0, 3, (12,), generator=generator)
    repeated = torch.arange(12).repeat_interleave(count)

    def measures(v, t, g, w):
        curve = calibration_curve(v, t, w, low=0.0, high=1.0, bins=4)
        return [
            bias(v, t, w),
            mean_squared_error(v, t, w),
            variance_explained(v, t, w),
            expected_calibration_error(curve),
            ranking_auc(v, t, 1 - t, g, w),
        ]

    weighted = measures(values, truth, group, count.float())
    whole = measures(values[repeated], truth[repeated], group[repeated], torch.ones(len(repeated)))
    assert [float(x) for x in weighted] == pytest.approx([float(x) for x in whole], rel=1e-5)
    batched = measures(values, truth, group, torch.stack([count.float(), torch.ones(12)]))
    assert [float(x[0]) for x in batched] == pytest.approx([float(x) for x in whole], rel=1e-5)


def test_explained_variance_is_the_one_of_training():
    mask = torch.ones(1, 4, dtype=torch.bool)
    training = explained_variance(PREDICTIONS[None], OUTCOMES[None], mask)
    assert float(variance_explained(PREDICTIONS, OUTCOMES, ONE)) == pytest.approx(float(training))


def test_exact_values_are_found_exact_up_to_the_noise_of_the_truth():
    chance, outcomes = world()
    truth, weight = outcomes.mean(1), torch.ones(400)
    noise = outcomes.var(1) / 64
    mse = float(mean_squared_error(chance, truth, weight))
    assert mse == pytest.approx(1 / 6 / 64, rel=0.2)  # E[p(1-p)] of uniform p is 1/6
    corrected = float(mean_squared_error(chance, truth, weight, noise=-noise))
    assert abs(corrected) < 0.1 * mse
    assert float(variance_explained(chance, truth, weight)) > 0.95
    assert float(variance_explained(chance, truth, weight, noise=-noise)) == pytest.approx(
        1.0, abs=0.005
    )


def test_the_noise_correction_finds_the_error_of_wrong_values():
    chance, outcomes = world(states=4000, rollouts=4)
    wrong = chance + 0.1
    truth, weight = outcomes.mean(1), torch.ones(4000)
    raw = float(mean_squared_error(wrong, truth, weight))
    corrected = float(mean_squared_error(wrong, truth, weight, noise=-outcomes.var(1) / 4))
    assert raw == pytest.approx(0.01 + 1 / 6 / 4, abs=0.003)
    assert corrected == pytest.approx(0.01, abs=0.003)


def test_measures_against_single_outcomes_are_those_of_the_flat_list():
    chance, outcomes = world(states=20, rollouts=8)
    truth, weight = outcomes.mean(1), torch.ones(20)
    spread = outcomes.var(1, unbiased=False)
    flat, every = chance.repeat_interleave(8), outcomes.flatten()
    ones = torch.ones(160)
    for measure in (mean_squared_error, variance_explained):
        assert float(measure(chance, truth, weight, noise=spread)) == pytest.approx(
            float(measure(flat, every, ones)), rel=1e-4
        )


def test_a_constant_explains_nothing_and_a_shift_is_bias_and_error():
    _, outcomes = world()
    truth, weight = outcomes.mean(1), torch.ones(400)
    constant = torch.full((400,), 0.4)
    assert float(variance_explained(constant, truth, weight)) == pytest.approx(0.0, abs=1e-5)
    labels = outcomes.sum(1)
    everyone = torch.zeros(400, dtype=torch.long)
    assert float(ranking_auc(constant, labels, 64 - labels, everyone, weight)) == 0.5
    shifted = truth - 0.2
    assert float(bias(shifted, truth, weight)) == pytest.approx(-0.2)
    assert float(mean_squared_error(shifted, truth, weight)) == pytest.approx(0.04)
    assert float(variance_explained(shifted, truth, weight)) == pytest.approx(1.0)


def test_calibration_averages_luck_within_a_bin_and_not_over_bins():
    values = torch.tensor([0.25, 0.25, 0.75, 0.75])
    weight = torch.ones(4)

    def ece(truth):
        curve = calibration_curve(values, truth, weight, low=0.0, high=1.0, bins=2)
        return float(expected_calibration_error(curve))

    assert ece(torch.tensor([0.0, 0.5, 0.5, 1.0])) == 0.0
    assert ece(torch.tensor([0.5, 0.5, 0.5, 0.5])) == 0.25


def test_values_beyond_the_range_count_in_the_outer_bins():
    values, truth = torch.tensor([-3.0, 1.0, 7.0]), torch.tensor([0.0, 1.0, 1.0])
    curve = calibration_curve(values, truth, torch.ones(3), low=0.0, high=1.0, bins=4)
    assert curve.weight.tolist() == [1.0, 0.0, 0.0, 2.0]
    assert curve.value[-1] == 4.0
    assert math.isnan(float(curve.value[1]))
    # (|-3 - 0| + 2·|4 - 1|) / 3
    assert float(expected_calibration_error(curve)) == pytest.approx(3.0)
    alike = calibration_curve(values, 0 * truth, torch.ones(3), low=0.0, high=0.0, bins=4)
    assert alike.weight.tolist() == [3.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="bins = 0"):
        calibration_curve(values, truth, torch.ones(3), low=0.0, high=1.0, bins=0)


def test_nothing_to_judge_is_undefined_and_not_zero():
    empty = torch.zeros(4)
    assert math.isnan(float(mean_squared_error(PREDICTIONS, OUTCOMES, empty)))
    assert math.isnan(float(variance_explained(PREDICTIONS, OUTCOMES, empty)))
    curve = CalibrationCurve(value=empty, truth=empty, weight=empty)
    assert math.isnan(float(expected_calibration_error(curve)))


def test_resampling_draws_whole_clusters():
    cluster = torch.tensor([3, 3, 8, 8, 8, 5])
    counts = resamples(cluster, 2000, torch.Generator().manual_seed(0))
    assert torch.equal(counts[:, 0], counts[:, 1])
    assert torch.equal(counts[:, 2], counts[:, 4])
    clusters = counts[:, [0, 2, 5]]
    assert clusters.sum(1).unique().tolist() == [3.0]
    assert clusters.mean(0).tolist() == pytest.approx([1.0] * 3, abs=0.05)
    # The count of one of three clusters in three draws has variance 3 · 1/3 · 2/3.
    assert clusters.var(0).tolist() == pytest.approx([2 / 3] * 3, abs=0.06)


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        # 40 clusters of 3 equal errors: taken for 120 independent ones, the interval would be too short.
        errors = torch.randn(40, generator=generator).repeat_interleave(3)
        counts = resamples(torch.arange(40).repeat_interleave(3), 300, generator)
        low, high = percentile_interval(bias(errors, torch.zeros(120), counts))
        covered += low <= 0.0 <= high
    assert 180 <= covered <= 199


def test_an_interval_of_mostly_undefined_resamples_is_undefined():
    samples = torch.tensor([1.0, 2.0, math.nan, math.nan, math.nan])
    assert all(map(math.isnan, percentile_interval(samples)))
    low, high = percentile_interval(torch.tensor([1.0, 2.0, 3.0, math.nan]))
    assert (low, high) == (pytest.approx(1.05), pytest.approx(2.95))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_the_order_of_states_does_not_matter(order):
    order = torch.tensor(order)
    group = torch.tensor([0, 1, 0, 1])
    before = ranking_auc(PREDICTIONS, OUTCOMES, 1 - OUTCOMES, group, ONE)
    after = ranking_auc(PREDICTIONS[order], OUTCOMES[order], 1 - OUTCOMES[order], group[order], ONE)
    assert float(before) == float(after) == 0.5  # .9 > .2 is right, .4 > .6 is not
