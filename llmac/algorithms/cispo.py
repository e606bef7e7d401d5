"""CISPO: clipped importance-sampling weights (MiniMax-M1, 2025, arXiv:2506.13585).

PPO's clip drops the gradient of a token whose ratio has moved; CISPO caps the ratio as a constant
weight, so that every token keeps its gradient, the rare decisive ones included.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmac.core.baselines import group_relative
from llmac.core.losses import cispo, log_ratio
from llmac.core.measures import Measure
from llmac.core.types import AllSum, identity

from .base import GroupCredit, mean_over


@dataclass(frozen=True, kw_only=True)
class CISPO(GroupCredit):
    """CISPO: the importance weight is capped and detached, so no token loses its gradient.

        l_it = -sg[clip(r_it, cap_low, cap_high)] · Â_it · log π_θ(a_t|s_t)

    The caps are ratios, not distances from 1: TRL's words, not verl's.
    """

    scale: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation is the unit: the group's (paper), or the step's (ScaleRL,
    arXiv:2510.13786)."""
    cap_low: float = 0.0
    """Smallest weight. 0: no lower cap (paper, TRL). verl's clip_ratio_low .2 is cap_low .8."""
    cap_high: float = 5.0
    """Largest weight, the ratio itself and not its distance from 1: TRL's epsilon_high, 5.0 in
    ScaleRL. verl's clip_ratio_high .28 is cap_high 1.28."""

    def __post_init__(self) -> None:
        """Refuse caps that leave out the ratio 1, which every on-policy token has."""
        super().__post_init__()
        self._require(
            "cap_low",
            0 <= self.cap_low <= 1,
            "in [0, 1]: it is a ratio, and 1 - epsilon in verl's words",
        )
        self._require(
            "cap_high",
            self.cap_high >= 1,
            "at least 1: it is a ratio, and 1 + epsilon in verl's words",
        )

    def outcome_advantages(
        self, scores: Float[Tensor, "B"], group: Int[Tensor, "B"], *, sum_across: AllSum = identity
    ) -> Float[Tensor, "B"]:
        """Distance from the group's mean, in standard deviations."""
        return group_relative(scores, group, scale=self.scale, sum_across=sum_across)

    def surrogate(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B T"], dict[str, Measure]]:
        """Weighted log-probability of each token."""
        ratio = log_ratio(logprobs, old_logprobs)
        per_token = cispo(logprobs, ratio, advantages, cap_low=self.cap_low, cap_high=self.cap_high)
        weight = ratio.detach().exp()
        capped = (weight < self.cap_low) | (weight > self.cap_high)
        return per_token, {"actor/pg_clipfrac": mean_over(capped, mask)}
