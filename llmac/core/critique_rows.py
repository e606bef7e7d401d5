"""What a step of critiques leaves to learn from: critiques with a reward, or right answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmac.core.exchange import Attempt, Exchange, Said
from llmac.core.measures import Measure, Sum
from llmac.core.protocols import Player
from llmac.core.refinement import Judge, passes_barrier
from llmac.core.types import Prompt, Trajectory

REFINED = "refined"
"""In `reward_parts` of rows for the actor: 1 where the answer followed a critique, 0 where it is a first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Which answers an actor learns by heart."""

    also_right: bool = False
    """Whether right answers are criticised and refined too."""
    reserved: int = 1
    """Most refinements of one critique."""
    learned_as: Literal["question", "critique", "both"] = "question"
    """What a refined answer is an answer to: the question alone, or question, answer and critique."""
    barrier: bool = True
    """Whether refined answers that have stopped reasoning are left out (`passes_barrier`)."""
    solution_column: str | None = None
    """Column of the data with a reference solution, for the barrier; None: there is none."""


def critiques_as_rows(
    exchanges: Sequence[Exchange], judge: Judge, policy: Player
) -> list[Trajectory]:
    """Critiques as responses; those of one answer are siblings."""
    rows: list[Trajectory] = []
    for exchange in exchanges:
        outcome, attempt = exchange.outcome, exchange.attempt
        after = outcome.after
        prompt = Prompt(
            id=f"{attempt.prompt.id}/{exchange.number}",
            token_ids=exchange.critique.prompt_ids,
            source=policy.decode(exchange.critique.prompt_ids),
            columns=attempt.prompt.columns,
        )
        parts = {
            "answer": outcome.before,
            "discrimination": outcome.agreement,
            REFINED: sum(after) / len(after) if after else None,
        }
        rows.append(
            _row(
                prompt,
                exchange.critique,
                group=exchange.number,
                reward=judge.worth(outcome),
                parts=parts,
            )
        )
    return rows


def refinements_as_rows(
    attempts: Sequence[Attempt], exchanges: Sequence[Exchange], keep: Keep, policy: Player
) -> tuple[list[Trajectory], dict[str, Measure]]:
    """Right answers, first and refined, rows of a question together; never none at all.

    A refined answer that is learned as one to the question alone was sampled to another prompt: its
    `sampler_logprobs` are 0, and mean nothing.

    Returns:
        rows: of reward 1; or a single one of reward 0 where nothing is right.
        metrics: `critique/answers_learned`, `critique/refinements_learned`,
            `critique/refinements_barred`.

    Raises:
        ValueError: the data has no column of that name.
    """
    by_question: dict[int, list[Trajectory]] = {}
    first, barred = 0, 0
    for attempt in attempts:
        if attempt.answer.right:
            row = _right(attempt.prompt, attempt.answer.said, attempt.question, refined=False)
            by_question.setdefault(attempt.question, []).append(row)
            first += 1
    refined = 0
    for exchange in exchanges:
        attempt = exchange.attempt
        right = [one.said for one in exchange.refined if one.right]
        reasoned = [said for said in right if _reasons(said, attempt, keep)]
        barred += len(right) - len(reasoned)
        for said in reasoned[: keep.reserved]:
            rows = by_question.setdefault(attempt.question, [])
            rows += _learned(said, attempt, keep, policy)
            refined += 1
    rows = [row for number in sorted(by_question) for row in by_question[number]]
    counts: dict[str, Measure] = {
        "critique/answers_learned": Sum(float(first)),
        "critique/refinements_learned": Sum(float(refined)),
        "critique/refinements_barred": Sum(float(barred)),
    }
    if not rows:
        said = attempts[0].answer.said
        rows = [_row(attempts[0].prompt, said, group=0, reward=0.0, parts={REFINED: 0.0})]
    return rows, counts


def _learned(said: Said, attempt: Attempt, keep: Keep, policy: Player) -> list[Trajectory]:
    rows: list[Trajectory] = []
    if keep.learned_as != "critique":
        rows.append(_right(attempt.prompt, said, attempt.question, refined=True, elsewhere=True))
    if keep.learned_as != "question":
        prompt = Prompt(
            id=f"{attempt.prompt.id}/refined",
            token_ids=said.prompt_ids,
            source=policy.decode(said.prompt_ids),
            columns=attempt.prompt.columns,
        )
        rows.append(_right(prompt, said, attempt.question, refined=True))
    return rows


def _reasons(said: Said, attempt: Attempt, keep: Keep) -> bool:
    if not keep.barrier:
        return True
    solution: str | None = None
    if keep.solution_column is not None:
        columns = attempt.prompt.columns
        if keep.solution_column not in columns:
            raise ValueError(
                f"solution_column is {keep.solution_column}, and the data has "
                f"{', '.join(columns) or 'no columns'}; name one of these, or leave it None"
            )
        solution = str(columns[keep.solution_column])
    return passes_barrier(said.text, attempt.answer.said.text, solution)


def _right(
    prompt: Prompt, said: Said, group: int, *, refined: bool, elsewhere: bool = False
) -> Trajectory:
    parts: dict[str, float | None] = {REFINED: float(refined)}
    return _row(prompt, said, group=group, reward=1.0, parts=parts, elsewhere=elsewhere)


def _row(
    prompt: Prompt,
    said: Said,
    *,
    group: int,
    reward: float,
    parts: dict[str, float | None],
    elsewhere: bool = False,
) -> Trajectory:
    completion = said.completion
    count = len(completion.token_ids)
    return Trajectory(
        prompt=prompt,
        response_ids=completion.token_ids,
        action_mask=(True,) * count,
        sampler_logprobs=(0.0,) * count if elsewhere else completion.logprobs,
        finish=completion.finish,
        group=group,
        reward=reward,
        reward_parts=parts,
        response_text=said.text,
        policy_version=completion.policy_version,
    )
