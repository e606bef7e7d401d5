"""Imitation of what went better than expected: the critic's advantage filters or weighs examples.

Weights exp(A/β): advantage-weighted regression (Peng et al. 2019, arXiv:1910.00177), the update
that the score of ReAd (arXiv:2405.14314) is derived from. Weights 1 where A > 0: the supervised
term of THOR (arXiv:2509.13761), here alone. Needs: a critic.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from llmac.core.measures import Measure
from llmac.core.types import AllSum, Credit, Rollouts, Values, identity

from .base import mean_over
from .critic_credit import CriticCredit
from .likelihood import LikelihoodPolicy


@dataclass(frozen=True, kw_only=True)
class Imitation(CriticCredit, LikelihoodPolicy):
    """Imitation: tokens are examples, as good as their advantage.

        positive    w_t = 1 where Â_t > threshold, and the loss is a mean over these tokens
        exp         w_t = min(exp(Â_t / beta), max_weight)

    Advantages and the critic's targets are those of `CriticCredit`, here not whitened: threshold
    and beta are in the unit of the rewards. Nothing is pushed away, so that mistakes fade only as
    better responses gain. With positive, `aggregation`, KL and entropy are about the imitated
    tokens only. Whole responses are filtered with lam: 1 and `segmenter: response_start`.
    """

    weight: Literal["positive", "exp"] = "positive"
    """positive: tokens with an advantage above `threshold` are imitated, all alike; exp: all tokens
    are, by the exponential of their advantage. Our choice: it needs no scale."""
    threshold: float = 0.0
    """Advantage above which a token is imitated, unit of reward. 0 in THOR."""
    beta: float = 1.0
    """Advantage that makes an example weigh e times as much, unit of reward. Our choice."""
    max_weight: float = 20.0
    """Largest weight of an example, unitless. Our choice."""
    whiten_advantages: bool = False
    """Whether advantages get mean 0 and variance 1 over the tokens of the whole step; threshold and
    beta are then deviations. Off: our choice."""

    def __post_init__(self) -> None:
        """Refuse weights that are none, and keys nothing would read."""
        super().__post_init__()
        self._require("threshold", math.isfinite(self.threshold), "finite")
        self._require("beta", 0 < self.beta < math.inf, "finite and above 0")
        self._require("max_weight", self.max_weight > 0, "above 0; .inf bounds nothing")
        self._without_effect("threshold", self.weight != "positive", "set weight to positive")
        for name in ("beta", "max_weight"):
            self._without_effect(name, self.weight != "exp", "set weight to exp")
        self._without_effect(
            "advantage_clip",
            self.weight == "positive" and not self.whiten_advantages,
            "set weight to exp: the clip changes no sign",
        )

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """The weight of each token as an example, and the critic's targets."""
        credit = super().credit(rollouts, values, sum_across=sum_across)
        if self.weight == "positive":
            mask = credit.policy_mask & (credit.advantages > self.threshold)
            weights = mask.to(credit.advantages.dtype)
        else:
            mask = credit.policy_mask
            weights = advantage_weights(
                credit.advantages, beta=self.beta, max_weight=self.max_weight
            )
        metrics: dict[str, Measure] = {
            "actor/imitation_weight": mean_over(weights, credit.policy_mask)
        }
        if self.weight == "exp":
            capped = weights == self.max_weight
            metrics["actor/imitation_clipfrac"] = mean_over(capped, mask)
        credit = dataclasses.replace(credit, metrics={**credit.metrics, **metrics})
        return self.imitated(credit, weights, mask)


def advantage_weights(
    advantages: Float[Tensor, "B T"], *, beta: float, max_weight: float
) -> Float[Tensor, "B T"]:
    """How much an example weighs that was that much better than expected.

        w = min(exp(Â / β), max_weight)

    The policy that is likelier by exp(A/β) than the one that sampled has the most advantage at a
    given KL from it; weights are cut so that a few examples do not become all. AWR: Peng et al.
    2019, arXiv:1910.00177.

    Args:
        advantages: Â, unit of reward.
        beta: the same unit.
        max_weight: bound.

    Returns:
        Weights, unitless.

    >>> advantage_weights(torch.tensor([[.5, -.5, 9.]]), beta=0.5, max_weight=20.0)
    tensor([[ 2.7183,  0.3679, 20.0000]])
    """
    return (advantages / beta).exp().clamp(max=max_weight)
