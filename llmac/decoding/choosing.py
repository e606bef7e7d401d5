"""Sample whole responses, and choose: the one worth most, or the answer that most of them, or most value, stand for."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Sequence

import torch

from llmac.core.guidance import partition, pick, vote
from llmac.core.protocols import Player, SamplingParams
from llmac.core.types import Prompt
from llmac.decoding.candidates import (
    Candidate,
    Decoded,
    Written,
    prompts_of,
    sample,
    tokens,
    valued,
)
from llmac.decoding.values import Valuer, speaker

logger = logging.getLogger(__name__)

Extract = Callable[[str], Hashable | None]
"""Text of a response to its answer; None: it has none, and does not vote."""
Same = Callable[[Hashable, Hashable], bool]
"""Whether two answers are one; symmetric."""


def equal(one: Hashable, other: Hashable) -> bool:
    """The plainest `Same`."""
    return one == other


def best_of_n(
    player: Player,
    value: Valuer,
    prompts: Sequence[Written],
    n: int,
    *,
    sampling: SamplingParams | None = None,
) -> list[Decoded]:
    """The response worth most of `n`, among those that ended by themselves.

    At most `core.guidance.best_of_n_kl(n)` nats from the policy.

    Args:
        player: who samples.
        value: who says values; see `values.last_state` for the states that are asked about.
        prompts: text, chat messages, or `Prompt`s.
        n: responses to each.
        sampling: how; None: the defaults of `SamplingParams`.

    Raises:
        ConfigError: no prompts, or n below 1.
    """
    found, says = prompts_of(player.encode, prompts), speaker(value)
    candidates = valued(says, found, sample(player, found, n, sampling or SamplingParams()))
    return [
        Decoded(
            prompt=prompt,
            chosen=worth_most(siblings),
            candidates=tuple(siblings),
            sampled_tokens=tokens(siblings),
            valued_states=n,
        )
        for prompt, siblings in zip(found, candidates, strict=True)
    ]


def majority_vote(
    player: Player,
    prompts: Sequence[Written],
    n: int,
    *,
    answer: Extract,
    same: Same = equal,
    sampling: SamplingParams | None = None,
) -> list[Decoded]:
    """The answer that most of `n` responses give; no critic is asked. Wang et al. 2022, arXiv:2203.11171.

    Args:
        player: who samples.
        prompts: text, chat messages, or `Prompt`s.
        n: responses to each.
        answer: finds what a response votes for; cut responses do not vote.
        same: which answers are one.
        sampling: how; None: the defaults of `SamplingParams`.

    Returns:
        Chosen is the likeliest of the responses that give the answer.
    """
    found = prompts_of(player.encode, prompts)
    candidates = sample(player, found, n, sampling or SamplingParams())
    return [
        voted(prompt, siblings, answer=answer, same=same, sampled_tokens=tokens(siblings))
        for prompt, siblings in zip(found, candidates, strict=True)
    ]


def weighted_vote(
    player: Player,
    value: Valuer,
    prompts: Sequence[Written],
    n: int,
    *,
    answer: Extract,
    same: Same = equal,
    worst: float = 0.0,
    sampling: SamplingParams | None = None,
) -> list[Decoded]:
    """The answer of `n` responses that is worth most: the sum of max(V - worst, 0) over those that give it.

    Args:
        player: who samples.
        value: who says values.
        prompts: text, chat messages, or `Prompt`s.
        n: responses to each.
        answer: finds what a response votes for; cut responses do not vote.
        same: which answers are one.
        worst: reward of a failure, so that a response that certainly failed weighs nothing.
        sampling: how; None: the defaults of `SamplingParams`.

    Returns:
        Chosen is the one worth most of the responses that give the answer.
    """
    found, says = prompts_of(player.encode, prompts), speaker(value)
    candidates = valued(says, found, sample(player, found, n, sampling or SamplingParams()))
    return [
        voted(
            prompt,
            siblings,
            answer=answer,
            same=same,
            worst=worst,
            sampled_tokens=tokens(siblings),
            valued_states=n,
        )
        for prompt, siblings in zip(found, candidates, strict=True)
    ]


def worth_most(candidates: Sequence[Candidate]) -> Candidate:
    """The best by value, or by likelihood where nobody was asked; cut ones only if all were cut."""
    worth = [c.logprob if c.value is None else c.value for c in candidates]
    finished = torch.tensor([c.finished for c in candidates])
    return candidates[pick(torch.tensor(worth, dtype=torch.float64), finished)]


def voted(
    prompt: Prompt,
    candidates: Sequence[Candidate],
    *,
    answer: Extract,
    same: Same,
    worst: float = 0.0,
    sampled_tokens: int,
    valued_states: int = 0,
) -> Decoded:
    """The outcome of a vote, weighted where candidates have values; without voters, the candidate worth most."""
    ballots = [
        dataclasses.replace(c, answer=answer(c.text)) if c.finished else c for c in candidates
    ]
    voters = [c for c in ballots if c.answer is not None]
    chosen, support = worth_most(ballots), None
    if voters:
        groups = partition([c.answer for c in voters], same)
        weights = [1.0 if c.value is None else _weight(c.value, worst) for c in voters]
        winner = vote(groups, weights)
        theirs = [place for place, group in enumerate(groups) if group == winner]
        chosen = worth_most([voters[place] for place in theirs])
        total = sum(weights)
        support = sum(weights[place] for place in theirs) / total if total > 0 else None
    return Decoded(
        prompt=prompt,
        chosen=chosen,
        candidates=tuple(ballots),
        sampled_tokens=sampled_tokens,
        valued_states=valued_states,
        support=support,
    )


def _weight(value: float, worst: float) -> float:
    """Of a vote: what it is worth above a failure; nobody votes against an answer."""
    if value < worst:
        _warn_of_less_than_a_failure(worst)
    return max(value - worst, 0.0)


@functools.cache
def _warn_of_less_than_a_failure(worst: float) -> None:
    logger.warning(
        "responses are valued below worst = %g, the reward of a failure, and their votes weigh nothing; give the "
        "lowest reward there is as worst",
        worst,
    )
