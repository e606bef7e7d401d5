"""GRPO: group relative policy optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).

No critic: the mean reward of the responses to the same prompt is the baseline, their standard
deviation the unit, and every token of a response gets the same advantage. Needs: group_size >= 2,
one outcome reward per response.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from llmac.core.baselines import group_relative
from llmac.core.masking import Aggregation
from llmac.core.types import AllSum, identity

from .base import ClippedPolicy, GroupCredit


@dataclass(frozen=True, kw_only=True)
class GRPO(GroupCredit, ClippedPolicy):
    """GRPO: siblings' mean is the baseline, their spread the unit; clipped steps (eq. 3, 4).

        Â_i = (s_i - mean_g) / (std_g + scale_eps)

    std is the sample standard deviation (divided by G - 1), as in verl, TRL and OpenRLHF.
    """

    aggregation: Aggregation = "sequence_mean_token_mean"
    """The paper's: every response weighs the same. verl and TRL now default to token_mean, which is
    DAPO's."""
    scale: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation is the unit: the group's (paper), the step's (ScaleRL,
    arXiv:2510.13786), or none (Dr.GRPO, arXiv:2503.20783). The group's gives easy and hard prompts
    more weight than their rewards warrant."""
    scale_eps: float = 1e-6
    """Added to the standard deviation, unit of reward. 1e-6 in verl, 1e-4 in TRL, 1e-9 in
    OpenRLHF."""

    def __post_init__(self) -> None:
        """Refuse a negative epsilon, or one that nothing would read."""
        super().__post_init__()
        self._require("scale_eps", 0 < self.scale_eps < float("inf"), "finite and above 0")
        self._without_effect("scale_eps", self.scale == "none", "set scale to group or batch")

    def outcome_advantages(
        self, scores: Float[Tensor, "B"], group: Int[Tensor, "B"], *, sum_across: AllSum = identity
    ) -> Float[Tensor, "B"]:
        """Distance from the group's mean, in standard deviations."""
        return group_relative(
            scores, group, scale=self.scale, eps=self.scale_eps, sum_across=sum_across
        )
