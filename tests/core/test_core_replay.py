"""Rows that wait for a later step, and trajectories as plain data."""

import dataclasses
import io
from collections import Counter

import pytest
import torch

from llmac.core.plain_trajectory import from_plain, plain
from llmac.core.replay import ReplayBuffer
from llmac.core.types import Finish, Prompt, Trajectory


def row(prompt, number=0, **changes):
    fields = {
        "prompt": Prompt(id=str(prompt), token_ids=(prompt, 7), source="?"),
        "response_ids": (number, 5),
        "action_mask": (True, True),
        "sampler_logprobs": (-0.1, -1 / 3),
        "finish": Finish.STOP,
        "group": prompt,
        "reward": 1.0,
    }
    return Trajectory(**{**fields, **changes})


def rows(prompt, count):
    return [row(prompt, number) for number in range(count)]


def draw(buffer, fresh=(), *, count=99, per_prompt=None, seed=0):
    return buffer.draw(fresh, count=count, per_prompt=per_prompt, seed=seed)


def test_where_there_is_room_all_rows_are_used_in_their_order():
    buffer = ReplayBuffer(steps=3)
    fresh = rows(1, 4) + rows(0, 3)
    drawn = draw(buffer, fresh, count=9)
    assert (drawn.rows, drawn.expired, drawn.missing, len(buffer)) == (fresh, 0, 2, 0)


def test_rows_wait_as_many_steps_as_they_may_and_age():
    buffer = ReplayBuffer(steps=2)
    assert len(draw(buffer, rows(0, 5), count=2).rows) == 2
    second = draw(buffer, count=1)
    assert [r.age for r in second.rows] == [1]
    third = draw(buffer, count=1)
    assert [r.age for r in third.rows] == [2]
    assert (third.expired, len(buffer)) == (1, 0)
    last = draw(buffer, count=4)
    assert (last.rows, last.missing) == ([], 4)


def test_younger_rows_come_first_and_chance_decides_among_equals():
    buffer = ReplayBuffer(steps=4)
    draw(buffer, rows(0, 6), count=3)
    drawn = draw(buffer, rows(1, 4), count=6)
    assert [r.age for r in drawn.rows] == [0, 0, 0, 0, 1, 1]

    def chosen(seed):
        return {
            r.response_ids[0]
            for r in draw(ReplayBuffer(steps=0), rows(0, 20), count=5, seed=seed).rows
        }

    assert chosen(1) == chosen(1)
    times = Counter(number for seed in range(80) for number in chosen(seed))
    assert len(times) == 20  # each in its turn, 20 times of 80 on average
    assert max(times.values()) < 40


def test_no_prompt_has_more_rows_than_it_may_replayed_ones_included():
    buffer = ReplayBuffer(steps=4)
    draw(buffer, rows(0, 6), per_prompt=2)
    drawn = draw(buffer, rows(0, 1) + rows(1, 3), per_prompt=2)
    assert Counter(r.prompt.id for r in drawn.rows) == {"0": 2, "1": 2}
    assert len(buffer) == 3 + 1


def test_nothing_waits_without_replay_and_no_more_than_could_be_used_with_it():
    forgetful = ReplayBuffer(steps=0)
    assert draw(forgetful, rows(0, 5), count=2).expired == 3
    assert len(forgetful) == 0
    buffer = ReplayBuffer(steps=2)
    assert draw(buffer, rows(0, 20), count=3).expired == 20 - 3 - 6
    assert len(buffer) == 6
    with pytest.raises(ValueError, match="replay_steps is at least 0; found -1"):
        ReplayBuffer(steps=-1)


def saved(state):
    """Through a file, as a checkpoint does it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_what_waits_is_restored_to_the_bit():
    buffer, other = ReplayBuffer(steps=3), ReplayBuffer(steps=3)
    edge = dataclasses.replace(
        row(2, sampler_logprobs=(-1e-17, -2 / 3)), value_span=(1 / 3, 0.1), sibling_std=0.7
    )
    draw(buffer, [*rows(0, 6), edge], count=2)
    state = saved(buffer.state())
    draw(buffer, count=1)  # what is saved stays
    other.restore(state)
    again = ReplayBuffer(steps=3)
    draw(again, [*rows(0, 6), edge], count=2)
    for seed in range(4):
        assert draw(other, count=2, seed=seed) == draw(again, count=2, seed=seed)


@pytest.mark.parametrize(
    "trajectory",
    [
        row(3),
        row(
            4,
            action_mask=(True, False),
            finish=Finish.LENGTH,
            reward=None,
            reward_parts={"judge": None, "length": 0.25},
            response_text="ä b",
            fresh_from=1,
            policy_version=8,
            value_span=(0.1, 1 / 3),
            sibling_std=0.0,
            baseline_reward=0.5,
            age=3,
        ),
        row(5, response_ids=(), action_mask=(), sampler_logprobs=(), finish=Finish.PAUSED),
    ],
)
def test_a_trajectory_comes_back_from_plain_data_as_it_was(trajectory):
    assert from_plain(saved(plain(trajectory))) == trajectory
    names = {field.name for field in dataclasses.fields(Trajectory)} - {"prompt"}
    assert names <= plain(trajectory).keys()


def test_responses_that_an_earlier_version_saved_are_paused_ones_without_a_reward():
    entry = {
        "prompt": "p",
        "prompt_ids": torch.tensor([1, 2]),
        "source": "?",
        "columns": {"answer": 3},
        "response_ids": torch.tensor([4, 5]),
        "sampler_logprobs": torch.tensor([-0.5, -0.25], dtype=torch.float64),
        "group": 6,
    }
    assert from_plain(entry) == Trajectory(
        prompt=Prompt(id="p", token_ids=(1, 2), source="?", columns={"answer": 3}),
        response_ids=(4, 5),
        action_mask=(True, True),
        sampler_logprobs=(-0.5, -0.25),
        finish=Finish.PAUSED,
        group=6,
    )
