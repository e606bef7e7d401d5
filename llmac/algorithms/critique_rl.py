"""Critique-RL: a critic that writes, trained by what its critiques are worth (arXiv:2510.24320).

Stage 1 pays a critique for a true verdict on the answer, stage 2 for a right refined answer and a
true verdict, close to the critic of stage 1. The actor is frozen. Needs: `partner_model`, an actor
that can refine, and a policy that can write critiques (`sft` on some, before).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.baselines import leave_one_out
from llmac.core.kl import kl_shaped_rewards
from llmac.core.masking import whiten
from llmac.core.measures import Measure
from llmac.core.protocols import RolloutPlan, SamplingParams
from llmac.core.refinement import Form, Judge, RefineReward, StageReward
from llmac.core.returns import reward_to_go
from llmac.core.types import AllSum, Credit, Rollouts, Values, identity
from llmac.core.verdicts import ScoreLine, Verdicts
from llmac.core.wording import CRITIQUE, fill

from .base import mean_over
from .critiquing import CriticLearns, Verdict
from .rloo import RLOO


@dataclass(frozen=True, kw_only=True)
class CritiqueRL(RLOO, Verdict, CriticLearns):
    """Critique-RL: leave-one-out over critiques of one answer, KL token by token, whitened.

        Â_i  = clip(R_i - mean_{j≠i} R_j, ± advantage_clip)
        Â_it = whiten( Â_i - kl_coef · Σ_{t'≥t} log π_old/π_ref )

    R is `core.refinement.StageReward`: additive as in the paper, or gated as in the authors' code.
    The KL is to the model that the run starts from: a run of stage 2 whose `model.name` is the
    `final` folder of stage 1 stays close to the critic of stage 1, as the paper wants it.

    Deviations: a critique with both verdicts has none (`core.verdicts`), where the authors' code
    takes the one that pays; critiques are not cut to where their first step begins.
    """

    stage: Literal[1, 2] = 1
    """1: true verdicts are rewarded, and nobody refines; 2: right refined answers, too."""
    form: Form = "additive"
    """additive: r_refine + beta1 · r_dis, in stage 1 r_dis (the paper); gated: r_refine + .2 where
    the verdict is true, else -1, in stage 1 ±1 (the authors' code)."""
    refine_reward: RefineReward = "refine"
    """Stage 2, with o and o' the answer's and the refined answer's right or wrong: refine: o'
    (default of paper and code); delta: o' - o; correction: 1 where a wrong answer became right, .2
    where a right one stayed."""
    beta1: float = 0.2
    """Weight of the verdict in stage 2, additive. Main text and code; the appendix has another
    number."""
    verdict: Literal["correctness", "score"] = "correctness"
    """score: the critique says 1 to 10, and r_dis = max(0, 1 - |said - reward on that scale| /
    score_tolerance), for answers that are more or less good (appendix E)."""
    score_tolerance: float = 3.0
    """Distance of a score that earns nothing. The paper gives no value; ours."""
    score_range: tuple[float, float] = (0.0, 1.0)
    """Rewards that are worth scores of 1 and 10."""
    advantage_clip: float | None = 10.0
    """Largest |Â_i| before KL and whitening. 10 in the authors' code. None: no bound."""
    whiten_advantages: bool = True
    """Whether advantages get mean 0 and variance 1 over the tokens of the whole step. The authors'
    code: always."""
    kl_coef: float = 0.01
    """Of log π_old/π_ref, subtracted at each token. .01 in both stages of the authors' code."""

    def __post_init__(self) -> None:
        """Refuse what one of the stages, forms or verdicts would not read."""
        super().__post_init__()
        self._require("beta1", 0 <= self.beta1 < math.inf, "finite and at least 0")
        self._without_effect("beta1", self.stage == 1, "set stage to 2")
        self._without_effect("beta1", self.form == "gated", "set form to additive")
        self._without_effect("refine_reward", self.stage == 1, "set stage to 2")
        graded = self.verdict == "score"
        for name in ("right_word", "wrong_word"):
            self._without_effect(name, graded, "set verdict to correctness")
        for name in ("score_tolerance", "score_range"):
            self._without_effect(name, not graded, "set verdict to score")
        self._require(
            "form",
            not graded or self.form == "additive",
            "additive where verdict is score: a score is more or less true, and no gate",
        )
        self._require(
            "refine_reward",
            not graded or self.refine_reward != "correction",
            "refine or delta where verdict is score: correction is about right and wrong",
        )
        clip = self.advantage_clip
        self._require(
            "advantage_clip", clip is None or 0 < clip < math.inf, "None, or finite and above 0"
        )
        for name in ("dynamic_sampling", "allocation"):
            # Siblings are critiques of an answer that is sampled, not responses to a prompt.
            self._without_effect(name, True, "the plan of critiques has no use for it")

    @property
    def refines(self) -> bool:
        """In stage 2."""
        return self.stage == 2

    def plan(self, *, prompts_per_step: int, sampling: SamplingParams) -> RolloutPlan:
        """That of critiques, whose siblings are no responses to a prompt."""
        return CriticLearns.plan(self, prompts_per_step=prompts_per_step, sampling=sampling)

    def verdicts(self) -> Verdicts:
        """Reads right and wrong, or a score."""
        if self.verdict == "correctness":
            return super().verdicts()
        return ScoreLine(
            marker=self.verdict_marker,
            tolerance=self.score_tolerance,
            reward_range=self.score_range,
        )

    def critique_template(self) -> str:
        """Asks for the line that is read."""
        if self.verdict == "correctness":
            return super().critique_template()
        return fill(
            CRITIQUE, {"marker": self.verdict_marker, "verdict": "a score from 1 (worst) to 10"}
        )

    def reward_of_critiques(self) -> Judge:
        """That of the stage."""
        return StageReward(
            stage=self.stage,
            form=self.form,
            refine_reward=self.refine_reward,
            beta1=self.beta1,
            binary=self.verdict == "correctness",
        )

    def shaped_rewards(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """Rewards as they are: the KL comes after the comparison with siblings."""
        return rollouts.rewards

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """Leave-one-out, clipped, minus the KL still to come, whitened."""
        self._refuse_values(values)
        mask = self.policy_mask(rollouts)
        outcome = leave_one_out(self.scores(rollouts), rollouts.group)
        metrics: dict[str, Measure] = {}
        if self.advantage_clip is not None:
            outside = (outcome.abs() > self.advantage_clip)[:, None].expand_as(mask)
            metrics["critic/advantages/clipfrac"] = mean_over(outside, mask)
            outcome = outcome.clamp(-self.advantage_clip, self.advantage_clip)
        advantages = outcome[:, None] + self._price_to_go(rollouts, mask)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask, sum_across=sum_across)
        return self.make_credit(rollouts, advantages, sum_across=sum_across, metrics=metrics)

    def _price_to_go(self, rollouts: Rollouts, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """-kl_coef · Σ_{t'≥t} kl_t', where the KL is part of the reward."""
        nothing = torch.zeros_like(rollouts.rewards)
        if not self.kl_coef or self.kl_placement != "reward":
            return nothing
        if rollouts.ref_logprobs is None:
            raise ValueError(
                f"CritiqueRL has a KL term (kl_coef is {self.kl_coef}), and the rollouts carry no "
                "ref_logprobs; annotate them with a reference policy, or switch the term off"
            )
        priced = kl_shaped_rewards(
            nothing,
            rollouts.old_logprobs,
            rollouts.ref_logprobs,
            rollouts.action_mask,
            coef=self.kl_coef,
            kind=self.kl_estimator,
        )
        return reward_to_go(priced)
