"""Matches in text, mapped to the tokens that say them."""

import random
import re

import pytest
import torch

from llmac.core.text_segments import DELIMITERS, after_text, compile_delimiter, token_ends

WORDS = ["a", "b.", "\n", "\n\n", ". \nc", " d", " .", ";", "e;\nf", "", " n't", "é", "\n ", "g! h"]
BYTES = [b"x", b"\n", b".", *(bytes([b]) for b in "é€🙂".encode()), b"a\xc3", b"\xa9;\n"]


def words(ids):
    return "".join(WORDS[i] for i in ids)


def byte_level(ids):
    return b"".join(BYTES[i % len(BYTES)] for i in ids).decode(errors="replace")


def without_broken_characters(ids):
    return b"".join(BYTES[i % len(BYTES)] for i in ids).decode(errors="ignore")


def without_the_first_space(ids):
    return words(ids).removeprefix(" ")


def tidied_up(ids):
    return words(ids).replace(" .", ".").replace(" n't", "n't")


def marked_at_its_end(ids):
    return words(ids) + "|"


TOKENIZERS = [
    words,
    byte_level,
    without_broken_characters,
    without_the_first_space,
    tidied_up,
    marked_at_its_end,
]


def by_definition(ids, text, decode):
    """Characters of the text said by each token, decoding every prefix."""
    ends, most = [], 0
    for t in range(len(ids)):
        said = decode(ids[: t + 1])
        agreed = 0
        while agreed < min(len(said), len(text)) and said[agreed] == text[agreed]:
            agreed += 1
        most = max(most, agreed)
        ends.append(most)
    return ends


def starts_by_definition(ids, mask, pattern, decode):
    text, starts = decode(ids), set()
    ends = by_definition(ids, text, decode)
    ending = [next(t for t, e in enumerate(ends) if e >= m.end()) for m in pattern.finditer(text)]
    for last in [-1, *(t for t in ending if mask[t])]:
        starts |= set([t for t in range(last + 1, len(ids)) if mask[t]][:1])
    return sorted(starts)


def random_rows(number, seed):
    source = random.Random(seed)
    for _ in range(number):
        ids = [source.randrange(len(WORDS)) for _ in range(source.randrange(25))]
        yield ids, [source.random() < 0.8 for _ in ids]


@pytest.mark.parametrize("decode", TOKENIZERS)
def test_tokens_say_what_the_definition_says(decode):
    for ids, _ in random_rows(150, seed=0):
        text = decode(ids)
        assert token_ends(ids, text, decode) == by_definition(ids, text, decode), (ids, text)


@pytest.mark.parametrize("decode", TOKENIZERS)
@pytest.mark.parametrize("delimiter", [*DELIMITERS, r"\.?\n", "é", "[.;]\n|c"])
def test_segments_begin_behind_the_token_that_says_the_end_of_a_match(decode, delimiter):
    rows = list(random_rows(25, seed=1))
    mask = torch.zeros(len(rows), 25, dtype=torch.bool)
    for row, (_, sampled) in enumerate(rows):
        mask[row, : len(sampled)] = torch.tensor(sampled, dtype=torch.bool)
    pattern = compile_delimiter(delimiter)
    starts = after_text([ids for ids, _ in rows], mask, pattern, decode)
    for (ids, sampled), found in zip(rows, starts, strict=True):
        expected = starts_by_definition(ids, sampled, pattern, decode)
        assert found.nonzero().flatten().tolist() == expected, (ids, decode(ids))


def positions(text, delimiter):
    """Starts in a text of which every character is a token."""
    mask = torch.ones(1, len(text), dtype=torch.bool)
    ids = [ord(c) for c in text]
    found = after_text(
        [ids], mask, compile_delimiter(delimiter), lambda ids: "".join(map(chr, ids))
    )
    return found[0].nonzero().flatten().tolist()


def test_delimiters_that_have_a_name():
    assert positions("ab\ncd\n\ne\n", "newline") == [0, 3, 7]
    assert positions("ab\ncd\n \ne", "paragraph") == [0, 8]
    assert positions("a. 1.5! b\nc.\nd", "sentence") == [0, 2, 7, 10, 13]
    assert positions("a;b", "semicolon") == [0, 2]


def test_a_match_at_the_very_end_or_at_none_cuts_nothing():
    assert positions("abc\n", "newline") == [0]
    assert positions("abc", "newline") == [0]
    assert positions("ab c", "(?=a)|(?<= )(?=c)") == [0, 3]


@pytest.mark.parametrize(
    ("tokenizer", "longest"), [(words, 1), (byte_level, 8), (without_the_first_space, 8)]
)
def test_a_response_is_decoded_whole_once_and_short_runs_of_it_once(tokenizer, longest):
    asked = []

    def decode(ids):
        asked.append(tuple(ids))
        return tokenizer(ids)

    row = [5] + [i for ids, _ in random_rows(40, seed=2) for i in ids if WORDS[i]]
    after_text([row], torch.ones(1, len(row), dtype=torch.bool), re.compile(r"\n+"), decode)
    whole, *runs = asked
    assert whole == tuple(row)
    assert len(runs) == len(set(runs))
    assert max(map(len, runs)) <= longest


@pytest.mark.parametrize(
    ("delimiter", "says"),
    [("[", "regular expression; found '\\['"), ("x*", "also matches nothing"), ("", "nothing")],
)
def test_delimiters_that_are_none(delimiter, says):
    with pytest.raises(ValueError, match=says):
        compile_delimiter(delimiter)


@pytest.mark.parametrize("delimiter", ["newlines", "new_line", "semi-colon", "Sentence"])
def test_a_name_that_is_misspelt_is_not_a_pattern(delimiter):
    with pytest.raises(ValueError, match=r"is no name of a delimiter\. Did you mean"):
        compile_delimiter(delimiter)
    assert compile_delimiter(f"(?:{delimiter})").search(delimiter)
