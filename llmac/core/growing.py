"""Going on with a response that has begun: what an engine adds to it, and where that ends it."""

import dataclasses

from llmac.core.protocols import Completion, Decode, SamplingParams
from llmac.core.types import Finish, Trajectory

CUT_CHARACTER = 8
"""Tokens more than a stop string has bytes: a text that is read from the middle of a character, or
of a word, on may begin otherwise."""


def continued(
    before: Trajectory,
    completion: Completion,
    *,
    asked: int,
    sampling: SamplingParams,
    decode: Decode | None,
) -> Trajectory:
    """The response with what the engine added. `fresh_from` is where that begins.

    It is `PAUSED` when the engine gave all that it was asked for and the length limit leaves room
    for more. An engine that stopped short of what it was asked for has no room to go on, and the
    response is at its end like one at the limit.

    A stop string that begins in `before` and ends in the addition is found in the text of both: an
    engine that is asked only to continue cannot see it. The tokens behind it are cut off. Without
    stop strings nothing is decoded; with them, some tokens on both sides of where the two meet.

    Args:
        before: what the engine was asked to continue; may have no tokens yet, and has no stop
            string: it would have ended there.
        completion: its answer.
        asked: most new tokens it was asked for.
        sampling: `max_new_tokens` is the length limit of the whole response.
        decode: text of token ids; needed when `sampling.stop` is not empty (`refuse_blind_stops`).
    """
    fresh_from = len(before.response_ids)
    tokens = (*before.response_ids, *completion.token_ids)
    finish, length = completion.finish, _stop_place(tokens, fresh_from, sampling.stop, decode)
    if length is not None:
        finish = Finish.STOP
    elif finish is Finish.LENGTH and fresh_from + asked < sampling.max_new_tokens:
        finish = Finish.PAUSED if len(completion.token_ids) == asked else Finish.LENGTH
    return dataclasses.replace(
        before,
        response_ids=tokens[:length],
        action_mask=(*before.action_mask, *(True,) * len(completion.token_ids))[:length],
        sampler_logprobs=(*before.sampler_logprobs, *completion.logprobs)[:length],
        finish=finish,
        fresh_from=fresh_from,
        policy_version=completion.policy_version,
    )


def refuse_blind_stops(sampling: SamplingParams, decode: Decode | None, *, part: str) -> None:
    """Refuse to sample in parts what only text ends, with no way to read text.

    Args:
        sampling: whose stop strings.
        decode: text of token ids.
        part: what the caller calls a part: window, segment.

    Raises:
        ValueError: there are stop strings and no `decode`.
    """
    if sampling.stop and decode is None:
        raise ValueError(
            f"stop strings {list(sampling.stop)} may begin in one {part} and end in the "
            "next, which only text shows; give `decode`, or stop at token ids"
        )


def _stop_place(
    tokens: tuple[int, ...], fresh_from: int, stops: tuple[str, ...], decode: Decode | None
) -> int | None:
    """Length at which a stop string is complete that the engine could not see; None: there is none."""
    if decode is None or not stops or fresh_from == 0:
        return None
    # A token is a byte at least, so this many on each side hold what reaches over the border.
    reach = CUT_CHARACTER + max(len(stop.encode()) for stop in stops)
    start, end = max(0, fresh_from - reach), min(len(tokens), fresh_from + reach)

    def has_stop(length: int) -> bool:
        text = decode(tokens[start:length])
        return any(stop in text for stop in stops)

    if not has_stop(end):
        return None
    return next(n for n in range(fresh_from + 1, end + 1) if has_stop(n))
