"""A critic learns its own critiques that help: AutoMathCritique's Monte-Carlo filter, arXiv:2411.16579.

The policy criticises the answers of a frozen actor (`partner_model`), which refines each several
times; critiques after which it is often enough right are learned by maximum likelihood. The
authors filter the critiques of an annotator with it, before supervised training: the same with
`llmac rollouts` and `sft`.
"""

from dataclasses import dataclass

from llmac.core.refinement import Judge, SoftFilter

from .critiquing import CriticLearns, Verdict
from .rewarded_likelihood import RewardedLikelihood


@dataclass(frozen=True, kw_only=True)
class CritiqueFilter(Verdict, CriticLearns, RewardedLikelihood):
    """Critiques that help: mean -log π of those whose refinements are right often enough.

        V(x, y, c) = (1/K) Σ_k 1[y'_k right]
        learn c where  V >= tau  if y is wrong,   V >= 1 - tau  if y is right

    K is `refinements_per_critique`. What is kept of right answers is our completion.
    """

    group_size: int = 4
    """Critiques of each answer. Our choice: Critique-RL's."""
    refinements_per_critique: int = 10
    """K. 10, as far as is known to us."""
    refine_temperature: float = 0.7
    """Of the actor's refined answers. That of AutoMathCritique's self-improvement."""
    tau: float = 0.3
    """Least share of refinements of a wrong answer that are right. About .3, as far as is known."""

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        super().__post_init__()
        self._require("tau", 0 < self.tau < 1, "between 0 and 1")

    def reward_of_critiques(self) -> Judge:
        """1 for those that are kept, else 0."""
        return SoftFilter(tau=self.tau)
