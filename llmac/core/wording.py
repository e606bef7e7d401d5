"""How answers are shown to a critic, and critiques to whoever answered: templates and chat turns."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmac.core.types import Messages

CRITIQUE = """\
Check the solution below. For each of its steps in turn, repeat the step, label it right or wrong, and give the reason.
Then write one last line that begins with "{marker}" and goes on with {verdict}.

Question:
{question}

Solution:
{answer}
"""
"""Asks for a critique. What it asks for is Critique-RL's (arXiv:2510.24320), the words are ours."""

FEEDBACK = """\
Say in a few words what should be changed in the answer below, so that somebody else can repair it.

Question:
{question}

Answer:
{answer}

Feedback:
"""
"""Asks for a critique without a verdict: RL4F's task (arXiv:2305.08844), in our words."""

REFINEMENT_TURN = """\
Somebody has checked your solution step by step:

{critique}

Follow this critique, and write a new and complete solution."""
"""Asks for another answer, as the last turn of a chat. Content as in Critique-RL, words ours."""

REFINEMENT = """\
Question:
{question}

Solution:
{answer}

Critique of this solution:
{critique}

New and complete solution, following the critique:
"""
"""The same without a chat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """What the players are told. Placeholders are filled once: those in what is filled in stay text."""

    critique: str
    """With {question} and {answer}."""
    refinement: str
    """With {critique}; without a chat also with {question} and {answer}."""
    chat: bool = True
    """Whether the players are spoken to in chat messages, and not in plain text."""

    def __post_init__(self) -> None:
        """Refuse templates that withhold what they are about."""
        told = ("critique",) if self.chat else ("question", "answer", "critique")
        for name, template, needed in (
            ("critique", self.critique, ("answer",)),
            ("refinement", self.refinement, told),
        ):
            for key in needed:
                if f"{{{key}}}" not in template:
                    raise ValueError(
                        f"the {name} template has no {{{key}}}, so nobody would be shown it"
                        + ("" if self.chat else " (there is no chat that would say it)")
                    )

    def to_answer(self, question: str | Messages) -> str | Messages:
        """The question, as it is put to a player that is not the policy."""
        return _turns(question) if self.chat else _plain(question)

    def to_criticise(self, question: str | Messages, answer: str) -> str | Messages:
        """Question and answer, for the critic."""
        text = fill(self.critique, {"question": _text(question), "answer": answer})
        return [{"role": "user", "content": text}] if self.chat else text

    def to_refine(self, question: str | Messages, answer: str, critique: str) -> str | Messages:
        """Question, answer and critique, for whoever answers: three turns of a chat, or one text."""
        parts = {"question": _text(question), "answer": answer, "critique": critique}
        text = fill(self.refinement, parts)
        if not self.chat:
            return text
        turns = _turns(question)
        if turns[-1]["role"] == "assistant":  # the answer goes on with what was begun for it
            answer = f"{turns.pop()['content']}{answer}"
        return [
            *turns,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": text},
        ]


def fill(template: str, parts: Mapping[str, str]) -> str:
    """The template with `{name}` replaced by the part of that name, all at once.

    Braces in the parts, and other braces of the template, stay as they are.

    >>> fill("{a} and {b}, {c}", {"a": "{b}", "b": "x"})
    '{b} and x, {c}'
    """
    names = "|".join(map(re.escape, parts))
    return re.sub(r"\{(" + names + r")\}", lambda found: parts[found[1]], template)


def _turns(question: str | Messages) -> list[dict[str, Any]]:
    if isinstance(question, str):
        return [{"role": "user", "content": question}]
    return [dict(message) for message in question]


def _plain(question: str | Messages) -> str:
    if not isinstance(question, str):
        raise ValueError(
            "a question is a list of chat messages, and chat is false; set algorithm.chat to true, "
            "or name a column of strings"
        )
    return question


def _text(question: str | Messages) -> str:
    """The words of the question: of a chat, the last user's."""
    if isinstance(question, str):
        return question
    said = [str(message["content"]) for message in question if message["role"] == "user"]
    return said[-1] if said else ""
