"""Values the plan knew: an edge of a tree is a truncated row whose bootstrap is the child's value."""

import pytest
import torch

from llmac.core.collate import collate
from llmac.core.returns import segment_gae
from llmac.core.spans import span_values
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory

PROMPT = Prompt(id="p0", token_ids=(1, 2), source="?")


def edge(response, fresh_from, span, finish=Finish.PAUSED, reward=None):
    return Trajectory(
        prompt=PROMPT,
        response_ids=tuple(response),
        action_mask=(True,) * len(response),
        sampler_logprobs=(-0.5,) * len(response),
        finish=finish,
        group=0,
        reward=reward,
        fresh_from=fresh_from,
        value_span=span,
    )


def rollouts_of(*edges):
    batch = collate(edges, length_limit=8)
    return Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)


def test_an_edge_is_worth_the_difference_of_its_ends_and_a_leaf_its_reward_minus_its_start():
    rollouts = rollouts_of(
        edge([5, 6], 0, (0.75, 1.0)),
        edge([5, 6, 7, 8], 2, (1.0, 0.5)),
        edge([5, 6, 7], 2, (0.5, 1.0), Finish.STOP, 1.0),
        edge([5, 6, 9], 2, (0.5, 0.0), Finish.LENGTH, 0.0),
    )
    values = span_values(rollouts)
    advantages = segment_gae(
        rollouts.rewards,
        values.at,
        values.starts,
        values.bootstrap,
        gamma=1.0,
        lam=0.0,
        action_mask=rollouts.action_mask & rollouts.fresh,
    )
    assert advantages.tolist() == [
        [0.25, 0.25, 0.0, 0.0],
        [0.0, 0.0, -0.5, -0.5],
        [0.0, 0.0, 0.5, 0.0],
        [0.0, 0.0, -0.5, 0.0],
    ]


def test_a_row_whose_ends_nobody_knows_is_refused_by_the_name_of_its_prompt():
    with pytest.raises(ValueError, match=r"1 of 2 rows, the first a response to prompt p0"):
        span_values(rollouts_of(edge([5], 0, (0.0, 1.0)), edge([5], 0, None)))


def test_joined_rows_are_the_rows_of_both_padded_to_the_longest():
    left, right = (
        rollouts_of(edge([5, 6], 0, (0.0, 1.0))),
        rollouts_of(edge([7, 8, 9], 1, (0.5, 0.25))),
    )
    both = left.joined(right)
    assert both.response_ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert both.action_mask.tolist() == [[True, True, False], [True] * 3]
    assert len(both.trajectories) == 2
    assert both.ref_logprobs is None
    values = span_values(left).joined(span_values(right))
    whole = span_values(both)
    assert torch.equal(values.at, whole.at)
    assert torch.equal(values.bootstrap, whole.bootstrap)
    assert torch.equal(values.starts, whole.starts)
