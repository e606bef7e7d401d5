"""The halves of cards in which one model criticises the answers of another one, in words.

    Critiquing      what is said, and who the frozen player is
    Verdict         critiques end with a verdict
    CriticLearns    the policy criticises; a frozen actor answers and refines

Made for Critique-RL, arXiv:2510.24320; RL4F, arXiv:2305.08844; AutoMathCritique, arXiv:2411.16579.
The plan is `core.critique.Critique`.
"""

import dataclasses
import math
from dataclasses import dataclass

from llmac.core.critique import Critique
from llmac.core.protocols import RolloutPlan, SamplingParams
from llmac.core.refinement import Judge
from llmac.core.verdicts import VerdictLine, Verdicts
from llmac.core.wording import CRITIQUE, FEEDBACK, REFINEMENT, REFINEMENT_TURN, Wording, fill

from .base import Algorithm


@dataclass(frozen=True, kw_only=True)
class Critiquing(Algorithm):
    """The half that says who the frozen player is, and what the two are told."""

    partner_model: str | None = None
    """The player that does not learn: Hub id or folder. None: what the policy began as
    (`model.name`)."""
    chat: bool = True
    """Whether prompts that players write are chat messages; False: plain text, for base models."""
    critique_prompt: str | None = None
    """Asks for a critique; with {question} and {answer}. None: `core.wording.CRITIQUE`, where
    critiques have a verdict, else `FEEDBACK`."""
    refine_prompt: str | None = None
    """Asks for a refined answer; with {critique}, and without `chat` also {question} and {answer}.
    None: `core.wording.REFINEMENT_TURN`, or `REFINEMENT`."""
    solved_at: float = 1.0
    """Reward of an answer that counts as right."""

    def __post_init__(self) -> None:
        """Refuse templates that withhold the answer."""
        super().__post_init__()
        self._require("partner_model", self.partner_model != "", "a Hub id or folder, or None")
        self._require("solved_at", math.isfinite(self.solved_at), "finite, in the unit of rewards")
        self.wording()

    def verdicts(self) -> Verdicts | None:
        """Reads the end of a critique; None: it has no verdict."""
        return None

    def critique_template(self) -> str:
        """What asks for a critique where the recipe has no words of its own."""
        return FEEDBACK

    def wording(self) -> Wording:
        """Both templates."""
        refinement = REFINEMENT_TURN if self.chat else REFINEMENT
        own, refine = self.critique_prompt, self.refine_prompt
        return Wording(
            critique=self.critique_template() if own is None else own,
            refinement=refinement if refine is None else refine,
            chat=self.chat,
        )


@dataclass(frozen=True, kw_only=True)
class Verdict(Critiquing):
    """The half whose critiques end with a line that says whether the answer is right."""

    verdict_marker: str = "Correctness of the final answer:"
    """What introduces the verdict in a critique. Critique-RL's line."""
    right_word: str = "Correct"
    """The verdict on a right answer. Critique-RL's."""
    wrong_word: str = "Wrong"
    """The verdict on a wrong answer. Critique-RL's."""

    def __post_init__(self) -> None:
        """Refuse words that cannot be told apart."""
        super().__post_init__()
        self.verdicts()

    def verdicts(self) -> Verdicts:
        """Reads the verdict line."""
        return VerdictLine(marker=self.verdict_marker, right=self.right_word, wrong=self.wrong_word)

    def critique_template(self) -> str:
        """Asks for labels on the steps, and for the line that is read."""
        either = f'either "{self.right_word}" or "{self.wrong_word}"'
        return fill(CRITIQUE, {"marker": self.verdict_marker, "verdict": either})


@dataclass(frozen=True, kw_only=True)
class CriticLearns(Critiquing):
    """The half in which the policy is the critic, and the frozen partner answers and refines.

    `group_size` critiques of each of `answers_per_prompt` answers are siblings. Sampling of the
    critiques is the recipe's (`rollout`); the actor's is here.
    """

    answers_per_prompt: int = 1
    """Answers of the frozen actor to each prompt that are criticised."""
    answers_sampled: int | None = None
    """Answers sampled for each prompt, from which each process draws those to criticise, half of
    them right and half wrong as far as it has so many. None: as many as are criticised. Critique-RL
    samples answers beforehand; how right and wrong ones are balanced is not known to us."""
    answer_temperature: float = 0.7
    """Of the actor's first answers. Critique-RL's."""
    answer_tokens: int = 1024
    """Most tokens of a first answer. Our choice: what Critique-RL allows a refinement."""
    refinements_per_critique: int = 1
    """Refined answers to each critique; their rewards are averaged."""
    refine_temperature: float = 0.0
    """Of the actor's refined answers; 0: greedy, which Critique-RL and RL4F do."""
    refine_tokens: int = 1024
    """Most tokens of a refined answer. Critique-RL's; RL4F: 150."""

    def __post_init__(self) -> None:
        """Refuse players that say nothing."""
        super().__post_init__()
        for name in ("answers_per_prompt", "answer_tokens", "refinements_per_critique"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("refine_tokens", self.refine_tokens >= 1, "at least 1")
        for name in ("answer_temperature", "refine_temperature"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "finite and at least 0")
        several = self.answers_sampled
        self._require(
            "answers_sampled",
            several is None or several >= self.answers_per_prompt,
            f"None, or at least answers_per_prompt, {self.answers_per_prompt}",
        )
        self._require(
            "answer_temperature",
            self.answer_temperature > 0 or (several or self.answers_per_prompt) == 1,
            "above 0 where several answers to a prompt are sampled: greedy ones are all the same",
        )
        self._require(
            "refinements_per_critique",
            self.refine_temperature > 0 or self.refinements_per_critique == 1,
            "1 where refine_temperature is 0: greedy refinements are all the same",
        )
        if not self.refines:
            for name in ("refine_temperature", "refine_tokens", "refinements_per_critique"):
                self._without_effect(name, True, "set stage to 2")

    @property
    def refines(self) -> bool:
        """Whether anybody is asked for refined answers."""
        return True

    def reward_of_critiques(self) -> Judge:
        """What a critique is worth."""
        raise NotImplementedError(f"{type(self).__name__} must say what a critique is worth")

    def plan(self, *, prompts_per_step: int, sampling: SamplingParams) -> RolloutPlan:
        """The actor answers, the policy criticises, the actor refines."""
        refinements = SamplingParams(
            n=self.refinements_per_critique,
            temperature=self.refine_temperature,
            max_new_tokens=self.refine_tokens,
        )
        return Critique(
            trains="critic",
            prompts_per_step=prompts_per_step,
            answers=SamplingParams(
                n=self.answers_sampled or self.answers_per_prompt,
                temperature=self.answer_temperature,
                max_new_tokens=self.answer_tokens,
            ),
            critiques=dataclasses.replace(sampling, n=self.group_size),
            refinements=refinements if self.refines else None,
            wording=self.wording(),
            solved_at=self.solved_at,
            verdicts=self.verdicts(),
            judge=self.reward_of_critiques(),
            answers_kept=self.answers_per_prompt if self.answers_sampled else None,
            partner_model=self.partner_model,
        )
