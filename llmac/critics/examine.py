"""How good a critic is: what it says of states whose true values are known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from llmac.core.calibration import (
    CalibrationCurve,
    Estimate,
    bias,
    calibration_curve,
    expected_calibration_error,
    mean_squared_error,
    percentile_interval,
    ranking_auc,
    resamples,
    variance_explained,
)
from llmac.core.protocols import Critic
from llmac.critics.states import States
from llmac.errors import ConsistencyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """How good the critic is at some of the states."""

    where: str
    """Which states: `all`, `depth 0.20`, `failed`, `successful`."""
    states: int
    prompts: int
    """Prompts they belong to: what intervals are resampled over."""
    mean_value: float
    mean_truth: float
    scores: Mapping[str, Estimate]
    """Every name of `MEASURES`; NaN where undefined."""
    best: Mapping[str, float]
    """What the Monte-Carlo values themselves score: no critic can do much better. Slightly too good, since they have
    seen the outcomes they are scored on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """States whose value is in one part of the range of outcomes."""

    states: int
    value: float
    """Mean V."""
    truth: Estimate
    """Mean true value; equal to `value` if the critic is calibrated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything an examination found."""

    overall: Judgement
    by_depth: tuple[Judgement, ...]
    by_outcome: tuple[Judgement, ...]
    """Among states of responses that failed and of those that succeeded in the end; one that has no state is left out.
    Which states these are depends on luck that the critic cannot know: look for errors here, not for calibration."""
    curve: tuple[Bin, ...]
    """The calibration curve over all states; bins without states are left out."""
    noise: float
    """RMSE that exact values would have, since the truth is estimated."""
    values: tuple[float, ...]
    """V of each state, in the order of the states."""
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Some states as the measures see them, N of them."""

    values: Float[Tensor, "N"]
    truth: Float[Tensor, "N"]
    spread: Float[Tensor, "N"]
    """Variance of single outcomes around `truth`, biased."""
    noise: Float[Tensor, "N"]
    """Variance of `truth` around the true value, unbiased: s²/K."""
    successes: Float[Tensor, "N"]
    failures: Float[Tensor, "N"]
    prompt: Tensor
    low: float
    high: float
    bins: int

    def at(self, index: Tensor) -> "_Sample":
        """The given states."""
        return replace(
            self,
            values=self.values[index],
            truth=self.truth[index],
            spread=self.spread[index],
            noise=self.noise[index],
            successes=self.successes[index],
            failures=self.failures[index],
            prompt=self.prompt[index],
        )


Measure = Callable[[_Sample, Tensor], Tensor]
"""States and their weights [*b, N] to one number [*b]."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of a report."""

    meaning: str
    of: Measure = field(repr=False)


MEASURES: dict[str, Measured] = {
    "rmse": Measured(
        "root mean squared error against the Monte-Carlo values, reward",
        lambda s, w: mean_squared_error(s.values, s.truth, w).sqrt(),
    ),
    "rmse_corrected": Measured(
        "the same without the noise of the Monte-Carlo values; 0 if it is all noise",
        lambda s, w: mean_squared_error(s.values, s.truth, w, noise=-s.noise).clamp(min=0).sqrt(),
    ),
    "bias": Measured(
        "mean value - mean Monte-Carlo value, reward; positive = over-estimates",
        lambda s, w: bias(s.values, s.truth, w),
    ),
    "explained_variance": Measured(
        "share of the variance of the Monte-Carlo values; 0 = a constant, 1 = all",
        lambda s, w: variance_explained(s.values, s.truth, w),
    ),
    "explained_variance_of_outcomes": Measured(
        "share of the variance of single outcomes, luck included",
        lambda s, w: variance_explained(s.values, s.truth, w, noise=s.spread),
    ),
    "brier": Measured(
        "mean squared error against single outcomes",
        lambda s, w: mean_squared_error(s.values, s.truth, w, noise=s.spread),
    ),
    "ece": Measured(
        "expected calibration error: mean |value - truth| over bins of the value",
        lambda s, w: expected_calibration_error(
            calibration_curve(s.values, s.truth, w, low=s.low, high=s.high, bins=s.bins)
        ),
    ),
    "auc": Measured(
        "chance that a success has a higher value than a failure; 0.5 = no ranking",
        lambda s, w: ranking_auc(s.values, s.successes, s.failures, torch.zeros_like(s.prompt), w),
    ),
    "auc_within_prompts": Measured(
        "the same for a success and a failure of the same prompt",
        lambda s, w: ranking_auc(s.values, s.successes, s.failures, s.prompt, w),
    ),
}
"""What a critic is measured by."""


