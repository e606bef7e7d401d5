"""Whole responses: who is chosen, what votes, and what is counted."""

import pytest

from llmac.core.protocols import SamplingParams
from llmac.core.types import Finish
from llmac.decoding import best_of_n, majority_vote, weighted_vote
from llmac.decoding.answers import behind_equals
from llmac.errors import ConfigError
from tests.decoding.scripted import ByText, player_of

SAID = ["a=b", "c=b", "e=d", "abc=fabcd"]
WORTH = {"a=b": 0.2, "c=b": 0.3, "e=d": 0.6, "abc=fabc": 0.9}
SAMPLING = SamplingParams(max_new_tokens=8, seed=3)


def say(seen, sibling):
    return SAID[sibling]


def test_best_of_n_is_the_finished_response_worth_most():
    values = ByText(WORTH.__getitem__)
    player = player_of(say)
    [found] = best_of_n(player, values, ["a"], 4, sampling=SAMPLING)
    assert found.chosen.text == "e=d"
    assert found.chosen.value == 0.6
    # Three of four tokens with their ends, one cut at eight.
    assert found.sampled_tokens == 3 * 4 + 8
    assert found.valued_states == 4
    assert [c.finish for c in found.candidates] == [Finish.STOP] * 3 + [Finish.LENGTH]
    assert found.chosen.logprob == -2.0


def test_finished_responses_are_valued_before_their_last_token_and_cut_ones_whole():
    values = ByText(WORTH.__getitem__)
    states = []
    values.values_of = lambda given: states.extend(given) or [0.0] * len(given)
    best_of_n(player_of(say), values, ["ab"], 4, sampling=SAMPLING)
    assert [len(s.response_ids) for s in states] == [3, 3, 3, 8]  # without <eos>
    assert {s.prompt.token_ids for s in states} == {(2, 3)}


def test_each_prompt_gets_its_own():
    values = ByText(lambda text: float(text.count("b")))
    player = player_of(lambda seen, sibling: seen + "b" * sibling)
    found = best_of_n(player, values, ["a", "c"], 3, sampling=SAMPLING)
    assert [one.chosen.text for one in found] == ["abb", "cbb"]
    assert len({r.params.seed for r in player.engine.requests}) == 2
    again = player_of(lambda seen, sibling: "")
    best_of_n(again, values, ["a", "c"], 3, sampling=SAMPLING)
    assert [r.params for r in again.engine.requests] == [r.params for r in player.engine.requests]


def test_the_majority_and_the_value_may_choose_differently():
    values = ByText(WORTH.__getitem__)
    [most] = majority_vote(player_of(say), ["a"], 4, answer=behind_equals, sampling=SAMPLING)
    assert (most.chosen.answer, most.support, most.valued_states) == ("b", 2 / 3, 0)
    assert most.chosen.value is None
    [worth] = weighted_vote(
        player_of(say), values, ["a"], 4, answer=behind_equals, sampling=SAMPLING
    )
    assert worth.chosen.answer == "d"
    assert worth.support == pytest.approx(0.6 / 1.1)
    # Cut, so no answer, though its value is the highest.
    assert worth.candidates[3].answer is None


def test_a_group_speaks_through_its_best_member():
    worth = {**WORTH, "e=d": 0.4}
    [found] = weighted_vote(
        player_of(say), ByText(worth.__getitem__), ["a"], 4, answer=behind_equals, sampling=SAMPLING
    )
    assert (found.chosen.text, found.support) == ("c=b", pytest.approx(0.5 / 0.9))


def test_a_certain_failure_weighs_nothing():
    worth = {"a=b": 0.5, "c=b": 0.5, "e=d": 0.9, "abc=fabc": 0.0}
    ask = {"answer": behind_equals, "sampling": SAMPLING}
    [from_zero] = weighted_vote(player_of(say), ByText(worth.__getitem__), ["a"], 4, **ask)
    [from_half] = weighted_vote(
        player_of(say), ByText(worth.__getitem__), ["a"], 4, worst=0.5, **ask
    )
    assert (from_zero.chosen.answer, from_half.chosen.answer) == ("b", "d")
    assert from_half.support == 1.0


def test_nobody_votes_against_an_answer(caplog):
    """Two voters below a failure beside a third that is above it; said once."""
    worth = {"a=b": -0.5, "c=b": 0.4, "e=d": 0.3, "abc=fabc": 0.0}
    ask = {"answer": behind_equals, "sampling": SAMPLING, "worst": -0.25}
    for _ in range(2):
        [found] = weighted_vote(player_of(say), ByText(worth.__getitem__), ["a"], 4, **ask)
        assert found.chosen.answer == "b"
        assert found.support == pytest.approx(0.65 / 1.2)
    assert caplog.text.count("valued below worst = -0.25") == 1


def test_answers_that_are_the_same_vote_together():
    [found] = majority_vote(
        player_of(lambda seen, sibling: ["=a", "=b", "=b", "=c", "=d"][sibling]),
        ["a"],
        5,
        answer=behind_equals,
        same=lambda one, other: {one, other} in ({"a", "c"}, {"c", "d"}),
        sampling=SAMPLING,
    )
    assert found.support == 0.6
    assert found.chosen.answer in "acd"


def test_without_a_vote_the_best_response_is_chosen_all_the_same():
    values = ByText(lambda text: float(len(text)))
    [found] = weighted_vote(
        player_of(lambda seen, sibling: "a" * (sibling + 1)),
        values,
        ["a"],
        3,
        answer=behind_equals,
        sampling=SAMPLING,
    )
    assert (found.chosen.text, found.chosen.answer, found.support) == ("aaa", None, None)


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="n is 0"):
        best_of_n(player_of(say), ByText(len), ["a"], 0)
    with pytest.raises(ConfigError, match="no prompts"):
        majority_vote(player_of(say), [], 2, answer=behind_equals)
