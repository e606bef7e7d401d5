"""The half of a card that moves the policy by REINFORCE's gradient, token by token."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.losses import reinforce
from llmac.core.measures import Measure

from .base import Algorithm


@dataclass(frozen=True, kw_only=True)
class ScoreFunctionPolicy(Algorithm):
    """The half that moves the policy: no ratio and no clip.

        l_t = -Â_t · log π_θ(a_t|s_t)

    Right for responses that the policy itself sampled. Williams 1992, REINFORCE.
    """

    def surrogate(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B T"], dict[str, Measure]]:
        """Advantage-weighted log-probability of each token."""
        return reinforce(logprobs, advantages), {}