def examine(
    critic: Critic,
    states: States,
    *,
    bins: int = 10,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Report:
    """Ask `critic` for V at the states and compare with the truth.

    Intervals are bootstrap percentiles over prompts: states of one prompt are drawn together. With few prompts they
    are too narrow; with one there are none (NaN).

    Args:
        critic: any; it is asked once, for all states.
        states: as `sample_states` gives them. Sampled once, they can judge many critics of one policy.
        bins: of the calibration curve, between the worst and the best outcome.
        draws: bootstrap resamples.
        confidence: of the intervals.
        seed: of the resamples.

    Raises:
        ConsistencyError: the critic said something that is not a finite number.
    """
    sample = _sample(values_at(critic, states), states, bins)
    everything = torch.ones(len(sample.values), dtype=torch.bool)

    def judged(where: str, member: Tensor) -> Judgement:
        return _judge(where, sample.at(member.nonzero().flatten()), draws, confidence, seed)

    depths = sorted(set(states.depth.tolist()))
    ended = (("failed", ~states.succeeded), ("successful", states.succeeded))
    return Report(
        overall=judged("all", everything),
        by_depth=tuple(judged(f"depth {d:.2f}", states.depth == d) for d in depths),
        by_outcome=tuple(judged(where, member) for where, member in ended if member.any()),
        curve=_curve(sample, draws, confidence, seed),
        noise=float(sample.noise.mean().sqrt()),
        values=tuple(sample.values.tolist()),
        confidence=confidence,
    )


def values_at(critic: Critic, states: States) -> Float[Tensor, "N"]:
    """V of each state, in float64.

    Raises:
        ConsistencyError: the critic said something that is not a finite number.
    """
    rollouts, starts = states.rollouts()
    values = critic.values(rollouts, starts).at[states.row, states.position].double().cpu()
    if not values.isfinite().all():
        raise ConsistencyError(
            f"the critic says {int((~values.isfinite()).sum())} values of {len(values)} that are not finite numbers; "
            "look at its learning rate and at critic/grad_norm of the run"
        )
    return values


def _sample(values: Tensor, states: States, bins: int) -> _Sample:
    outcomes = states.outcomes.double()
    successes = (outcomes > states.success_above).sum(1).double()
    return _Sample(
        values=values,
        truth=outcomes.mean(1),
        spread=outcomes.var(1, unbiased=False),
        noise=outcomes.var(1) / outcomes.shape[1],
        successes=successes,
        failures=outcomes.shape[1] - successes,
        prompt=states.prompt,
        low=float(outcomes.min()),
        high=float(outcomes.max()),
        bins=bins,
    )


def _judge(where: str, sample: _Sample, draws: int, confidence: float, seed: int) -> Judgement:
    weight = torch.ones_like(sample.values)
    drawn = _resampled(sample, draws, seed)
    truth = sample.truth
    as_good_as_can_be = replace(sample, values=truth)
    return Judgement(
        where=where,
        states=len(weight),
        prompts=len(sample.prompt.unique()),
        mean_value=float(sample.values.mean()),
        mean_truth=float(truth.mean()),
        scores={
            name: _estimate(measured.of(sample, weight), measured.of(sample, drawn), confidence)
            for name, measured in MEASURES.items()
        },
        best={
            name: float(measured.of(as_good_as_can_be, weight))
            for name, measured in MEASURES.items()
        },
    )


def _curve(sample: _Sample, draws: int, confidence: float, seed: int) -> tuple[Bin, ...]:
    def curve(weight: Tensor) -> CalibrationCurve:
        return calibration_curve(
            sample.values,
            sample.truth,
            weight,
            low=sample.low,
            high=sample.high,
            bins=sample.bins,
        )

    whole = curve(torch.ones_like(sample.values))
    drawn = curve(_resampled(sample, draws, seed)).truth
    return tuple(
        Bin(
            states=int(whole.weight[index]),
            value=float(whole.value[index]),
            truth=_estimate(whole.truth[index], drawn[:, index], confidence),
        )
        for index in whole.weight.nonzero().flatten().tolist()
    )


def _resampled(sample: _Sample, draws: int, seed: int) -> Tensor:
    """Weights [draws, N]; of a single prompt there is no other resample, and the interval is undefined."""
    if len(sample.prompt.unique()) < 2:
        return torch.zeros(draws, len(sample.prompt), dtype=torch.float64)
    return resamples(sample.prompt, draws, torch.Generator().manual_seed(seed)).double()


def _estimate(value: Tensor, drawn: Tensor, confidence: float) -> Estimate:
    low, high = percentile_interval(drawn, confidence=confidence)
    return Estimate(value=float(value), low=low, high=high)
