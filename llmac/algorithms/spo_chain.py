"""SPO-chain: segment policy optimization with values from continuations (arXiv:2505.23564).

Guo et al. 2025. No critic is learned: the value before a segment is the mean outcome of fresh
continuations from there, and the advantage of a segment is the difference between the values at its
two ends. Formulas, quirks and defaults are those of the authors' code for short answers. Needs: an
engine that continues states (`critic: {name: monte_carlo}`), and a reference policy unless kl_coef
is 0. The trees of the same paper, for long answers, are another card.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llmac.core.diagnostics import explained_variance
from llmac.core.measures import Last
from llmac.core.returns import segment_gae
from llmac.core.types import AllSum, Credit, Rollouts, Values, identity

from .base import mean_over
from .segment_policy import DoubtfulTokens
from .segmented import Segmented, Segmenter, segment_metrics


@dataclass(frozen=True, kw_only=True)
class SPOChain(DoubtfulTokens, Segmented):
    """SPO-chain: cut where the policy was in doubt, ask there, and train the doubtful tokens.

        cuts: before every `cut_interval`-th token with π_old < cut_below, from the first one on
        Â_k = R_k + V_{k+1} - V_k                       V = 0 behind the last token; λ = 0
        Â_t = Â of the segment around t, 0 before the first cut and where π_old > train_below

    then whitening, clipped loss and KL of `DoubtfulTokens`. In the paper's order: V_{k+1} - V_k
    between two cuts, and the score minus the last V at the end, where all reward is.

    Deviations from the authors' code, besides those of `DoubtfulTokens`:

    - γ and λ are fields; theirs are 1 where no value is learned, which makes no difference: their
      advantages are not traces but the differences above, λ = 0 here.
    - A KL may be placed in the reward, and then is part of R_k but not of the continuations' V.
    - Adam, learning rate, batch (64 prompts, twice in batches of 64) and sampling (temperature .6,
      top-p .9, at most 1024 tokens) are settings of the recipe; 9 continuations a state those of
      the critic.
    - A continuation cut at the length limit has the reward that the reward functions give to the cut
      text; in theirs it has 0.
    - Theirs fills missing episodes by repeating others; here nothing is repeated.
    """

    default_critic: ClassVar[str | None] = "monte_carlo"
    teaches_critic: ClassVar[bool] = False

    segmenter: Segmenter = "low_probability"
    """Where values are asked. low_probability: at every `cut_interval`-th token in doubt, SPO's."""
    first_segment: Literal["skip", "value"] = "skip"
    """What the tokens before the first cut get. skip: nothing, no value is asked for them (SPO's
    code); value: what they changed, for one more state a response whose first token was not in
    doubt."""
    gamma: float = 1.0
    """Discount of each segment. 1 in SPO."""
    lam: float = 0.0
    """GAE's λ between segments. 0, SPO's: the difference of two values; 1: outcome minus value."""

    def __post_init__(self) -> None:
        """Refuse rates out of range, and a rule for a first segment that there is not."""
        super().__post_init__()
        self._require("gamma", 0 <= self.gamma <= 1, "in [0, 1]")
        self._require("lam", 0 <= self.lam <= 1, "in [0, 1]")
        self._without_effect(
            "first_segment",
            self.segmenter != "low_probability",
            "set segmenter to low_probability: the others begin at the first token",
        )

    @property
    def takes_offered_rows(self) -> bool:
        """True: what a segment changed is known from its own row."""
        return True

    @property
    def asks_first(self) -> bool:
        """Whether the value of the prompt is asked though its first token was not in doubt."""
        return self.first_segment == "value"

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """What each segment changed, at its doubtful tokens.

        Raises:
            ValueError: values are missing.
        """
        if values is None:
            raise ValueError(
                "SPOChain needs values at the cuts and got none; set critic: {name: monte_carlo}"
            )
        starts = values.starts & rollouts.action_mask
        at = values.at.masked_fill(~starts, 0.0)
        advantages = segment_gae(
            self.shaped_rewards(rollouts),
            at,
            starts,
            torch.zeros_like(values.bootstrap),
            gamma=self.gamma,
            lam=self.lam,
            action_mask=rollouts.action_mask,
        )
        asked = starts & self.policy_mask(rollouts)
        outcomes = rollouts.rewards.sum(dim=1, keepdim=True).expand_as(at)
        explained = explained_variance(at, outcomes, asked, sum_across=sum_across)
        return self.make_credit(
            rollouts,
            self.normalized(advantages, rollouts, sum_across),
            sum_across=sum_across,
            metrics={
                "critic/values/mean": mean_over(at, asked),
                "critic/vf_explained_var": Last(explained),
                **segment_metrics(rollouts, starts),
            },
        )
