"""Responses that a critic sampled join the step's rows and values."""

from types import SimpleNamespace

import torch

from llmac.core.collate import collate
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory, Values
from llmac.loop import with_offered


class Annotating:
    """An actor whose log-probs are the rows' ids, negative; it counts the calls that ranks make together."""

    def __init__(self):
        self.looked = []

    def annotate(self, batch, *, reference):
        self.looked.append(len(batch.trajectories))
        logprobs = -batch.response_ids.float()
        return Rollouts.of(
            batch, old_logprobs=logprobs, ref_logprobs=2 * logprobs if reference else None
        )


def row(ids, reward, **fields):
    return Trajectory(
        prompt=Prompt(id="p0", token_ids=(1,), source="?"),
        response_ids=tuple(ids),
        action_mask=(True,) * len(ids),
        sampler_logprobs=(-1.0,) * len(ids),
        finish=Finish.STOP,
        group=4,
        reward=reward,
        **fields,
    )


def joined(offered, *, reference=False):
    actor = Annotating()
    parts = SimpleNamespace(actor=actor, algorithm=SimpleNamespace(uses_reference=reference))
    rows = [row([2, 3], 1.0), row([2], 0.0)]
    rollouts = actor.annotate(collate(rows, length_limit=9), reference=reference)
    starts = rollouts.action_mask
    values = Values(at=0.5 * starts, starts=starts, bootstrap=torch.zeros(2))
    both = with_offered(offered, rollouts, values, parts)
    return *both, actor.looked[1:], (rollouts, values)


def test_they_stand_behind_the_rows_with_their_values_at_their_first_own_token():
    offered = [row([2, 3, 5, 6], 1.0, fresh_from=1, value_span=(0.25, 0.0))]
    rollouts, values, looked, _ = joined(offered, reference=True)
    assert looked == [1]
    assert rollouts.trajectories[2] is offered[0]
    assert rollouts.length_limit == 9
    assert rollouts.group.tolist() == [4, 4, 4]
    assert rollouts.response_ids.tolist() == [[2, 3, 0, 0], [2, 0, 0, 0], [2, 3, 5, 6]]
    assert rollouts.old_logprobs[2].tolist() == [-2, -3, -5, -6]
    assert rollouts.ref_logprobs[2].tolist() == [-4, -6, -10, -12]
    assert rollouts.rewards.sum(1).tolist() == [1, 0, 1]
    assert rollouts.fresh.tolist()[2] == [False, True, True, True]
    assert values.starts.tolist()[2] == [False, True, False, False]
    assert values.at.tolist() == [[0.5, 0.5, 0, 0], [0.5, 0, 0, 0], [0, 0.25, 0, 0]]
    assert values.bootstrap.tolist() == [0, 0, 0]


def test_a_rank_without_any_looks_as_often_as_the_others_and_keeps_what_it_has():
    rollouts, values, looked, before = joined([])
    assert looked == [1]
    assert rollouts is before[0]
    assert values is before[1]


def test_rows_narrower_than_the_step_are_padded():
    rollouts, values, _, _ = joined([row([7], 0.0, value_span=(0.75, 0.0))])
    assert rollouts.response_ids.tolist() == [[2, 3], [2, 0], [7, 0]]
    assert values.at.tolist()[2] == [0.75, 0]
