"""Who writes what a critic should have written: a function, or another language model."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmac.core.plans import request_seed
from llmac.core.protocols import Player, Request, SamplingParams
from llmac.errors import DataError
from llmac.pretraining.trace_states import Chosen

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A state as a teacher is asked about it."""

    prompt: str
    """What the critic itself will read."""
    problem: str
    partial: str
    chosen: Chosen

    @property
    def told(self) -> dict[str, Any]:
        """What a function is told besides."""
        origin = self.chosen.state.origin
        return {
            "id": origin.prompt.id,
            "problem": self.problem,
            "partial": self.partial,
            "outcome": self.chosen.outcome,
            "position": self.chosen.state.position,
            "length": len(origin.response_ids),
            "columns": dict(origin.prompt.columns),
        }


def ask_function(
    function: Callable[..., object], questions: Sequence[Question]
) -> list[str | None]:
    """What `function(prompt, told)` says about each.

    Raises:
        DataError: it raised, or returned something else than text or None; names the response.
    """
    words: list[str | None] = []
    for question in questions:
        about = (
            f"about token {question.chosen.state.position} of a response to prompt "
            f"{question.chosen.state.origin.prompt.id}"
        )
        try:
            said = function(question.prompt, question.told)
        except Exception as error:  # a user's code may raise anything
            raise DataError(
                f"the teacher raised {type(error).__name__}: {error}, asked {about}"
            ) from error
        if said is not None and not isinstance(said, str):
            raise DataError(
                f"the teacher returned a {type(said).__name__} {about}; expected text, or None where it has nothing "
                "to say"
            )
        words.append(said)
    return words


def ask_model(
    teacher: Player,
    questions: Sequence[Question],
    *,
    chat: bool,
    params: SamplingParams,
    seed: int,
    most_tokens: int | None = None,
) -> list[str | None]:
    """What a language model writes about each; None about those whose prompt is too long, which are counted in the log.

    Args:
        teacher: the model.
        questions: any number.
        chat: put them into its chat template.
        params: how to sample; `n` and `seed` are set here.
        seed: of all of it.
        most_tokens: longest prompt; None: no limit is known.
    """
    prompts = [
        teacher.encode([{"role": "user", "content": question.prompt}] if chat else question.prompt)
        for question in questions
    ]
    fitting = [n for n, ids in enumerate(prompts) if most_tokens is None or len(ids) <= most_tokens]
    if len(fitting) < len(prompts):
        logger.warning(
            "%d of %d states are left out: their prompts have more than the %s tokens that the teacher can read",
            len(prompts) - len(fitting),
            len(prompts),
            most_tokens,
        )
    requests = [
        Request(
            prompt_ids=prompts[number],
            params=SamplingParams(
                temperature=params.temperature,
                max_new_tokens=params.max_new_tokens,
                stop=params.stop,
                seed=request_seed(seed, number),
            ),
        )
        for number in fitting
    ]
    words: list[str | None] = [None] * len(prompts)
    for number, (answer,) in zip(fitting, teacher.engine.generate(requests), strict=True):
        words[number] = teacher.read(answer.token_ids)
    return words
