"""One critique, what was before and after it, and what a step of them says: rows are made elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmac.core.measures import Mean, Measure
from llmac.core.protocols import Completion
from llmac.core.refinement import Outcome
from llmac.core.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a player wrote."""

    prompt_ids: tuple[int, ...]
    """What it was asked, in its own token ids."""
    completion: Completion
    text: str
    """Without special tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """An answer, first or refined, and what the reward functions say of it."""

    said: Said
    reward: float
    right: bool
    """Whether it counts as solved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A first answer."""

    question: int
    """Number of its prompt in the step, on this rank."""
    prompt: Prompt
    answer: Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """An answer, one critique of it, and the answers that followed."""

    attempt: Attempt
    number: int
    """Of the attempt among those that were criticised."""
    critique: Said
    verdict: bool | float | None
    agreement: float
    """How true the verdict is, 0 ... 1."""
    refined: tuple[Scored, ...]

    @property
    def outcome(self) -> Outcome:
        """The same as numbers."""
        return Outcome(
            before=self.attempt.answer.reward,
            before_right=self.attempt.answer.right,
            after=tuple(one.reward for one in self.refined),
            after_right=tuple(one.right for one in self.refined),
            agreement=self.agreement,
        )


def accuracies(
    attempts: Sequence[Attempt], exchanges: Sequence[Exchange], *, reads_verdicts: bool
) -> dict[str, Measure]:
    """How often answers are right before and after critiques, and how often critics are.

    Changes are counted over answers that were refined; where a critic has become too timid or too
    harsh, its truth splits: high on right answers and low on wrong ones, or the reverse.

    Args:
        attempts: all first answers.
        exchanges: all critiques.
        reads_verdicts: whether critiques end with a verdict.

    Returns:
        `critique/answer_accuracy`, `critique/refined_accuracy` (Acc@Refine), `critique/delta`,
        `critique/right_to_wrong`, `critique/wrong_to_right`; with verdicts
        `critique/discrimination` (Acc@Dis) with `/right_answers` and `/wrong_answers`, and
        `critique/verdict_missing`.
    """
    changes = [(e.attempt.answer.right, after.right) for e in exchanges for after in e.refined]
    measures: dict[str, Measure] = {
        "critique/answer_accuracy": _mean([a.answer.right for a in attempts]),
        "critique/refined_accuracy": _mean([after for _, after in changes]),
        "critique/delta": _mean([after - before for before, after in changes]),
        "critique/right_to_wrong": _mean([before and not after for before, after in changes]),
        "critique/wrong_to_right": _mean([after and not before for before, after in changes]),
    }
    if not reads_verdicts:
        return measures
    told = [(e.attempt.answer.right, e.agreement) for e in exchanges]
    return {
        **measures,
        "critique/discrimination": _mean([x for _, x in told]),
        "critique/discrimination/right_answers": _mean([x for right, x in told if right]),
        "critique/discrimination/wrong_answers": _mean([x for right, x in told if not right]),
        "critique/verdict_missing": _mean([e.verdict is None for e in exchanges]),
    }


def _mean(numbers: Sequence[float | int]) -> Mean:
    return Mean(float(sum(numbers)), float(len(numbers)))
