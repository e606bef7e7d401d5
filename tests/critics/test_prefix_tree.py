"""The prefix tree as a critic: what is still to come, where it is asked, from siblings that began alike."""

import dataclasses

import pytest
import torch

from llmac.config.cards import choose_algorithm, choose_critic
from llmac.core.protocols import Critic
from llmac.core.types import Finish
from llmac.critics.baselines import GroupMean
from llmac.critics.prefix_tree import PrefixTree, PrefixTreeConfig
from tests.algorithms.making import ragged

from .making import rollouts_of, trajectory


def siblings():
    return rollouts_of(
        [trajectory([3, 5, 6], 1.0), trajectory([3, 5], 0.0), trajectory([4, 5, 6], 0.0)]
    )


def test_it_is_a_critic_by_name_that_needs_siblings():
    settings = choose_critic("prefix_tree", choose_algorithm("ppo")).settings
    assert isinstance(settings, PrefixTreeConfig)
    assert settings.least_group_size == 2
    critic = settings.build(None)
    assert isinstance(critic, Critic)
    assert critic.update(siblings(), None) == {}


def test_before_the_first_token_it_is_the_mean_of_the_group():
    rollouts = ragged()
    tree, mean = (c.values(rollouts, rollouts.action_mask).at for c in (PrefixTree(), GroupMean()))
    torch.testing.assert_close(tree[:, 0], mean[:, 0])


def test_values_stand_where_they_are_asked_and_contain_the_responses_own_outcome():
    rollouts = siblings()
    starts = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])
    values = PrefixTree().values(rollouts, starts)
    third = pytest.approx(1 / 3)
    # after 3 and after 3 5: one of two; the second ends there; after 4: only itself, a failure
    assert values.at.tolist() == [[third, 0, 0.5], [third, 0.5, 0], [0, 0, 0]]
    assert torch.equal(values.starts, starts)
    assert values.bootstrap.tolist() == [0, 0, 0]


def test_rewards_along_the_response_are_taken_off_once_they_are_earned():
    rollouts = siblings()
    rewards = torch.tensor([[0.25, 0.0, 0.75], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    cut = torch.tensor([False, True, False])
    rollouts = dataclasses.replace(rollouts, rewards=rewards, truncated=cut)
    values = PrefixTree().values(rollouts, rollouts.action_mask)
    # outcomes 1, 1/2, 0; behind 3 and 3 5 the mean is 3/4, of which 1/4 and 1/2 are earned
    assert values.at[:2].tolist() == [[0.5, 0.5, 0.5], [0.5, 0.25, 0.0]]
    assert values.bootstrap.tolist() == [0.0, 0.25, 0.0]


def test_a_paused_response_is_no_failure():
    rollouts = siblings()
    first, second, third = rollouts.trajectories
    paused = dataclasses.replace(second, finish=Finish.PAUSED, reward=None)
    rollouts = dataclasses.replace(rollouts, trajectories=(first, paused, third))
    values = PrefixTree().values(rollouts, rollouts.action_mask)
    assert values.at[:2].tolist() == [[0.5, 1, 1], [0.5, 1, 0]]


def test_a_tool_s_tokens_tell_states_apart():
    rollouts = siblings()
    asked = rollouts.action_mask.clone()
    asked[:, 0] = False  # injected, and the same decision follows
    values = PrefixTree().values(rollouts, asked)
    assert values.at[:, 1].tolist() == [0.5, 0.5, 0.0]
