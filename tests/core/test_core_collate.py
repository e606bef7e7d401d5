"""From trajectories to tensors."""

import dataclasses
import math

import pytest
import torch

from llmac.core.collate import collate
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory


def trajectory(ids, *, mask=None, reward=1.0, finish=Finish.STOP, group=0, name="p0"):
    return Trajectory(
        prompt=Prompt(id=name, token_ids=(1, 2), source="?"),
        response_ids=tuple(ids),
        action_mask=tuple(mask) if mask is not None else (True,) * len(ids),
        sampler_logprobs=tuple(-0.5 * token for token in ids),
        finish=finish,
        group=group,
        reward=reward,
    )


def test_rows_are_padded_to_the_longest_response():
    rows = [
        trajectory([4, 5, 6], mask=[True, False, True], reward=2.0, group=7),
        trajectory([8], reward=-1.0, finish=Finish.LENGTH, group=9),
    ]
    batch = collate(rows, length_limit=16)
    assert batch.response_ids.tolist() == [[4, 5, 6], [8, 0, 0]]
    assert batch.action_mask.tolist() == [[True, False, True], [True, False, False]]
    assert batch.rewards.tolist() == [[0.0, 0.0, 2.0], [-1.0, 0.0, 0.0]]
    assert batch.sampler_logprobs.tolist() == [[-2.0, -2.5, -3.0], [-4.0, 0.0, 0.0]]
    assert batch.truncated.tolist() == [False, True]
    assert batch.group.tolist() == [7, 9]
    assert batch.length_limit == 16
    assert batch.trajectories == tuple(rows)
    assert batch.rewards.dtype == batch.sampler_logprobs.dtype == torch.float32


def test_an_outcome_before_tool_output_stays_on_the_last_action():
    batch = collate([trajectory([4, 5, 6], mask=[True, True, False])], length_limit=8)
    assert batch.rewards.tolist() == [[0.0, 1.0, 0.0]]


def test_a_response_without_tokens_is_a_row_with_an_empty_mask():
    batch = collate([trajectory([]), trajectory([3, 4])], length_limit=8)
    assert batch.action_mask.tolist() == [[False, False], [True, True]]
    assert batch.rewards.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    only_empty = collate([trajectory([])], length_limit=8)
    assert only_empty.response_ids.shape == (1, 0)


def test_a_missing_reward_names_the_prompt():
    with pytest.raises(ValueError, match="gsm8k/41 has no reward"):
        collate([trajectory([3]), trajectory([3], reward=None, name="gsm8k/41")], length_limit=8)


def test_a_paused_response_needs_no_reward_yet_and_counts_as_truncated():
    rows = [
        dataclasses.replace(trajectory([4, 5, 6], reward=None, finish=Finish.PAUSED), fresh_from=1),
        trajectory([8, 9]),
    ]
    batch = collate(rows, length_limit=16)
    assert batch.rewards.tolist() == [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert batch.truncated.tolist() == [True, False]
    rollouts = Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)
    assert rollouts.paused.tolist() == [True, False]
    assert (rollouts.fresh & rollouts.action_mask).tolist() == [
        [False, True, True],
        [True, True, False],
    ]
    assert rollouts.rows(torch.tensor([0])).paused.tolist() == [True]


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_names_the_prompt(reward):
    with pytest.raises(ValueError, match=f"gsm8k/41 has reward {reward}"):
        collate([trajectory([3], reward=reward, name="gsm8k/41")], length_limit=8)


def test_fields_of_unequal_length_name_the_prompt():
    short = dataclasses.replace(trajectory([3, 4], name="p9"), sampler_logprobs=(-1.0,))
    with pytest.raises(ValueError, match="p9 has 2 token ids, 2 mask entries and 1 log-probs"):
        collate([short], length_limit=8)


def test_nothing_to_collate_is_an_error():
    with pytest.raises(ValueError, match="at least one trajectory"):
        collate([], length_limit=8)
