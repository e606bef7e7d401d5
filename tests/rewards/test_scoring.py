"""Sums, weights, counters, and every way a function can go wrong."""

import asyncio
import logging
import threading
import time

import numpy
import pytest
import torch

from llmac.core.protocols import Scorer
from llmac.errors import ConfigError, DataError, RewardError
from llmac.rewards.contracts import RewardSpec


def longer(prompt, response):
    return float(len(response))


def always_none(prompt, response):
    return None


def breaks_on_x(prompt, response):
    if response == "x":
        raise ZeroDivisionError("no x")
    return 1.0


def test_the_reward_is_the_weighted_sum(rewards, answered):
    score = rewards(
        RewardSpec(function=longer, weight=0.5),
        RewardSpec(function=lambda prompt, response: -1.0, name="punish", weight=2.0),
    )
    (scored,) = score([answered("abcd")])
    assert scored.reward == 0.5 * 4 - 2.0
    assert scored.reward_parts == {"longer": 4.0, "punish": -1.0}


def test_it_is_a_scorer_that_keeps_the_order_and_takes_nothing(rewards, answered):
    score: Scorer = rewards(longer)
    assert [t.response_text for t in score([answered("b"), answered("aa")])] == ["b", "aa"]
    assert score([]) == []


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (True, 1.0),
        (3, 3.0),
        (numpy.float32(0.5), 0.5),
        (numpy.bool_(True), 1.0),
        (torch.tensor(0.25), 0.25),
        (torch.tensor([2]), 2.0),
    ],
)
def test_whatever_is_a_number_is_a_reward(rewards, answered, value, number):
    (scored,) = rewards(lambda prompt, response: value)([answered("a")])
    assert scored.reward == number
    assert type(scored.reward) is float


@pytest.mark.parametrize(
    "values", [[1, 2], (1.0, 2.0), numpy.array([1, 2]), torch.tensor([1.0, 2.0])]
)
def test_a_batch_may_be_a_list_a_tuple_an_array_or_a_tensor(rewards, answered, values):
    scored = rewards(lambda completions: values)([answered("a"), answered("b")])
    assert [t.reward for t in scored] == [1.0, 2.0]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "1.0", [1.0], {"score": 1}, torch.ones(2)]
)
def test_a_reward_that_is_no_finite_number_stops_the_run(rewards, answered, value):
    score = rewards(RewardSpec(function=lambda prompt, response: value, name="odd"))
    with pytest.raises(RewardError, match=r"odd returned .* for prompt gsm8k/7.*on_error: skip"):
        score([answered("a", id_="gsm8k/7")])


def test_one_nan_in_a_batch_is_found_and_its_prompt_named(rewards, answered):
    score = rewards(RewardSpec(function=lambda completions: [1.0, float("nan")], name="odd"))
    with pytest.raises(RewardError, match="odd returned nan for prompt q/2"):
        score([answered("a", id_="q/1"), answered("b", id_="q/2")])


@pytest.mark.parametrize(
    ("values", "found"), [(1.0, "1.0"), (None, "None"), ("ab", "'ab'"), ({}, "{}")]
)
def test_a_batch_function_must_return_a_list(rewards, answered, values, found):
    score = rewards(RewardSpec(function=lambda completions: values, name="odd"), on_error="skip")
    with pytest.raises(RewardError, match=rf"odd returned {found} .*q/1, q/2.*a list of 2"):
        score([answered("a", id_="q/1"), answered("b", id_="q/2")])


def test_a_batch_of_the_wrong_length_stops_the_run_even_when_errors_are_skipped(rewards, answered):
    score = rewards(RewardSpec(function=lambda completions: [1.0], name="short"), on_error="skip")
    with pytest.raises(
        RewardError, match=r"short returned 1 rewards for 2 completions \(prompts q/1, q/2\)"
    ):
        score([answered("a", id_="q/1"), answered("b", id_="q/2")])


def test_a_function_that_raises_stops_the_run_with_the_prompts_id(rewards, answered):
    with pytest.raises(
        RewardError, match="breaks_on_x raised ZeroDivisionError: no x, for prompt q/2"
    ) as raised:
        rewards(breaks_on_x)([answered("a", id_="q/1"), answered("x", id_="q/2")])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_batch_that_raises_names_its_first_prompts(rewards, answered):
    def broken(completions):
        raise KeyError("answer")

    with pytest.raises(RewardError, match="prompts q/0, q/1, q/2 and 2 more"):
        rewards(broken)([answered("a", id_=f"q/{i}") for i in range(5)])


