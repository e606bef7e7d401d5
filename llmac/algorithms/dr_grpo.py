"""Dr.GRPO: GRPO done right (Liu et al. 2025, arXiv:2503.20783).

Two biases of GRPO removed: dividing by the group's standard deviation (weights prompts by
difficulty) and by the response's length (lets long wrong answers off lightly). Both halves are
needed for the name.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from llmac.core.baselines import group_relative
from llmac.core.masking import Aggregation
from llmac.core.types import AllSum, identity

from .base import ClippedPolicy, GroupCredit


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GroupCredit, ClippedPolicy):
    """Dr.GRPO: GRPO without the spread, and token sums over a constant horizon.

        Â_i = s_i - mean_g        loss = mean_i ( Σ_t l_it ) / H

    H is the length limit of sampling, tokens.
    """

    aggregation: Aggregation = "sequence_mean_token_sum_norm"
    """The paper's: divided by a constant, never by a response's own length or the width of a padded
    tensor."""

    def outcome_advantages(
        self, scores: Float[Tensor, "B"], group: Int[Tensor, "B"], *, sum_across: AllSum = identity
    ) -> Float[Tensor, "B"]:
        """Distance from the group's mean, in the unit of the rewards."""
        return group_relative(scores, group, scale="none")
