"""Equal states are one; errors, needs and budgets by hand."""

import math

import pytest

from llmac.core.continuations import (
    PromptBudget,
    State,
    affordable,
    merged,
    standard_error,
    still_needed,
)
from llmac.core.types import Finish, Prompt, Trajectory


def response(ids, number=0):
    return Trajectory(
        prompt=Prompt(id=f"p{number}", token_ids=(1, 2), source="?"),
        response_ids=tuple(ids),
        action_mask=(True,) * len(ids),
        sampler_logprobs=(0.0,) * len(ids),
        finish=Finish.STOP,
        group=number,
        reward=0.0,
    )


def test_states_are_equal_when_prompt_and_tokens_are():
    rows = [response([5, 6]), response([5, 7]), response([5], number=1)]
    states = [State(origin=t, position=n) for t in rows for n in range(len(t.response_ids))]
    distinct, places = merged(states)
    assert places == [0, 1, 0, 1, 2]
    assert [s.origin for s in distinct] == [rows[0], rows[0], rows[2]]
    assert merged([]) == ([], [])
    start = State.before(rows[0].prompt, 3)
    assert start.key == states[0].key
    assert State.before(Prompt(id="p0", token_ids=(1,), source="?"), 0).key != start.key
    assert (start.token_ids, start.origin.group) == ((1, 2), 3)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_error_of_a_mean_is_never_nought(scale):
    # (1, 1, 0) and (0, 1): mean 3/5, variance 6/25; √(6/25 / 3)
    assert standard_error([scale, scale, 0.0], (0.0, scale)) == pytest.approx(
        scale * math.sqrt(0.08)
    )
    # (1) and (0, 1): p = 2/3, √(2/9)
    assert standard_error([scale], (0.0, scale)) == pytest.approx(scale * math.sqrt(2) / 3)
    with pytest.raises(ValueError, match="at least one"):
        standard_error([], (0.0, scale))


def test_a_state_gets_what_it_needs_but_at_most_as_many_again():
    options = {"most": 100, "reward_range": (0.0, 1.0)}
    four = [1.0, 1.0, 0.0, 0.0]  # error √(1/4 / 4) = 1/4
    assert still_needed(four, target=0.25, **options) == 0
    assert still_needed(four, target=0.2, **options) == 3  # 4 · (1/4 / .2)² = 6.25
    assert still_needed(four, target=0.01, **options) == 4
    assert still_needed(four, target=0.01, most=6, reward_range=(0.0, 1.0)) == 2
    assert still_needed(four, target=0.01, most=4, reward_range=(0.0, 1.0)) == 0


def test_a_budget_is_spent_evenly():
    assert affordable([2, 2], [1.0, 1.0], 3.0) == [2, 1]
    assert affordable([2, 2], [1.0, 1.0], 100.0) == [2, 2]
    # What the first cannot have, the second may still afford; and no second before that first.
    assert affordable([2, 3], [5.0, 1.0], 3.0) == [0, 3]
    assert affordable([3, 3], [5.0, 5.0], -7.0, at_least=1) == [1, 1]
    assert affordable([0, 3], [5.0, 5.0], 0.0, at_least=1) == [0, 1]
    assert affordable([], [], 3.0) == []


def test_the_cost_of_a_state_is_what_its_prompts_responses_still_had():
    rows = [response([5] * 6), response([6] * 2), response([7] * 9, number=1)]
    states = [State(origin=rows[0], position=0), State(origin=rows[0], position=4)]
    # From 0: (6 + 2) / 2 = 4 tokens; from 4: 2. One of each is 6, two are 12, and the second's third one 2 more.
    for tokens, expected in (
        (9, [1, 2]),
        (11, [2, 1]),
        (12, [2, 2]),
        (13, [2, 2]),
        (14, [2, 3]),
        (None, [3, 3]),
    ):
        budget = PromptBudget(tokens, states, [9, 5], rows)
        assert budget.allowed([3, 3], [[], []]) == expected
        assert budget.withheld == sum(count < 3 for count in expected)
    # Cut after one token it costs one; behind all responses one knows nothing, and it costs all it may.
    behind = [State(origin=rows[1], position=1), State(origin=rows[2], position=9)]
    budget = PromptBudget(7, behind, [1, 7], rows)
    assert budget.allowed([9, 9], [[], []]) == [7, 1]


def test_what_was_spent_is_what_was_sampled():
    rows = [response([5] * 4), response([5] * 4, number=1)]
    states = [State(origin=row, position=1) for row in rows]
    budget = PromptBudget(10, states, [9, 9], rows)
    assert budget.allowed([2, 1], [[], []]) == [2, 1]
    assert budget.withheld == 0
    found = [[response([5] * 3), response([5] * 4)], []]  # two and three tokens behind the state
    assert budget.allowed([4, 0], found) == [1, 0]  # five are left, three tokens each
    assert budget.withheld == 1
    assert budget.allowed([4, 0], [found[0] * 2, []]) == [0, 0]
