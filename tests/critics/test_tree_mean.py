"""The critic that believes what the plan of a tree knows."""

import dataclasses

import pytest
import torch

from llmac.config.cards import choose_algorithm, choose_critic
from llmac.core.collate import collate
from llmac.core.types import CriticTargets, Finish, Prompt, Rollouts, Trajectory

EDGE = Trajectory(
    prompt=Prompt(id="p7", token_ids=(1,), source="?"),
    response_ids=(5, 6, 7),
    action_mask=(True,) * 3,
    sampler_logprobs=(-0.5,) * 3,
    finish=Finish.PAUSED,
    group=0,
    fresh_from=1,
    value_span=(0.25, 0.75),
)


def rollouts_of(*trajectories):
    batch = collate(trajectories, length_limit=8)
    return Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)


def tree_mean():
    return choose_critic(None, choose_algorithm("spo_tree")).settings.build(None)


def test_values_are_those_the_plan_knows_and_nothing_is_learned():
    leaf = dataclasses.replace(EDGE, finish=Finish.STOP, reward=1.0, value_span=(0.5, 1.0))
    critic, rollouts = tree_mean(), rollouts_of(EDGE, leaf)
    values = critic.values(rollouts, torch.zeros(2, 3, dtype=torch.bool))
    assert values.at.tolist() == [[0, 0.25, 0], [0, 0.5, 0]]
    assert values.starts.tolist() == [[False, True, False]] * 2
    assert values.bootstrap.tolist() == [0.75, 0]
    targets = CriticTargets(returns=values.at, value_mask=values.starts, old_values=values.at)
    assert critic.update(rollouts, targets) == {}


def test_rows_of_another_plan_are_refused():
    with pytest.raises(ValueError, match="1 of 2 rows, the first a response to prompt p7"):
        tree_mean().values(
            rollouts_of(EDGE, dataclasses.replace(EDGE, value_span=None)),
            torch.ones(2, 3, dtype=torch.bool),
        )
