"""How far values are from the truth: error, bias, calibration and ranking, with confidence intervals.

A *judged state* has a value V and a truth: the mean outcome v of K continuations sampled from it. Every
measure takes one weight a state, [*b, N]; a bootstrap is the same measure with the multiplicities of
many resamples as weights. What is undefined (no weight, one outcome missing) is NaN, never 0.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number and the interval it is in with the confidence asked for."""

    value: float
    low: float
    """Lower end; NaN if there was nothing to resample."""
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationCurve:
    """What happened where the critic said so much: one entry a bin of V, in rising order."""

    value: Float[Tensor, "*b bins"]
    """Mean V of the bin; NaN where no state is."""
    truth: Float[Tensor, "*b bins"]
    """Mean truth of the bin; equal to `value` if the critic is calibrated."""
    weight: Float[Tensor, "*b bins"]
    """Weight of the states in the bin."""


def bias(
    values: Float[Tensor, "N"], truth: Float[Tensor, "N"], weight: Float[Tensor, "*b N"]
) -> Float[Tensor, "*b"]:
    """Mean value minus mean truth: positive, the critic over-estimates.

        bias = Σ w·(V - v) / Σ w

    >>> bias(torch.tensor([.5, .9]), torch.tensor([.25, .75]), torch.ones(2))
    tensor(0.2000)
    """
    return _mean(values - truth, weight)


def mean_squared_error(
    values: Float[Tensor, "N"],
    truth: Float[Tensor, "N"],
    weight: Float[Tensor, "*b N"],
    *,
    noise: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "*b"]:
    """Squared error of the values, plus what `noise` says about the truth.

        MSE = Σ w·((V - v)² + noise) / Σ w

    With K outcomes a state, v their mean and s² their variance, three numbers in one:

        noise = 0                     against the Monte-Carlo values
        noise = -s²/K, unbiased s²    against the true values: E[(V - v)²] = (V - E v)² + Var(v)
        noise = s², biased            against single outcomes; with outcomes 0 and 1 the Brier score

    Args:
        values: V.
        truth: v.
        weight: of each state; [*b, N] for many resamples at once.
        noise: variance added to (or, negative, taken off) each squared error.

    Returns:
        Unit of reward squared; may be negative with a negative `noise`.

    >>> predictions, outcomes = torch.tensor([.9, .6, .2, .4]), torch.tensor([1., 0., 0., 1.])
    >>> mean_squared_error(predictions, outcomes, torch.ones(4))
    tensor(0.1925)
    """
    squares = (values - truth).square()
    return _mean(squares if noise is None else squares + noise, weight)


def variance_explained(
    values: Float[Tensor, "N"],
    truth: Float[Tensor, "N"],
    weight: Float[Tensor, "*b N"],
    *,
    noise: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "*b"]:
    """Share of the variance of the truth that the critic foresaw; `noise` as in `mean_squared_error`.

        EV = 1 - (Var(v - V) + mean noise) / (Var(v) + mean noise)

    1 = perfect, 0 = no better than a constant, negative = worse. Against single outcomes even the
    exact values stay below 1, since luck cannot be foreseen.

    Returns:
        At most 1; 0 if the truth does not vary, since there is nothing to explain.

    >>> predictions, outcomes = torch.tensor([.9, .6, .2, .4]), torch.tensor([1., 0., 0., 1.])
    >>> variance_explained(predictions, outcomes, torch.ones(4))
    tensor(0.2325)
    """
    added = _mean(torch.zeros_like(truth) if noise is None else noise, weight)
    unexplained = _variance(truth - values, weight) + added
    variance = _variance(truth, weight) + added
    varies = variance > 1e-12
    share = 1.0 - unexplained / variance.where(varies, torch.ones_like(variance))
    share = share.where(varies, torch.zeros_like(share))
    return share.where(weight.sum(-1) > 0, torch.full_like(share, math.nan))


def calibration_curve(
    values: Float[Tensor, "N"],
    truth: Float[Tensor, "N"],
    weight: Float[Tensor, "*b N"],
    *,
    low: float,
    high: float,
    bins: int = 10,
) -> CalibrationCurve:
    """Mean truth of the states whose value is in each of `bins` equal parts of [low, high].

    Values outside the range count in the outer bins.

    Args:
        values: V.
        truth: v.
        weight: of each state.
        low: smallest outcome.
        high: largest outcome; if it is not above `low`, all states share one bin.
        bins: number of parts.

    >>> curve = calibration_curve(
    ...     torch.tensor([.1, .2, .9]), torch.tensor([0., .5, 1.]), torch.ones(3), low=0., high=1., bins=2)
    >>> curve.value, curve.truth, curve.weight
    (tensor([0.1500, 0.9000]), tensor([0.2500, 1.0000]), tensor([2., 1.]))
    """
    if bins < 1:
        raise ValueError(f"a calibration curve needs at least one bin, found bins = {bins}")
    place = torch.zeros_like(values, dtype=torch.int64)
    if high > low:
        place = ((values - low) / (high - low) * bins).floor().long().clamp(0, bins - 1)
    member = torch.nn.functional.one_hot(place, bins).to(values.dtype)
    count = weight @ member
    known = count > 0
    size = count.where(known, torch.ones_like(count))
    nothing = torch.full_like(count, math.nan)
    return CalibrationCurve(
        value=((weight * values) @ member / size).where(known, nothing),
        truth=((weight * truth) @ member / size).where(known, nothing),
        weight=count,
    )


