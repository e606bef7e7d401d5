"""The instruments on numbers small enough to work out by hand."""

import pytest
import torch

from llmac.pretraining.report import Judged, report


def judged(values, outcome, prompt):
    return Judged(
        values=torch.tensor(values), returns=torch.full((len(values),), outcome), prompt=prompt
    )


def numbers(rows):
    found = {name.removeprefix("held_out/"): m.value for name, m in report(rows).items()}
    return {name.removeprefix("all/"): value for name, value in found.items()}


def test_the_instruments_over_all_states_are_those_of_the_definition():
    found = numbers([judged([0.5, 0.9], 1.0, 0), judged([0.5, 0.1], 0.0, 0)])
    # errors -.5 -.1 .5 .1
    assert found["squared_error"] == found["brier"] == pytest.approx((0.25 + 0.01) * 2 / 4)
    assert found["explained_variance"] == pytest.approx(1 - 0.13 / 0.25)
    assert found["bias"] == pytest.approx(0.0, abs=1e-6)
    # bins .1, .5 (twice) and .9: gaps .1, 0, .1
    assert found["ece"] == pytest.approx((0.1 + 0.1) / 4)
    # pairs: .5>.5 half, .5>.1, .9>.5, .9>.1
    assert found["auc"] == found["auc_within_prompts"] == pytest.approx(3.5 / 4)


def test_knowing_which_prompt_is_hard_is_not_knowing_which_response_is_good():
    easy = [judged([0.9], 1.0, 0), judged([0.9], 1.0, 0), judged([0.9], 0.0, 0)]
    hard = [judged([0.1], 0.0, 1), judged([0.1], 0.0, 1), judged([0.1], 1.0, 1)]
    found = numbers(easy + hard)
    assert found["auc_within_prompts"] == pytest.approx(0.5)
    # 9 pairs: 2·2 won, 1·2 + 2·1 tied within, 1·1 lost
    assert found["auc"] == pytest.approx((4 + 4 / 2) / 9)


def test_each_third_of_a_response_is_looked_at_by_itself():
    long = judged([0.0, 0.0, 0.5, 0.5, 1.0, 1.0], 1.0, 0)
    found = numbers([long, judged([0.0], 1.0, 1)])
    errors = [found[f"{third}/squared_error"] for third in ("first", "middle", "last")]
    # a response of one token is at its start
    assert errors == pytest.approx([1.0, 0.25, 0.0])
    assert "middle/squared_error" not in numbers([judged([0.0], 1.0, 1)])


def test_what_is_undefined_is_absent_and_not_a_number():
    found = numbers([judged([0.5, 0.5], 0.7, 0)])
    assert found["squared_error"] == pytest.approx(0.04)
    assert found["explained_variance"] == 0.0
    assert not {"auc", "auc_within_prompts", "brier"} & found.keys()


def test_rewards_of_any_scale_are_ranked_by_their_middle():
    rows = [judged([10.0], 30.0, 0), judged([20.0], -10.0, 0), judged([0.0], 5.0, 0)]
    # 30 is a success, -10 and 5 are not: 10 < 20 lost, 10 > 0 won
    assert numbers(rows)["auc"] == pytest.approx(0.5)
