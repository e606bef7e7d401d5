"""GSPO: group sequence policy optimization (Zheng et al. 2025, arXiv:2507.18071).

The reward belongs to the whole response, so the ratio should too: one ratio per response, the
geometric mean of its tokens' ratios, clipped as a whole. Its clip range is therefore a thousand
times narrower than a token's.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.losses import sequence_log_ratio
from llmac.core.masking import Aggregation

from .grpo import GRPO


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """GSPO: GRPO's advantages, one clipped ratio for the whole response.

        r_i = exp( (1/T_i) Σ_t log π_θ(a_t|s_t) / π_old(a_t|s_t) )

    In the token form, whose value and gradient are the same: every token carries r_i.
    """

    aggregation: Aggregation = "sequence_mean_token_mean"
    """The paper's, and the one verl forces: every response weighs the same."""
    clip_low: float = 3e-4
    """The paper's, for ratios of whole responses."""
    clip_high: float = 4e-4
    """The paper's."""

    def ratio(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """The log ratio of the response, at each of its tokens."""
        return sequence_log_ratio(logprobs, old_logprobs, mask)