def expected_calibration_error(curve: CalibrationCurve) -> Float[Tensor, "*b"]:
    """How far from the truth a value is, on average over bins, after luck within a bin has averaged out.

        ECE = Σ_bins share of the states · |mean V - mean truth|

    Naeini et al. 2015 (AAAI). 0 for a calibrated critic with many states; with few, noise within
    bins keeps it above 0, the more so the more bins.

    >>> curve = CalibrationCurve(value=torch.tensor([.15, .9]), truth=torch.tensor([.25, 1.]),
    ...                          weight=torch.tensor([2., 1.]))
    >>> expected_calibration_error(curve)
    tensor(0.1000)
    """
    gap = (curve.value - curve.truth).abs().nan_to_num(0.0)
    return (curve.weight * gap).sum(-1) / _or_nan(curve.weight.sum(-1))


def ranking_auc(
    values: Float[Tensor, "N"],
    successes: Float[Tensor, "N"],
    failures: Float[Tensor, "N"],
    group: Int[Tensor, "N"],
    weight: Float[Tensor, "*b N"],
) -> Float[Tensor, "*b"]:
    """Chance that a success has a higher value than a failure *of the same group*; ties count half.

        AUC_g = Σ_{i,j in g} p_i·n_j·([V_i > V_j] + ½[V_i = V_j]) / (Σ_g p · Σ_g n)
        AUC   = Σ_g size_g·AUC_g / Σ_g size_g

    .5 = no ranking at all. With one group for all it is the usual AUC, which a critic earns by
    knowing easy prompts from hard ones; with a group a prompt it must know good responses from bad
    ones. Groups in which one of the two outcomes is missing are left out.

    Args:
        values: V.
        successes: p, good outcomes seen from each state: 1 or 0 for a labelled state, the number of
            good continuations for one with many.
        failures: n, the others.
        group: same integer for states that are compared.
        weight: of each state; multiplies p, n and its part of the size.

    Returns:
        A probability; NaN if no group has both outcomes.

    >>> values = torch.tensor([.9, .8, .3, .2, .6, .6, .1])
    >>> labels, group = torch.tensor([1., 0., 0., 1., 1., 0., 0.]), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    >>> ranking_auc(values, labels, 1 - labels, group, torch.ones(7))
    tensor(0.7857)
    """
    total = torch.zeros_like(weight.sum(-1))
    size = torch.zeros_like(total)
    for member in _members(group):
        own = weight[..., member]
        auc = _auc(values[member], successes[member] * own, failures[member] * own)
        defined = ~auc.isnan()
        mine = own.sum(-1).where(defined, torch.zeros_like(total))
        total, size = total + mine * auc.nan_to_num(0.0), size + mine
    return total / _or_nan(size)


def resamples(
    cluster: Int[Tensor, "N"], draws: int, generator: torch.Generator
) -> Float[Tensor, "draws N"]:
    """Multiplicities of the states when whole clusters are drawn anew, with replacement.

    States of one prompt share its difficulty, and states of one response share its tokens; drawn one
    by one they would pretend to know more than they do.

    Args:
        cluster: same integer for states that depend on each other.
        draws: resamples.
        generator: source of randomness.

    >>> resamples(torch.tensor([0, 0]), 3, torch.Generator())
    tensor([[1., 1.],
            [1., 1.],
            [1., 1.]])
    """
    place = _places(cluster)
    clusters = int(place.max()) + 1
    drawn = torch.randint(clusters, (draws, clusters), generator=generator)
    count = torch.zeros(draws, clusters).scatter_add_(1, drawn, torch.ones(drawn.shape))
    return count[:, place]


def percentile_interval(
    samples: Float[Tensor, "draws"], *, confidence: float = 0.95
) -> tuple[float, float]:
    """The middle `confidence` of bootstrap samples; NaN twice if fewer than half of them are defined.

    >>> percentile_interval(torch.arange(101.), confidence=0.9)
    (5.0, 95.0)
    """
    known = samples[~samples.isnan()]
    if not known.numel() or 2 * known.numel() < samples.numel():
        return math.nan, math.nan
    low, high = (1 - confidence) / 2, (1 + confidence) / 2
    return float(torch.quantile(known, low)), float(torch.quantile(known, high))


def _auc(values: Tensor, successes: Tensor, failures: Tensor) -> Tensor:
    """Of one group, [*b]."""
    level = _places(values)
    shape = (*successes.shape[:-1], int(level.max()) + 1)
    index = level.expand(successes.shape)
    won = successes.new_zeros(shape).scatter_add(-1, index, successes)
    lost = failures.new_zeros(shape).scatter_add(-1, index, failures)
    below = lost.cumsum(-1) - lost
    pairs = won.sum(-1) * lost.sum(-1)
    return (won * (below + 0.5 * lost)).sum(-1) / _or_nan(pairs)


def _places(x: Tensor) -> Tensor:
    """Where each element stands among the distinct ones, in rising order."""
    ordered, index = torch.sort(x)
    place = torch.zeros_like(index)
    place[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(place).scatter_(0, index, place)


def _members(group: Tensor) -> Iterator[Tensor]:
    """A mask for each group."""
    place = _places(group)
    for index in range(int(place.max()) + 1):
        yield place == index


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    return (weight * x).sum(-1) / _or_nan(weight.sum(-1))


def _variance(x: Tensor, weight: Tensor) -> Tensor:
    """Two passes, so a large mean costs no precision."""
    return _mean((x - _mean(x, weight)[..., None]).square(), weight)


def _or_nan(x: Tensor) -> Tensor:
    return x.where(x > 0, torch.full_like(x, math.nan))
