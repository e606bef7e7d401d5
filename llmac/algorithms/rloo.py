"""RLOO: REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740).

The baseline of a response is the mean reward of its *siblings*, which makes the gradient unbiased.
KL, if any, is part of the reward. Deviation: the paper takes one REINFORCE step; we keep the
clipped token ratio of verl and OpenRLHF, which has REINFORCE's gradient on the first step and stays
safe on later ones.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from llmac.core.baselines import leave_one_out
from llmac.core.types import AllSum, identity

from .base import ClippedPolicy, GroupCredit


@dataclass(frozen=True, kw_only=True)
class RLOO(GroupCredit, ClippedPolicy):
    """RLOO: the other siblings' mean is the baseline.

        Â_i = s_i - mean_{j≠i} s_j = G/(G-1) · (s_i - mean_g)

    That is G/(G-1) times Dr.GRPO's.
    """

    group_size: int = 4
    """k of the paper, which uses 2 and 4; TRL: 2."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k1"
    """k1, summed over the response: log π_old/π_ref of the whole answer, as in the paper and
    TRL."""
    kl_placement: Literal["loss", "reward"] = "reward"
    """reward: the paper's and TRL's (kl_coef .05 there)."""

    def outcome_advantages(
        self, scores: Float[Tensor, "B"], group: Int[Tensor, "B"], *, sum_across: AllSum = identity
    ) -> Float[Tensor, "B"]:
        """Distance from the mean of the siblings."""
        return leave_one_out(scores, group)
