"""Critics that predict how returns are distributed, and say the mean: one card a distribution."""

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

from llmac.core.categorical_heads import C51, HLGauss, OutcomeClasses, PooledOutcomes, TwoHot
from llmac.core.value_heads import Bernoulli, Gaussian, Quantile
from llmac.critics.head_config import HeadConfig
from llmac.critics.refusals import refuse_range, refuse_unless

MARGIN = 0.1
"""Of an HL-Gauss support beyond `reward_range`, on either side, as a fraction of its width."""
BINS_A_SIGMA = 2.02
"""Width of HL-Gauss smoothing in bins: 0.024 with 101 bins on [-0.1, 1.1]."""


@dataclass(frozen=True, kw_only=True)
class BernoulliConfig(HeadConfig):
    """The chance of success by cross-entropy; returns between the ends of `reward_range` count as chances."""

    def head(self) -> Bernoulli:
        """Odds of the larger return."""
        return Bernoulli(low=self.reward_range[0], high=self.reward_range[1])


@dataclass(frozen=True, kw_only=True)
class SupportedHeadConfig(HeadConfig):
    """A head with bins or atoms on a range of returns."""

    bins: int = 101
    """Bins or atoms, at least 2."""
    support: tuple[float, float] | None = None
    """Smallest and largest return the head can say; None: `reward_range`. Returns outside count as its ends, and
    `critic/vf_target_clipfrac` counts them."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        refuse_unless(self.bins >= 2, f"bins must be at least 2, found {self.bins}")
        (low, high), (smallest, largest) = self.range, self.reward_range
        refuse_range("support", (low, high), "smallest, largest")
        refuse_unless(
            low <= smallest and largest <= high,
            f"support must cover reward_range ({smallest}, {largest}), found ({low}, {high}); widen support, or set "
            "reward_range to the returns you expect",
        )

    @property
    def range(self) -> tuple[float, float]:
        """The support in use."""
        return self.reward_range if self.support is None else self.support


@dataclass(frozen=True, kw_only=True)
class HLGaussConfig(SupportedHeadConfig):
    """A histogram of the return by cross-entropy with a smoothed target: HL-Gauss, "stop regressing"."""

    support: tuple[float, float] | None = None
    """Smallest and largest return the bins cover; None: `reward_range` and a tenth of its width on either side, because
    near the end of a support the smoothed target's mean is not the return (the recipe: [-0.1, 1.1] for [0, 1])."""
    sigma: float | None = None
    """Deviation of the smoothing, unit of reward; None: 2.02 bins, the recipe's 0.024 for [0, 1]."""
    target: Literal["cdf", "density"] = "cdf"
    """The normal distribution's share of each bin (the paper), or its density at the centres (the released code)."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        refuse_unless(
            self.sigma is None or self.sigma > 0,
            f"sigma must be positive or null ({BINS_A_SIGMA} bins), found {self.sigma}",
        )
        low, high = self.range
        refuse_unless(
            self.sigma is None or self.sigma <= high - low,
            f"sigma must be at most the width of the support, {high - low}, found {self.sigma}: all returns would look "
            "alike",
        )

    @property
    def range(self) -> tuple[float, float]:
        """The support in use."""
        if self.support is not None:
            return self.support
        low, high = self.reward_range
        return low - MARGIN * (high - low), high + MARGIN * (high - low)

    def head(self) -> HLGauss:
        """A smoothed histogram."""
        low, high = self.range
        sigma = BINS_A_SIGMA * (high - low) / self.bins if self.sigma is None else self.sigma
        return HLGauss(low=low, high=high, bins=self.bins, sigma=sigma, target=self.target)


@dataclass(frozen=True, kw_only=True)
class TwoHotConfig(SupportedHeadConfig):
    """Weights on atoms by cross-entropy, each return split between its two neighbours: exact, not smoothed."""

    def head(self) -> TwoHot:
        """Two neighbouring atoms."""
        return TwoHot(low=self.range[0], high=self.range[1], bins=self.bins)


@dataclass(frozen=True, kw_only=True)
class C51Config(SupportedHeadConfig):
    """The distribution of the return bootstrapped from the critic's own: C51 with lambda-returns."""

    bins: int = 51
    """Atoms, at least 2 (C51: 51)."""
    lam: float = 0.95
    """Share of the sampled return against the critic's own distribution at each state: 0 is C51's one step, 1 is
    `two_hot`."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        refuse_unless(0 <= self.lam <= 1, f"lam must lie in [0, 1], found {self.lam}")
        refuse_unless(
            self.target_tau is None,
            f"target_tau must be null for c51, found {self.target_tau}: it bootstraps from the distribution the critic "
            "itself says while it learns, and a slow copy would never be asked for it",
        )
        low, high = self.range
        refuse_unless(
            low <= 0 <= high,
            f"support must contain 0, the value behind the end of a response, found ({low}, {high}); set support",
        )

    def head(self) -> C51:
        """A bootstrapped distribution."""
        low, high = self.range
        return C51(low=low, high=high, bins=self.bins, lam=self.lam)


@dataclass(frozen=True, kw_only=True)
class QuantileConfig(HeadConfig):
    """Quantiles of the return, their average the value: QR-DQN's loss."""

    quantiles: int = 32
    """How many, at least 2; the value is off by at most the spread of the returns / 2 quantiles."""
    kappa: float = 0.0
    """Errors below are squared, as a fraction of the width of `reward_range`. QR-DQN's 1.0 suits returns that spread
    over many units; as wide as the returns it makes expectiles, whose average is not the mean return. 0: none."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        refuse_unless(self.quantiles >= 2, f"quantiles must be at least 2, found {self.quantiles}")
        refuse_unless(self.kappa >= 0, f"kappa must not be negative, found {self.kappa}")

    def head(self) -> Quantile:
        """Quantiles."""
        low, high = self.reward_range
        return Quantile(quantiles=self.quantiles, kappa=self.kappa * (high - low))


@dataclass(frozen=True, kw_only=True)
class GaussianConfig(HeadConfig):
    """Mean and deviation of the return by likelihood; pessimistic where the outcome is open, if asked."""

    pessimism: float = 0.0
    """The value is the mean minus this many deviations (STAC's idea); 0: the mean."""
    smallest_deviation: float = 0.05
    """The deviation is at least this fraction of the width of `reward_range`."""
    reach: float | None = None
    """The deviation learns from returns no further than this from the mean, as a fraction of the width of
    `reward_range`; None: from all."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        refuse_unless(
            0 < self.smallest_deviation < 0.5,
            f"smallest_deviation must lie in (0, 0.5), found {self.smallest_deviation}",
        )
        refuse_unless(
            self.pessimism >= 0, f"pessimism must not be negative, found {self.pessimism}"
        )
        refuse_unless(
            self.reach is None or self.reach > 0,
            f"reach must be positive or null (no limit), found {self.reach}",
        )

    def head(self) -> Gaussian:
        """A normal distribution."""
        width = self.reward_range[1] - self.reward_range[0]
        return Gaussian(
            smallest_deviation=self.smallest_deviation * width,
            first_deviation=0.5 * width,
            pessimism=self.pessimism,
            reach=None if self.reach is None else self.reach * width,
        )


@dataclass(frozen=True, kw_only=True)
class OutcomeClassesConfig(HeadConfig):
    """How likely each of a few outcomes is, each worth a known reward: CodeRL's critic, at every token."""

    rewards: tuple[float, ...] = (-1.0, -0.6, -0.3, 1.0)
    """Reward of each class, ascending (CodeRL: does not compile, crashes, fails a test, passes). Returns between two
    count as a mixture of both; `critic/vf_target_clipfrac` counts those beyond the ends."""

    says_outcome_chances: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        classes = self.rewards
        refuse_unless(len(classes) >= 2, f"rewards must be at least two, found {list(classes)}")
        refuse_unless(
            all(a < b for a, b in itertools.pairwise(classes)),
            f"rewards must ascend, each class with its own, found {list(classes)}",
        )
        low, high = self.reward_range
        refuse_unless(
            classes[0] <= low and high <= classes[-1],
            f"rewards must cover reward_range ({low}, {high}), found {list(classes)}; set reward_range to the returns "
            "you expect",
        )

    def head(self) -> OutcomeClasses:
        """One class an outcome."""
        return OutcomeClasses(rewards=self.rewards)


@dataclass(frozen=True, kw_only=True)
class CodeOutcomesConfig(OutcomeClassesConfig):
    """CodeRL's critic of whole responses: classes of outcomes by the largest logit over their tokens.

    For `coderl`, which it tells how likely the outcome was after each token. What it says of single states is no
    calibrated value, and other cards refuse it. Returns between two classes count as the nearest.
    """

    judges_states: ClassVar[bool] = False

    reward_range: tuple[float, float] = (-1.0, 1.0)
    """Smallest and largest return to expect (CodeRL's classes)."""
    hidden_layers: tuple[int, ...] | None = (128,)
    """Widths of hidden layers between the trunk and the outputs; 128 with ReLU in CodeRL."""

    def head(self) -> PooledOutcomes:
        """One class an outcome, of the whole response."""
        return PooledOutcomes(rewards=self.rewards)
