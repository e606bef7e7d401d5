"""What is sampled, and what comes of it: candidates, and the one that was chosen."""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from llmac.core.plans import request_seed
from llmac.core.protocols import Completion, Encode, Player, Request, SamplingParams
from llmac.core.types import Finish, Messages, Prompt
from llmac.decoding.values import SaysValues, last_state
from llmac.errors import ConfigError

Written = str | Messages | Prompt
"""A prompt: text, chat messages, or with token ids already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One response that might be given."""

    response_ids: tuple[int, ...]
    text: str
    """Without special tokens."""
    finish: Finish
    logprob: float
    """log μ of the response under what it was drawn from."""
    value: float | None = None
    """Of its last state; None: nobody was asked."""
    answer: Hashable | None = None
    """What it votes for; None: nothing, because it was cut, says no answer, or nobody votes."""

    @property
    def finished(self) -> bool:
        """Ended by the policy, not cut."""
        return self.finish is Finish.STOP


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What became of a prompt."""

    prompt: Prompt
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    """All that were left to choose from, the chosen one among them."""
    sampled_tokens: int
    """Everything that was sampled, also what was discarded on the way."""
    valued_states: int = 0
    """States that somebody was asked to value."""
    support: float | None = None
    """Part of the votes, or of their weights, that the chosen answer got; None: there was no vote."""


def prompts_of(encode: Encode, asked: Sequence[Written]) -> list[Prompt]:
    """Prompts with token ids.

    Raises:
        ConfigError: there are none.
    """
    if not asked:
        raise ConfigError("there are no prompts; expected at least one")
    return [
        one
        if isinstance(one, Prompt)
        else Prompt(id=f"prompt {number}", token_ids=encode(one), source=one)
        for number, one in enumerate(asked)
    ]


def sample(
    player: Player, prompts: Sequence[Prompt], n: int, sampling: SamplingParams
) -> list[list[Candidate]]:
    """`n` responses to each prompt; the same for the same `sampling.seed`.

    Raises:
        ConfigError: n is below 1.
    """
    if n < 1:
        raise ConfigError(f"n is {n}; expected at least 1 response to a prompt")
    requests = [
        Request(prompt_ids=prompt.token_ids, params=seeded(sampling, number, n=n))
        for number, prompt in enumerate(prompts)
    ]
    return [
        [candidate(player, c.token_ids, c.finish, summed(c)) for c in completions]
        for completions in player.engine.generate(requests)
    ]


def seeded(sampling: SamplingParams, number: int, *, n: int) -> SamplingParams:
    """The parameters of one request of many: each has numbers of its own."""
    seed = None if sampling.seed is None else request_seed(sampling.seed, number)
    return dataclasses.replace(sampling, n=n, seed=seed)


def candidate(player: Player, ids: Sequence[int], finish: Finish, logprob: float) -> Candidate:
    """A response that nobody has valued yet."""
    text = player.read(ids)
    return Candidate(response_ids=tuple(ids), text=text, finish=finish, logprob=logprob)


def summed(completion: Completion) -> float:
    """Log μ of the whole completion."""
    return math.fsum(completion.logprobs)


def tokens(candidates: Sequence[Candidate]) -> int:
    """Response tokens of all of them."""
    return sum(len(c.response_ids) for c in candidates)


def valued(
    says: SaysValues, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]]
) -> list[list[Candidate]]:
    """The same candidates with the values of their last states; all are asked for at once."""
    states = [
        last_state(prompt, c.response_ids, c.finish)
        for prompt, siblings in zip(prompts, candidates, strict=True)
        for c in siblings
    ]
    values = iter(says.values_of(states))
    return [[dataclasses.replace(c, value=next(values)) for c in s] for s in candidates]
