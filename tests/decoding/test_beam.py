"""The block-wise search, against searches worked by hand and against whole responses."""

import pytest

from llmac.core.protocols import SamplingParams
from llmac.core.types import Finish
from llmac.decoding import beam, best_of_n
from llmac.decoding.answers import behind_equals
from llmac.errors import ConfigError
from tests.decoding.scripted import ByText, player_of

LONG = SamplingParams(max_new_tokens=6, seed=0)


def letters(seen, sibling):
    """Siblings go on with a, b, c, ... up to a response of four letters."""
    return "abcdef"[sibling] * (5 - len(seen))


def test_the_best_block_is_gone_on_with():
    values = ByText(lambda text: text.count("b") + 0.1 * text.count("c"))
    player = player_of(letters)
    [found] = beam(player, values, ["f"], block_tokens=2, width=1, expand=3, sampling=LONG)
    assert found.chosen.text == "bbbb"
    assert found.chosen.finish is Finish.STOP
    # Three blocks of two, three of two, three that only end.
    assert found.sampled_tokens == 6 + 6 + 3
    assert found.valued_states == 9
    assert found.chosen.logprob == -0.5 * 5
    assert [len(r.prompt_ids) for r in player.engine.requests] == [1, 3, 5]


def test_a_block_as_long_as_the_response_is_best_of_n():
    values = ByText(lambda text: text.count("b") - 2.0 * text.count("d"))

    def say(seen, sibling):
        return ["ab", "bb", "bbd", "abcabc"][sibling]

    ask = {"sampling": LONG}
    [searched] = beam(player_of(say), values, ["a"], block_tokens=6, width=1, expand=4, **ask)
    [picked] = best_of_n(player_of(say), values, ["a"], 4, **ask)
    assert searched.chosen == picked.chosen
    assert searched.sampled_tokens == picked.sampled_tokens


def test_the_first_round_fills_all_beams_and_later_ones_expand_each():
    player = player_of(letters)
    beam(player, ByText(len), ["f"], block_tokens=2, width=2, expand=3, trees=2, sampling=LONG)
    asked = [(r.params.n, len(r.prompt_ids)) for r in player.engine.requests]
    assert asked == [(6, 1)] * 2 + [(3, 3)] * 4 + [(3, 5)] * 4
    assert len({r.params.seed for r in player.engine.requests}) == 10


def test_trees_do_not_see_each_other():
    """One tree goes for b, the other for c: in one search together the better would crowd out the other."""
    rounds = iter(["b", "c"] * 9)
    first = {}

    def say(seen, sibling):
        if len(seen) == 1:
            first[len(first)] = next(rounds)
            return first[len(first) - 1] * 4
        return seen[-1] * (5 - len(seen))

    values = ByText(lambda text: text.count("b") + 0.5 * text.count("c"))
    [found] = beam(
        player_of(say), values, ["f"], block_tokens=2, width=1, expand=1, trees=2, sampling=LONG
    )
    assert sorted(c.text for c in found.candidates) == ["bbbb", "cccc"]


def test_a_finished_beam_keeps_its_place_and_is_not_sampled_again():
    def say(seen, sibling):
        return ["=a", "bbbbb"][sibling % 2] if len(seen) == 1 else "bb"

    values = ByText({"=a": 0.5, "bbb": 0.4, "bbbbb": 2.0}.__getitem__)
    player = player_of(say)
    [found] = beam(
        player,
        values,
        ["f"],
        block_tokens=3,
        width=1,
        expand=2,
        answer=behind_equals,
        sampling=LONG,
    )
    assert [c.text for c in found.candidates] == ["=a"]
    assert len(player.engine.requests) == 1
    # With room for three, two of them end at once, and the children of the third are worth more.
    [found] = beam(
        player,
        values,
        ["f"],
        block_tokens=3,
        width=3,
        expand=2,
        answer=behind_equals,
        sampling=LONG,
    )
    assert [c.text for c in found.candidates] == ["=a", "=a", "=a"]
    # Kept when it ended, it stays, though both children of the other are worth more.
    values = ByText({"=a": 0.7, "bbb": 0.6, "bbbbb": 2.0}.__getitem__)
    [found] = beam(
        player_of(lambda seen, sibling: say(seen, 0 if sibling == 0 else 1)),
        values,
        ["f"],
        block_tokens=3,
        width=2,
        expand=2,
        answer=behind_equals,
        sampling=LONG,
    )
    assert [c.text for c in found.candidates] == ["=a", "bbbbb"]
    assert (found.chosen.answer, found.support) == ("a", 1.0)


def test_the_last_block_is_no_longer_than_there_is_room():
    player = player_of(lambda seen, sibling: "b" * 9)
    [found] = beam(player, ByText(len), ["f"], block_tokens=4, width=1, expand=1, sampling=LONG)
    assert [r.params.max_new_tokens for r in player.engine.requests] == [4, 2]
    assert (found.chosen.text, found.chosen.finish) == ("bbbbbb", Finish.LENGTH)


def test_a_beam_that_was_cut_is_not_chosen_over_a_finished_one():
    def say(seen, sibling):
        return ["=a", "bbbbbbbb"][sibling] if len(seen) == 1 else "bbbbbbb"

    values = ByText(lambda text: 1.0 + len(text))
    [found] = beam(player_of(say), values, ["f"], block_tokens=3, width=2, expand=1, sampling=LONG)
    assert [c.finish for c in found.candidates] == [Finish.STOP, Finish.LENGTH]
    assert len(found.candidates[1].response_ids) == 6
    assert found.chosen.text == "=a"


@pytest.mark.parametrize(("block_tokens", "word"), [(3, "cd"), (2, "bcd")])
def test_a_stop_string_over_the_edge_of_blocks_ends_the_beam(block_tokens, word):
    """In the middle of the later block, and with its last token."""
    sampling = SamplingParams(max_new_tokens=6, stop=(word,), seed=0)
    values = ByText(len)
    [found] = beam(
        player_of(lambda seen, sibling: "abcdef"[len(seen) - 1 :]),
        values,
        ["f"],
        block_tokens=block_tokens,
        width=1,
        expand=1,
        sampling=sampling,
    )
    assert (found.chosen.text, found.chosen.finish) == ("abcd", Finish.STOP)
    assert found.chosen.logprob == -0.5 * 4
    assert values.asked[-1] == "abc"  # before its last token
    assert found.sampled_tokens == 2 * block_tokens  # what was thrown away was sampled


def test_numbers_below_one_are_refused():
    for name in ("block_tokens", "width", "expand", "trees"):
        numbers = {"block_tokens": 2, name: 0}
        with pytest.raises(ConfigError, match=f"{name} of a beam search is 0"):
            beam(player_of(letters), ByText(len), ["a"], **numbers)
