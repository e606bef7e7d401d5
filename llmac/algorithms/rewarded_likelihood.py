"""The half of a card that learns rows with a reward by heart: rejection-sampling fine-tuning.

RFT, arXiv:2308.01825; one step of ReST-EM, arXiv:2312.06585, from the policy as it is.
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.types import AllSum, Credit, Rollouts, Values, identity

from .likelihood import LikelihoodPolicy


@dataclass(frozen=True, kw_only=True)
class RewardedLikelihood(LikelihoodPolicy):
    """The half that raises the likelihood of what was rewarded, and leaves the rest alone.

        loss = - (1/N) Σ_it w_it log π_θ(a_it | s_it)       over the N tokens of rows with r_i > 0

    w is 1 unless a card has `token_weights`.
    """

    def __post_init__(self) -> None:
        """Refuse what is about responses that are compared."""
        super().__post_init__()
        self._require(
            "kl_placement", self.kl_placement == "loss", "loss: no reward is learned from"
        )
        self._without_effect(
            "mismatch", True, "it weighs the policy term, and there is only the likelihood"
        )

    @property
    def keeps_groups(self) -> bool:
        """False: only rewarded rows count."""
        return False

    def token_weights(
        self, rollouts: Rollouts, mask: Bool[Tensor, "B T"], *, sum_across: AllSum
    ) -> Float[Tensor, "B T"]:
        """Weight of -log π at each token of `mask`."""
        return mask.to(rollouts.rewards.dtype)

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """Likelihood at the tokens of rows with a reward, and no advantage."""
        self._refuse_values(values)
        right = torch.tensor([(t.reward or 0.0) > 0 for t in rollouts.trajectories])
        mask = self.policy_mask(rollouts) & right[:, None]
        nothing = torch.zeros_like(rollouts.rewards)
        credit = self.make_credit(rollouts, nothing, sum_across=sum_across, mask=mask)
        # A row may be learned as a response to another prompt than it was sampled to: there is no
        # sampler to compare with.
        metrics = {
            name: measure for name, measure in credit.metrics.items() if "sampler_" not in name
        }
        weights = self.token_weights(rollouts, mask, sum_across=sum_across)
        learned = self.imitated(credit, weights.to(rollouts.rewards.dtype), mask)
        return dataclasses.replace(learned, metrics=metrics)
