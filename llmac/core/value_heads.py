"""What the outputs of a value head mean, and how they learn. No weights here: those are in `models/value_heads.py`.

A head is a frozen dataclass: how many numbers it reads from a state, what value they say, which
numbers say a given value, and the loss that pulls them towards the returns. Whatever it predicts,
its value is a mean return in the unit of rewards. Those that predict probabilities of returns are
in `categorical_heads.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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

OUTSIDE = "critic/vf_target_clipfrac"
"""Metric: share of the states whose return the head cannot represent and takes as the nearest it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What the outputs of some rows should have said, on the device of the outputs."""

    returns: Float[Tensor, "B T"]
    old_values: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    rewards: Float[Tensor, "B T"]
    """As scored, for heads that predict more of the return than its mean."""
    bootstraps: Bool[Tensor, "B"]
    """Rows whose returns contain the value behind the last token."""
    gamma: float = 1.0
    """Discount from one state that counts to the next, as it is in the returns."""
    unit: float = 1.0
    """What one unit of error is, in units of reward: the spread of the returns, where they are normalised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """The undivided loss of each token, and what else is worth a metric."""

    per_token: Float[Tensor, "B T"]
    shares: Mapping[str, Bool[Tensor, "B T"]] = field(default_factory=dict[str, Tensor])
    """Metrics that count states."""


