"""PACS: the policy as a classifier of its own responses (Li et al. 2025, arXiv:2509.02522).

The outcome is a label, and how much likelier the policy has made a response, compared with its
siblings, is the logit of a classifier that predicts it. Its error, label minus probability, is the
advantage: large before the policy has taken sides, small where it already knows. It stands in for
critic, ratio and clip. Needs: rewards that are 0 or 1.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llmac.core.group_bce import ClassWeights, Relative, group_bce
from llmac.core.masking import Aggregation
from llmac.core.types import AllSum, Credit, Rollouts, Values, identity

from .base import GroupCredit
from .score_function import ScoreFunctionPolicy


@dataclass(frozen=True, kw_only=True)
class PACS(GroupCredit, ScoreFunctionPolicy):
    """PACS: an implicit actor-critic by cross-entropy.

        s_i = beta · Σ_t (log π_θ - log π_old)        (score: mean: beta · mean_t log π_θ)
        ψ_i = s_i - mean_{j≠i} s_j
        loss = mean over responses of w_i · BCE(ψ_i, R_i)

    Computed as a policy gradient that is exactly this loss's: the advantage of a response is minus
    the derivative of the summed loss by the sum of its log-probabilities,

        Â_i = beta · leave_one_out(w · (R - sigmoid(ψ)))_i        (score: mean: over its length)

    constant during a step and taken anew before the next, because ψ follows the policy. A group
    therefore may be cut by micro-batches, which the loss itself would forbid. The denominator is
    the mean over responses of the sum over tokens; a response without tokens is none, but counts
    among its siblings, and so does one that `mask_truncated` keeps out.

    At π_θ = π_old, with score: sum and without weights, Â is beta times RLOO's. Later it shrinks as
    ψ grows towards the label, and a group all of whose labels are equal, without effect at first,
    pulls its responses back to where they were. With one epoch of one minibatch nothing but the
    weights sets PACS apart from RLOO.
    """

    beta: float = 1.0
    """Logit of a nat. 1.0 and 2.0 in the released scripts."""
    score: Literal["sum", "mean"] = "sum"
    """What is compared: the sum of a response's log-ratios to π_old, or the mean of its
    log-probabilities. sum: the released scripts."""
    relative: Relative = "leave_one_out"
    """How: to the mean of the siblings, to mean and deviation of the group, or not at all (naive).
    leave_one_out: the released scripts."""
    class_weights: ClassWeights = "balanced"
    """balanced: in groups with both, right and wrong responses weigh as much in all; positive,
    negative: only these count; none. balanced: the released scripts."""
    aggregation: Aggregation = "sequence_mean_token_sum"
    """How token losses are averaged over the minibatch. The mean over responses of the sum over
    tokens is the paper's loss; any other is another one."""

    def __post_init__(self) -> None:
        """Refuse a scale that turns the gradient, and rewards that would not be labels."""
        super().__post_init__()
        self._require("beta", 0 < self.beta < math.inf, "finite and above 0")
        self._require(
            "kl_placement",
            self.kl_placement == "loss",
            "loss: in the reward a KL would make labels other than 0 and 1",
        )

    @property
    def refreshes_credit(self) -> bool:
        """True: ψ follows the policy."""
        return True

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """What the classifier's error says of each response, before the policy has moved.

        Raises:
            ValueError: values were given, or a reward is neither 0 nor 1.
        """
        self._refuse_values(values)
        advantages = self._advantages(rollouts, rollouts.old_logprobs)
        return self.make_credit(rollouts, advantages, sum_across=sum_across)

    def refreshed(
        self, credit: Credit, rollouts: Rollouts, logprobs: Float[Tensor, "B T"]
    ) -> Credit:
        """The same for the policy as it is now."""
        if not credit.policy_mask.any():  # rows that only keep other ranks company
            return credit
        advantages = self._advantages(rollouts, logprobs)
        return dataclasses.replace(
            credit, advantages=advantages.masked_fill(~credit.policy_mask, 0.0)
        )

    def _advantages(
        self, rollouts: Rollouts, logprobs: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        mask = rollouts.action_mask
        slope = torch.full_like(logprobs[:, :1], self.beta)  # of the score by a log-probability
        told = logprobs
        if self.score == "mean":
            slope = slope / mask.sum(-1, keepdim=True).clamp(min=1)
        else:
            told = logprobs - rollouts.old_logprobs
        scores = (slope * told.where(mask, 0.0)).sum(-1)
        with torch.enable_grad():
            scores = scores.detach().requires_grad_()
            losses = group_bce(
                scores,
                self._labels(rollouts),
                rollouts.group,
                relative=self.relative,
                weights=self.class_weights,
            )
            (gradient,) = torch.autograd.grad(losses.sum(), scores)
        return (-gradient[:, None] * slope).expand_as(rollouts.rewards)

    def _labels(self, rollouts: Rollouts) -> Float[Tensor, "B"]:
        labels = self.scores(rollouts)
        other = (labels != 0) & (labels != 1)
        if other.any():
            row = int(other.nonzero()[0])
            raise ValueError(
                "PACS takes rewards as labels, 0 wrong and 1 right, and a response to prompt "
                f"{rollouts.trajectories[row].prompt.id!r} has {labels[row].item():g}; let one "
                "reward function with weight 1 say 0 or 1, or choose another algorithm, for "
                "example rloo"
            )
        return labels
