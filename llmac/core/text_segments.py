"""Segments that end where a pattern matches in the decoded text, mapped back to tokens exactly."""

import bisect
import difflib
import itertools
import re
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from llmac.core.protocols import Decode
from llmac.core.segments import after_ends

DELIMITERS = {
    "newline": r"\n+",
    "paragraph": r"\n\s*\n",
    "sentence": r"[.!?](?=[ \t])|\n+",
    "semicolon": ";",
}
"""Patterns that have a name. A sentence ends with its mark, or with its line; the space behind a
mark is not part of the match, because most vocabularies write it into the next word."""


def compile_delimiter(delimiter: str) -> re.Pattern[str]:
    """The pattern that a name of `DELIMITERS` stands for, or the regular expression itself.

    Raises:
        ValueError: a name that is misspelt, no regular expression, or one that matches where
            nothing is.

    >>> compile_delimiter("semicolon").pattern, compile_delimiter("[.;]").pattern
    (';', '[.;]')
    """
    plain = re.sub("[-_ ]", "", delimiter.lower())
    meant = difflib.get_close_matches(plain, DELIMITERS, n=1, cutoff=0.85)
    if meant and delimiter not in DELIMITERS:
        raise ValueError(
            f"{delimiter!r} is no name of a delimiter. Did you mean {meant[0]}? For these letters "
            f"in the text write (?:{delimiter})"
        )
    try:
        pattern = re.compile(DELIMITERS.get(delimiter, delimiter))
    except re.error as error:
        raise ValueError(
            f"a delimiter is one of {', '.join(DELIMITERS)}, or a regular expression; found "
            f"{delimiter!r}: {error}"
        ) from None
    if pattern.match("") is not None:
        raise ValueError(
            f"a delimiter matches something, and {delimiter!r} also matches nothing, so that every "
            "character would end a segment; write + instead of *"
        )
    return pattern


def after_text(
    responses: Sequence[Sequence[int]],
    action_mask: Bool[Tensor, "B T"],
    pattern: re.Pattern[str],
    decode: Decode,
) -> Bool[Tensor, "B T"]:
    """A segment from the first action token, and from each that follows a match of the pattern.

    The token that says the last character of a match belongs to the segment it ends, also if it
    goes on beyond the match: the next segment begins with the next action token, since a token is
    one decision. `token_ends` says which token that is. Matches that end in an injected token end
    no segment, as a tool's output does not. A response without a match is one segment.

    Args:
        responses: tokens of each response, padding excluded.
        action_mask: True = sampled by the policy.
        pattern: see `compile_delimiter`.
        decode: ids to text, special tokens included. What short runs of tokens say is asked once.

    >>> from torch import ones
    >>> text = ["a", "b;", ";c"]
    >>> decode = lambda ids: "".join(text[i] for i in ids)
    >>> after_text([[0, 1, 2, 0, 1]], ones(1, 5).bool(), compile_delimiter(";+"), decode)
    tensor([[ True, False, False,  True, False]])
    """
    spoken = _remembering(decode)
    ends = torch.zeros_like(action_mask)
    for row, ids in enumerate(responses):
        text = decode(ids)
        matches = [match.end() for match in pattern.finditer(text) if match.end()]
        if matches:
            said = token_ends(ids, text, spoken)
            ends[row, [bisect.bisect_left(said, end) for end in matches]] = True
    return after_ends(ends, action_mask)


def token_ends(ids: Sequence[int], text: str, decode: Decode) -> list[int]:
    """For each token, how many characters of the text have been said when it has been said.

        ends_i = max over j <= i of the characters in which decode(ids[:j+1]) agrees with the text

    A character of several tokens, as in byte-level vocabularies, is said by the last of them. Three
    ways to that number, each tried if the one before does not lead to the whole text: what tokens
    say alone; what they say after the few before them, for tokenizers that write a first word
    without its space; and the definition, which decodes every prefix.

    Args:
        ids: tokens of one response.
        text: what they say together, `decode(ids)`.
        decode: ids to text.

    >>> of_bytes = lambda ids: bytes(ids).decode(errors="replace")
    >>> token_ends([104, 195, 169, 33], "hé!", of_bytes)
    [1, 1, 2, 3]
    """
    pieces = [decode((i,)) for i in ids]
    if "".join(pieces) == text:
        return list(itertools.accumulate(map(len, pieces)))
    return _ends_in_context(ids, text, decode) or _ends_of_prefixes(ids, text, decode)


def _ends_in_context(ids: Sequence[int], text: str, decode: Decode) -> list[int] | None:
    """Runs of tokens, each as short as it can be to say something, read after the run before it."""
    ends: list[int] = []
    position, before, begin = 0, 0, 0
    for t in range(len(ids)):
        context = decode(ids[before:begin]) if begin else ""
        said = decode(ids[before : t + 1])
        new = said[len(context) :] if said.startswith(context) else ""
        agreed = _agreement(new, text, position)
        ends.append(position + agreed)
        if new and agreed == len(new):
            position, before, begin = position + agreed, begin, t + 1
        elif t - begin > _LONGEST_RUN:
            return None
    return list(itertools.accumulate(ends, max)) if position == len(text) else None


def _ends_of_prefixes(ids: Sequence[int], text: str, decode: Decode) -> list[int]:
    agreed = (_agreement(decode(ids[: t + 1]), text, 0) for t in range(len(ids)))
    return list(itertools.accumulate(agreed, max))


def _agreement(said: str, text: str, position: int) -> int:
    """Characters in which `said` agrees with the text from a position on."""
    if text.startswith(said, position):
        return len(said)
    rest = text[position : position + len(said)]
    differ = (i for i, (ours, theirs) in enumerate(zip(said, rest, strict=False)) if ours != theirs)
    return next(differ, len(rest))


_LONGEST_RUN = 16
"""Tokens. A character has at most four bytes; words that a tokenizer tidies up are about as long."""


def _remembering(decode: Decode) -> Decode:
    """The same, decoding each short run of tokens once."""
    said: dict[tuple[int, ...], str] = {}

    def remembered(ids: Sequence[int]) -> str:
        if len(ids) > 2 * _LONGEST_RUN:
            return decode(ids)
        run = tuple(ids)
        if run not in said:
            said[run] = decode(run)
        return said[run]

    return remembered