def test_nothing_runs_after_the_first_failure(rewards, answered):
    seen = []

    def count(prompt, response):
        seen.append(response)
        raise ValueError

    with pytest.raises(RewardError):
        rewards(count)([answered("a"), answered("b")])
    assert seen == ["a"]


def test_skipped_errors_are_counted_logged_and_the_others_decide(rewards, answered, caplog):
    score = rewards(breaks_on_x, longer, on_error="skip")
    with caplog.at_level(logging.WARNING):
        scored = score([answered("ab"), answered("x", id_="q/2"), answered("x", id_="q/3")])
    assert [t.reward for t in scored] == [3.0, 1.0, 1.0]
    assert scored[1].reward_parts == {"breaks_on_x": None, "longer": 1.0}
    assert [r for r in caplog.messages if "skipped" in r and "q/2" in r]
    assert [r for r in caplog.messages if "skipped" in r and "q/3" in r]
    metrics = score.metrics()
    assert metrics["reward/breaks_on_x/errors"].value == 2
    assert metrics["reward/breaks_on_x/none"].value == 0
    assert metrics["reward/breaks_on_x/mean"].value == 1.0  # an exception is not a zero


def test_a_batch_that_raises_is_skipped_as_a_whole(rewards, answered):
    def broken(completions):
        raise KeyError("answer")

    score = rewards(broken, longer, on_error="skip")
    assert [t.reward for t in score([answered("a"), answered("bb"), answered("c")])] == [
        1.0,
        2.0,
        1.0,
    ]
    assert score.metrics()["reward/broken/errors"].value == 3


def test_a_skipped_nan_does_not_poison_its_group(rewards, answered):
    score = rewards(
        RewardSpec(function=lambda completions: [1.0, float("nan"), 0.0], name="odd"),
        on_error="skip",
    )
    assert [t.reward for t in score([answered("a"), answered("b"), answered("c")])] == [
        1.0,
        0.0,
        0.0,
    ]
    metrics = score.metrics()
    assert metrics["reward/odd/errors"].value == 1
    assert metrics["reward/odd/mean"].value == 0.5


def test_a_response_nobody_scores_gets_zero_and_is_counted(rewards, answered, caplog):
    score = rewards(always_none)
    scored = score([answered("a", id_="q/1"), answered("b", id_="q/2")])
    assert [t.reward for t in scored] == [0.0, 0.0]
    assert scored[0].reward_parts == {"always_none": None}
    assert "no reward function applies to a response to prompt q/1" in caplog.text
    metrics = score.metrics()
    assert metrics["reward/unscored"].value == 2
    assert metrics["reward/always_none/none"].value == 2


def test_mean_std_and_equal_groups(rewards, answered):
    score = rewards(longer)
    # Two calls of one step. Groups (1, 1), all equal; (1, 3); and (2), alone and so not counted.
    score([answered("a", group=0), answered("b", group=0)])
    score([answered("c", group=1), answered("abc", group=1), answered("ab", group=2)])
    metrics = score.metrics()
    assert metrics["reward/mean"].value == 8 / 5
    # Deviations from 1.6: -.6 -.6 -.6 1.4 .4; squares sum to 3 * .36 + 1.96 + .16 = 3.2.
    assert metrics["reward/std"].value == pytest.approx((3.2 / 5) ** 0.5)
    assert metrics["reward/equal_groups"].value == 0.5


def test_metrics_are_drained(rewards, answered):
    score = rewards(longer)
    score([answered("abc")])
    assert score.metrics()["reward/mean"].value == 3.0
    after = score.metrics()
    assert (
        after["reward/mean"].weight == 0
    )  # the same names on every rank, even one without responses


def test_evaluation_has_counters_of_its_own(rewards, answered):
    score = rewards(longer)
    held_out = score.for_evaluation()
    held_out([answered("abc")])
    score([answered("a")])
    assert score.metrics()["reward/mean"].value == 1.0
    assert held_out.metrics()["reward/mean"].value == 3.0


