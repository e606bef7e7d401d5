"""Verdicts: nothing is read that a writer could mean either way."""

import pytest

from llmac.core.verdicts import ScoreLine, VerdictLine, score_agreement

LINE = "Correctness of the final answer:"
read = VerdictLine().read


@pytest.mark.parametrize(
    ("critique", "says"),
    [
        (f"Step 1: Correct.\n{LINE} Correct", True),
        (f"{LINE} Wrong", False),
        (f"{LINE.upper()}   **wrong**. It should be 7.\n\n", False),
        (f"{LINE} Correct\n{LINE} Correct", True),
        (f"**{LINE}** Wrong", False),
        (f"**{LINE}**\tCorrect.", True),
        (f"{LINE} - Wrong", False),
        (f"**{LINE}** not Wrong", None),
        ("Every step is Correct, and the answer is Correct.", None),
        ("", None),
        (f"{LINE}\nCorrect", None),
        (f"{LINE} Incorrect", None),
        (f"{LINE} not Correct", None),
        (f"{LINE} I cannot say", None),
    ],
)
def test_a_verdict_is_the_word_behind_the_marker(critique, says):
    assert read(critique) is says


@pytest.mark.parametrize(
    "critique",
    [
        f"{LINE} Correct\n{LINE} Wrong",
        f"{LINE} Wrong\n{LINE} Correct",
        f"{LINE} Correct {LINE} Wrong",
        f"{LINE} Correct or Wrong",
        f"{LINE} Wrong (Correct)",
        f"{LINE} Wrong/Correct",
        f"{LINE} Correct\n{LINE} Wrong\n{LINE} Correct",
        f"{LINE} Correct\n{LINE} perhaps",
    ],
)
def test_whoever_writes_both_verdicts_is_paid_for_none(critique):
    line = VerdictLine()
    verdict = line.read(critique)
    assert verdict is None
    assert not any(line.agreement(verdict, reward=0.0, right=right) for right in (True, False))


def test_agreement_is_one_exactly_where_the_verdict_is_true():
    line = VerdictLine()
    told = [
        (said, right, line.agreement(said, reward=0.3, right=right))
        for said in (True, False, None)
        for right in (True, False)
    ]
    assert [x for _, _, x in told] == [1, 0, 0, 1, 0, 0]


def test_marker_and_words_are_free():
    line = VerdictLine(marker="v", right="+", wrong="-")
    assert [line.read(x) for x in ("12v+", "v-", "+", "v+v-", "v")] == [
        True,
        False,
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"marker": " "}, "the marker of a verdict is empty"),
        ({"right": "all right"}, "on a right answer is one word; found 'all right'"),
        ({"wrong": ""}, "on a wrong answer is one word"),
        ({"right": "Yes", "wrong": "yes."}, "they must differ"),
    ],
)
def test_words_that_cannot_be_told_apart_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        VerdictLine(**fields)


@pytest.mark.parametrize(
    ("critique", "score"),
    [
        ("Score: 7", 7),
        ("so\nscore: 7.5 of 10", 7.5),
        ("Score: **10**", 10),
        ("Score: 7\nScore: 7", 7),
        ("Score: 7\nScore: 8", None),
        ("Score: 0", None),
        ("Score: 100", None),
        ("Score: -3", None),
        ("Score: good", None),
        ("Score: 7\nScore: none", None),
        ("7", None),
    ],
)
def test_a_score_is_one_number_from_1_to_10(critique, score):
    assert ScoreLine().read(critique) == score


def test_agreement_of_scores_falls_with_the_distance():
    assert score_agreement(7.0, 6.0, tolerance=3.0) == pytest.approx(2 / 3)
    assert score_agreement(2.0, 6.0, tolerance=3.0) == 0
    # Rewards from -1 to 1: 0 is 5.5 on the scale.
    line = ScoreLine(tolerance=3.0, reward_range=(-1.0, 1.0))
    assert line.agreement(4.0, reward=0.0, right=False) == pytest.approx(0.5)
    assert line.agreement(None, reward=0.0, right=False) == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tolerance": 0.0}, "tolerance is finite and above 0; found 0.0"),
        ({"reward_range": (1.0, 1.0)}, "finite and ascending; found .1.0, 1.0."),
        ({"marker": ""}, "the marker of a score is empty"),
    ],
)
def test_a_scale_without_extent_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        ScoreLine(**fields)