@runtime_checkable
class Head(Protocol):
    """One kind of value head."""

    kind: ClassVar[str]
    """Its name in a saved value model."""
    foretells: ClassVar[tuple[str, ...]]
    """Fields that say what the outputs mean; the other fields only say how they learn."""

    @property
    def outputs(self) -> int:
        """Numbers read from one state."""
        ...

    def decode(self, raw: Float[Tensor, "*shape N"]) -> Float[Tensor, "*shape"]:
        """The value, unit of reward."""
        ...

    def start(self, mean: float) -> Float[Tensor, "N"]:
        """Outputs that say `mean`, or the nearest value the head can say."""
        ...

    def learn(self, raw: Float[Tensor, "B S N"], lesson: Lesson) -> Learned:
        """The loss of outputs at s_0 .. s_T (S = T + 1)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """The mean return itself, by squared or Huber error, clipped around the old value if asked.

    l = max or mean of  loss(V - G)  and  loss(clamp(V, V_old ± clip) - G)
    """

    kind: ClassVar[str] = "scalar"
    foretells: ClassVar[tuple[str, ...]] = ("bounds",)

    loss: Literal["mse", "huber"] = "mse"
    huber_delta: float = 0.5
    clip: float | None = None
    """Unit of reward; None: no clipping."""
    clip_combine: Literal["max", "mean"] = "max"
    bounds: tuple[float, float] | None = None
    """The value lies between, by `between`; None: anywhere."""

    @property
    def outputs(self) -> int:
        """One."""
        return 1

    def decode(self, raw: Float[Tensor, "*shape 1"]) -> Float[Tensor, "*shape"]:
        """The output, bent between the bounds if there are any."""
        value = raw.squeeze(-1)
        return (
            value
            if self.bounds is None
            else between(value, low=self.bounds[0], high=self.bounds[1])
        )

    def start(self, mean: float) -> Float[Tensor, "1"]:
        """The mean, or what bends to it."""
        if self.bounds is None:
            return torch.tensor([mean])
        return torch.tensor([math.tan(math.pi * (_share(mean, *self.bounds) - 0.5))])

    def learn(self, raw: Float[Tensor, "B S 1"], lesson: Lesson) -> Learned:
        """Error of the value."""
        return self.learn_values(self.decode(raw)[:, :-1], lesson)

    def learn_values(self, values: Float[Tensor, "B T"], lesson: Lesson) -> Learned:
        """The same of values known already: those of an ensemble together."""
        low, high = self.bounds or (-math.inf, math.inf)
        returns, outside = inside(lesson.returns, low, high)
        loss = self._loss(values - returns, lesson.unit)
        shares = {OUTSIDE: outside} if self.bounds else {}
        if self.clip is None:
            moved = torch.zeros_like(lesson.mask)
        else:
            close = near(values, lesson.old_values, clip=self.clip)
            loss = either(loss, self._loss(close - returns, lesson.unit), how=self.clip_combine)
            moved = (values.detach() - lesson.old_values).abs() > self.clip
        return Learned(per_token=loss, shares={"critic/vf_clipfrac": moved, **shares})

    def _loss(self, error: Tensor, unit: float) -> Tensor:
        return (
            squared(error / unit)
            if self.loss == "mse"
            else huber(error / unit, delta=self.huber_delta)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bernoulli:
    """The chance of the higher of two returns, by cross-entropy; returns between them count as chances.

    V = low + (high - low) · σ(z),        l = BCE(σ(z), (G - low) / (high - low))
    """

    kind: ClassVar[str] = "bernoulli"
    foretells: ClassVar[tuple[str, ...]] = ("low", "high")

    low: float = 0.0
    high: float = 1.0

    @property
    def outputs(self) -> int:
        """One log-odds."""
        return 1

    def decode(self, raw: Float[Tensor, "*shape 1"]) -> Float[Tensor, "*shape"]:
        """Mean of the two returns at these odds."""
        return self.low + (self.high - self.low) * raw.squeeze(-1).sigmoid()

    def start(self, mean: float) -> Float[Tensor, "1"]:
        """The log-odds of the mean."""
        chance = _share(mean, self.low, self.high)
        return torch.tensor([math.log(chance / (1 - chance))])

    def learn(self, raw: Float[Tensor, "B S 1"], lesson: Lesson) -> Learned:
        """Cross-entropy."""
        returns, outside = inside(lesson.returns, self.low, self.high)
        chance = (returns - self.low) / (self.high - self.low)
        return Learned(
            per_token=binary_cross_entropy(raw[:, :-1, 0], chance), shares={OUTSIDE: outside}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantile:
    """Quantiles of the return, whose average is the value: QR-DQN's loss on sampled returns.

    The average over N midpoint quantiles is within (largest - smallest return) / 2N of the mean.
    """

    kind: ClassVar[str] = "quantile"
    foretells: ClassVar[tuple[str, ...]] = ("quantiles",)

    quantiles: int = 32
    kappa: float = 0.0
    """Errors below are squared, unit of reward."""

    @property
    def outputs(self) -> int:
        """One a quantile."""
        return self.quantiles

    def decode(self, raw: Float[Tensor, "*shape N"]) -> Float[Tensor, "*shape"]:
        """Their average."""
        return raw.mean(dim=-1)

    def start(self, mean: float) -> Float[Tensor, "N"]:
        """All at the mean."""
        return torch.full((self.quantiles,), mean)

    def learn(self, raw: Float[Tensor, "B S N"], lesson: Lesson) -> Learned:
        """Summed over the quantiles, so that each learns as fast as a scalar head."""
        each = quantile_huber(raw[:, :-1], lesson.returns, kappa=self.kappa)
        return Learned(per_token=each.sum(dim=-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaussian:
    """Mean and spread of the return, by likelihood; pessimistic by `pessimism` standard deviations.

        V = μ - β · σ,        l = `gaussian_nll`

    The pessimism is that of STAC (arXiv:2601.00737), whose exact form is our reading.
    """

    kind: ClassVar[str] = "gaussian"
    foretells: ClassVar[tuple[str, ...]] = ("smallest_deviation", "pessimism")

    smallest_deviation: float = 0.05
    """σ is at least this, unit of reward: where an outcome is certain the likelihood has no bound."""
    first_deviation: float = 0.5
    """σ of an untrained head, unit of reward."""
    pessimism: float = 0.0
    """β."""
    reach: float | None = None
    """σ learns from returns no further than this from μ, unit of reward; None: from all."""

    @property
    def outputs(self) -> int:
        """μ and what softplus makes σ of."""
        return 2

    def decode(self, raw: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape"]:
        """μ - β · σ."""
        return raw[..., 0] - self.pessimism * self.deviation(raw)

    def deviation(self, raw: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape"]:
        """σ = smallest + softplus(output)."""
        return self.smallest_deviation + torch.nn.functional.softplus(raw[..., 1])

    def start(self, mean: float) -> Float[Tensor, "2"]:
        """μ such that the value is the mean."""
        above = self.first_deviation - self.smallest_deviation
        return torch.tensor(
            # log(exp(above) - 1), for any width
            [mean + self.pessimism * self.first_deviation, above + math.log(-math.expm1(-above))]
        )

    def learn(self, raw: Float[Tensor, "B S 2"], lesson: Lesson) -> Learned:
        """Likelihood."""
        raw = raw[:, :-1]
        deviation = self.deviation(raw)
        return Learned(
            per_token=gaussian_nll(raw[..., 0], deviation, lesson.returns, reach=self.reach)
        )


def inside(
    returns: Float[Tensor, "B T"], low: float, high: float
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Returns moved into [low, high], and which of them were outside by more than rounding.

    >>> inside(torch.tensor([[0.5, 2.0]]), 0.0, 1.0)
    (tensor([[0.5000, 1.0000]]), tensor([[False,  True]]))
    """
    slack = 1e-5 * (high - low) if math.isfinite(high - low) else 0.0
    outside = (returns < low - slack) | (returns > high + slack)
    return returns.clamp(low, high), outside


def same_outputs(one: Head, other: Head) -> bool:
    """Whether the weights of one head can go on as the other.

    >>> same_outputs(Scalar(), Scalar(loss="huber")), same_outputs(Scalar(), Bernoulli())
    (True, False)
    """
    return one.kind == other.kind and all(
        getattr(one, name) == getattr(other, name)  # a list of the head's own fields
        for name in one.foretells
    )


def _share(mean: float, low: float, high: float) -> float:
    """Where the mean lies between two bounds, away from both."""
    return min(max((mean - low) / (high - low), 1e-4), 1 - 1e-4)