def test_a_function_that_is_zero_for_n_steps_is_named_once_every_n(rewards, answered, caplog):
    score = rewards(
        longer,
        RewardSpec(function=lambda prompt, response: 0.0, name="mute"),
        zero_reward_warning_steps=2,
    )
    for _ in range(5):
        score([answered("a")])
        score.metrics()
    warnings = [m for m in caplog.messages if "has said 0" in m]
    assert len(warnings) == 2
    assert "mute" in warnings[0]
    assert "for 2 steps" in warnings[0]
    assert "for 4 steps" in warnings[1]


def test_one_reward_that_is_not_zero_ends_the_count(rewards, answered, caplog):
    score = rewards(
        RewardSpec(function=lambda prompt, response: float(response == "y"), name="rare"),
        zero_reward_warning_steps=2,
    )
    for texts in ("nn", "yn", "nn", "yn"):
        score([answered(text) for text in texts])
        score.metrics()
    assert not caplog.messages


def test_no_function_and_two_of_one_name_are_refused(rewards):
    with pytest.raises(ConfigError, match="at least one"):
        rewards()
    with pytest.raises(ConfigError, match="two reward functions are called 'longer'"):
        rewards(longer, longer)


def test_missing_columns_are_found_before_training(rewards):
    score = rewards(longer, RewardSpec(function=lambda completions, answer: [], name="exact"))
    score.check_columns({"answer"})
    with pytest.raises(DataError, match="exact requires the column 'answer'"):
        score.check_columns({"question"})


def meeting_point(parties):
    """An async function of which `parties` must be running at once, or none returns."""
    waiting, everyone = [], None

    async def reward(prompt, response):
        nonlocal everyone
        everyone = everyone or asyncio.Event()
        waiting.append(response)
        if len(waiting) == parties:
            everyone.set()
        await asyncio.wait_for(everyone.wait(), timeout=5)
        return 1.0

    return reward


def test_async_calls_of_one_batch_run_concurrently(rewards, answered):
    score = rewards(meeting_point(3))
    assert [t.reward for t in score([answered(t) for t in "abc"])] == [1.0] * 3


def test_async_functions_run_while_others_compute(rewards, answered):
    begun = threading.Event()

    async def first(prompt, response):
        begun.set()
        return 1.0

    def second(prompt, response):
        return float(begun.wait(timeout=5))

    # `second` is declared first and still sees `first` running.
    assert rewards(second, first)([answered("a")])[0].reward == 2.0


def test_async_functions_run_inside_a_running_event_loop(rewards, answered):
    score = rewards(meeting_point(2))

    async def notebook():
        return score([answered("a"), answered("b")])

    assert [t.reward for t in asyncio.run(notebook())] == [1.0, 1.0]


def test_async_functions_find_the_same_loop_at_every_step(rewards, answered):
    loops = set()

    async def client(prompts, completions):
        loops.add(asyncio.get_running_loop())
        return [0.0] * len(completions)

    score = rewards(client)
    score([answered("a")])
    score([answered("b")])
    assert len(loops) == 1


def test_functions_that_are_not_async_run_in_the_calling_thread(rewards, answered):
    # Signals, and so the time limits of some verifiers, work nowhere else.
    def where(prompt, response):
        return float(threading.current_thread() is threading.main_thread())

    assert rewards(where)([answered("a")])[0].reward == 1.0


def test_an_async_function_that_raises_names_its_prompt(rewards, answered):
    async def fails(prompt, response):
        await asyncio.sleep(0)
        if response == "x":
            raise TimeoutError("judge is silent")
        return 1.0

    with pytest.raises(RewardError, match="TimeoutError: judge is silent, for prompt q/2"):
        rewards(fails)([answered("a", id_="q/1"), answered("x", id_="q/2")])
    skipping = rewards(fails, on_error="skip")
    assert [t.reward for t in skipping([answered("a"), answered("x")])] == [1.0, 0.0]
    assert skipping.metrics()["reward/fails/errors"].value == 1


def test_an_awaitable_from_a_plain_function_is_awaited(rewards, answered):
    async def later(text):
        return float(len(text))

    assert rewards(lambda prompt, response: later(response))([answered("abc")])[0].reward == 3.0


def test_async_functions_wait_together_not_in_turn(rewards, answered):
    async def sleepy(prompt, response):
        await asyncio.sleep(0.1)
        return 1.0

    score = rewards(sleepy)
    start = time.monotonic()
    score([answered("a") for _ in range(20)])
    assert time.monotonic() - start < 1.0  # in turn: 2 s
