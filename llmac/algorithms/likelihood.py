"""The half of a card that moves the policy by imitation: its own better responses, weighted."""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.measures import Measure
from llmac.core.types import Credit

from .base import Algorithm


@dataclass(frozen=True, kw_only=True)
class LikelihoodPolicy(Algorithm):
    """The half that moves the policy: a weighted likelihood, and nothing is pushed away.

        l_t = -w_t · log π_θ(a_t|s_t),    w_t >= 0

    No ratio and no clip: a response is as good an example after the policy has moved as before.
    """

    def imitated(
        self, credit: Credit, weights: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Credit:
        """The credit, in the place of its advantages these weights of the tokens in the mask.

        `mismatch` weighs them by π_old/μ, as it does advantages.
        """
        if credit.importance is not None:
            weights = weights * credit.importance
        return dataclasses.replace(
            credit,
            advantages=torch.zeros_like(credit.advantages),
            policy_mask=mask,
            likelihood=weights.masked_fill(~mask, 0.0),
        )

    def surrogate(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B T"], dict[str, Measure]]:
        """Nothing: the likelihood is all there is."""
        return torch.zeros_like(logprobs), {}
