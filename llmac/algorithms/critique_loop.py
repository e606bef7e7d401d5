"""Critiques in the loop: an actor learns the right answers that a frozen critic has led it to.

AutoMathCritique's self-improvement, arXiv:2411.16579, and CGI, arXiv:2503.16024. The policy answers;
a frozen critic (`partner_model`) criticises; the policy refines; what is right is learned by
maximum likelihood. Needs: `partner_model`, a critic that writes.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.critique import Critique
from llmac.core.critique_rows import REFINED, Keep
from llmac.core.mixtures import set_weights
from llmac.core.protocols import RolloutPlan, SamplingParams
from llmac.core.types import AllSum, Rollouts

from .critiquing import Verdict
from .rewarded_likelihood import RewardedLikelihood


@dataclass(frozen=True, kw_only=True)
class CritiqueLoop(Verdict, RewardedLikelihood):
    """Critique in the loop: mean -log π of right answers, first and refined.

        loss = - (1/N) Σ_it w_it log π_θ(a_it | s_it)        over answers that are right

    w is 1, or with `weighing: sets` as large as it takes for both sets to weigh what they should:
    loss = (1 - refined_share) · mean over first answers + refined_share · mean over refined ones.

    Every step learns from what the policy says now. Both papers sample with an actor, train the
    *base* model on it, and begin again: `llmac rollouts` keeps such answers in a file for `sft`.
    """

    group_size: int = 5
    """First answers to each prompt. 5: AutoMathCritique's code, and CGI's candidates."""
    critiques_per_answer: int = 1
    """Critiques of each answer that is criticised. AutoMathCritique's code: one, greedy."""
    critique_temperature: float = 0.0
    """Of the frozen critic; 0: greedy (AutoMathCritique)."""
    critique_tokens: int = 1536
    """Most tokens of a critique. Critique-RL's; AutoMathCritique's is not known to us."""
    refinements_per_critique: int = 4
    """Attempts to refine after each critique. Our choice."""
    criticise: Literal["wrong", "all"] = "wrong"
    """Which answers are criticised. wrong: AutoMathCritique; all: CGI."""
    reserved: int = 1
    """Most refined answers of one critique that are learned. AutoMathCritique's code."""
    learn_as: Literal["question", "critique", "both"] = "question"
    """What a refined answer is learned as an answer to. question: x -> y' (AutoMathCritique);
    critique: (x, y, c) -> y', so that the actor learns to use critiques (CGI); both."""
    barrier: bool = True
    """Whether a refined answer is left out that has fewer than min(n(solution), n(y)) - 2 groups of
    digits: it states a result and reasons no more. AutoMathCritique."""
    solution_column: str | None = None
    """Column of the data with a reference solution, for the barrier. None: n(y) alone, ours."""
    weighing: Literal["tokens", "sets"] = "tokens"
    """tokens: all weigh the same (AutoMathCritique); sets: first and refined answers have the
    weights of `refined_share` whatever their numbers (CGI)."""
    refined_share: float = 0.5
    """Weight of refined answers with `weighing: sets`. CGI gives both sets the same."""

    def __post_init__(self) -> None:
        """Refuse what is about responses that are compared, and keys nothing would read."""
        super().__post_init__()
        for name in (
            "critiques_per_answer",
            "critique_tokens",
            "refinements_per_critique",
            "reserved",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require(
            "critique_temperature",
            0 <= self.critique_temperature < math.inf,
            "finite and at least 0",
        )
        self._require(
            "critiques_per_answer",
            self.critique_temperature > 0 or self.critiques_per_answer == 1,
            "1 where critique_temperature is 0: greedy critiques are all the same",
        )
        self._require(
            "reserved",
            self.reserved <= self.refinements_per_critique,
            f"at most refinements_per_critique, {self.refinements_per_critique}",
        )
        self._require("refined_share", 0 <= self.refined_share <= 1, "in [0, 1]")
        self._without_effect("refined_share", self.weighing == "tokens", "set weighing to sets")
        self._without_effect("solution_column", not self.barrier, "set barrier to true")
        self._require(
            "solution_column", self.solution_column != "", "the name of a column, or None"
        )

    def plan(self, *, prompts_per_step: int, sampling: SamplingParams) -> RolloutPlan:
        """The policy answers, the critic criticises, the policy refines."""
        return Critique(
            trains="actor",
            prompts_per_step=prompts_per_step,
            answers=dataclasses.replace(sampling, n=self.group_size),
            critiques=SamplingParams(
                n=self.critiques_per_answer,
                temperature=self.critique_temperature,
                max_new_tokens=self.critique_tokens,
            ),
            refinements=dataclasses.replace(sampling, n=self.refinements_per_critique),
            wording=self.wording(),
            solved_at=self.solved_at,
            verdicts=self.verdicts(),
            keep=Keep(
                also_right=self.criticise == "all",
                reserved=self.reserved,
                learned_as=self.learn_as,
                barrier=self.barrier,
                solution_column=self.solution_column,
            ),
            partner_model=self.partner_model,
        )

    def token_weights(
        self, rollouts: Rollouts, mask: Bool[Tensor, "B T"], *, sum_across: AllSum
    ) -> Float[Tensor, "B T"]:
        """1, or what makes both sets weigh their share."""
        if self.weighing == "tokens":
            return super().token_weights(rollouts, mask, sum_across=sum_across)
        refined = [int(bool(t.reward_parts.get(REFINED))) for t in rollouts.trajectories]
        shares = 1 - self.refined_share, self.refined_share
        return set_weights(torch.tensor(refined), mask, shares, sum_across=sum_across)
