"""Critics without parameters: the baselines of GRPO and RLOO, and a memory for prompts."""

import dataclasses
import math

import pytest
import torch

from llmac.core.protocols import Critic, Observer, PromptCritic
from llmac.core.segments import every_token
from llmac.core.types import Finish
from llmac.critics.baselines import (
    GroupMean,
    GroupMeanConfig,
    LeaveOneOut,
    LeaveOneOutConfig,
    RunningMean,
    RunningMeanConfig,
)
from llmac.critics.outcomes import PromptOutcome, foresight, outcomes, prompt_outcomes
from llmac.runtime.checkpoint import Saveable
from llmac.runtime.context import Runtime
from tests.algorithms.making import card, make_rollouts, moved, ragged


@pytest.fixture
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


class TwoRanks:
    """Rank 0 of two that saw the same: what it gathers comes twice, the other's prompts renamed."""

    is_main = True

    def gather(self, item):
        other = {
            f"{name}'": (dataclasses.replace(prompt, id=f"{name}'"), earned, responses)
            for name, (prompt, earned, responses) in item.items()
        }
        return [item, other]


def of_prompts(rollouts, names):
    """The same rows, answering the prompts of these names; siblings are those of one name."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    trajectories = tuple(
        dataclasses.replace(t, prompt=dataclasses.replace(t.prompt, id=name), group=numbers[name])
        for t, name in zip(rollouts.trajectories, names, strict=True)
    )
    group = torch.tensor([numbers[name] for name in names])
    return dataclasses.replace(rollouts, trajectories=trajectories, group=group)


def step(rewards, names):
    """One response to each of the named prompts."""
    rollouts = make_rollouts(rewards=rewards, lengths=[2] * len(rewards), group=[0] * len(rewards))
    return of_prompts(rollouts, names)


def loss_and_gradient(algorithm, rollouts, values):
    credit = algorithm.credit(rollouts, values)
    logprobs = moved(rollouts)
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    return credit.advantages, gradient


@pytest.mark.parametrize(("critic", "without"), [(GroupMean(), "dr_grpo"), (LeaveOneOut(), "rloo")])
@pytest.mark.parametrize("spread_out", [False, True])
def test_ppo_with_the_siblings_as_critic_is_the_algorithm_without_a_critic(
    critic, without, spread_out
):
    rollouts = ragged()
    if spread_out:  # rewards all along the response instead of on its last token
        random = torch.Generator().manual_seed(0)
        noise = torch.rand(rollouts.rewards.shape, generator=random, dtype=torch.float64)
        rollouts = dataclasses.replace(rollouts, rewards=noise * rollouts.action_mask)
    ppo = card("ppo", lam=1.0, gamma=1.0, whiten_advantages=False)
    other = card(without, aggregation=ppo.aggregation)
    values = critic.values(rollouts, ppo.segments(rollouts))
    expected = loss_and_gradient(other, rollouts, None)
    for found, wanted in zip(loss_and_gradient(ppo, rollouts, values), expected, strict=True):
        torch.testing.assert_close(found, wanted)
        assert wanted.abs().sum() > 0


def test_groups_may_differ_in_size():
    rollouts = of_prompts(
        make_rollouts(rewards=[1, 0, 0, 1, 0], lengths=[1] * 5, group=[0] * 5), list("aaabb")
    )
    starts = every_token(rollouts.action_mask)
    mean = GroupMean().values(rollouts, starts).at[:, 0]
    assert mean.tolist() == pytest.approx([1 / 3] * 3 + [0.5] * 2)
    others = LeaveOneOut().values(rollouts, starts).at[:, 0]
    assert others.tolist() == pytest.approx([0, 0.5, 0.5, 0, 1])


def test_a_lone_response_has_nobody_to_be_compared_with():
    rollouts = step([1.0, 0.0], ["a", "b"])
    starts = every_token(rollouts.action_mask)
    assert GroupMean().values(rollouts, starts).at[:, 0].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="has one response; leave-one-out needs at least two"):
        LeaveOneOut().values(rollouts, starts)


@pytest.mark.parametrize("critic", [GroupMean(), LeaveOneOut()])
def test_paused_responses_are_no_failures(critic):
    rollouts = of_prompts(
        make_rollouts(rewards=[1, 0, 0, 0], lengths=[2] * 4, group=[0] * 4), list("aaab")
    )
    paused = tuple(
        dataclasses.replace(t, finish=Finish.PAUSED, reward=None) if row >= 2 else t
        for row, t in enumerate(rollouts.trajectories)
    )
    rollouts = dataclasses.replace(
        rollouts, trajectories=paused, truncated=torch.tensor([False, False, True, True])
    )
    values = critic.values(rollouts, every_token(rollouts.action_mask))
    siblings = {GroupMean: [0.5, 0.5], LeaveOneOut: [0.0, 1.0]}[type(critic)]
    # The paused sibling expects their mean; the one without finished siblings nothing.
    assert values.at[:, 0].tolist() == [*siblings, 0.5, 0.0]
    assert values.bootstrap.tolist() == [0.0, 0.0, 0.5, 0.0]


def test_values_are_what_is_still_to_come_and_only_where_asked():
    rollouts = step([1.0, 0.0], ["a", "a"])
    rewards = torch.tensor([[0.25, 0.75], [0.0, 0.0]], dtype=torch.float64)
    rollouts = dataclasses.replace(rollouts, rewards=rewards, truncated=torch.tensor([True, False]))
    starts = torch.tensor([[True, True], [False, True]])
    values = GroupMean().values(rollouts, starts)
    # mean .5; before the second token the first row has earned .25, and all of 1 at its end
    assert values.at.tolist() == [[0.5, 0.25], [0.0, 0.5]]
    assert values.bootstrap.tolist() == [-0.5, 0.0]


def test_an_empty_response_counts_with_its_reward():
    rollouts = ragged()
    total, known = outcomes(rollouts)
    assert int(rollouts.action_mask.any(1).sum()) == 11
    assert total.tolist() == [t.reward for t in rollouts.trajectories]
    assert bool(known.all())


def running(runtime, **settings):
    return RunningMean(RunningMeanConfig(**settings), runtime)


def test_the_running_mean_of_a_prompt_moves_by_the_rate(runtime):
    critic = running(runtime, rate=0.25)
    assert isinstance(critic, Critic)
    assert isinstance(critic, Observer)
    assert isinstance(critic, PromptCritic)
    assert isinstance(critic, Saveable)
    first = step([1.0, 0.0, 0.0, 0.0], ["a", "a", "b", "b"])
    starts = every_token(first.action_mask)
    # Nothing is known: each prompt is worth what the other earned.
    assert critic.values(first, starts).at[:, 0].tolist() == [0.0, 0.0, 0.5, 0.5]
    critic.observe(first)
    # a: 0 + .25 (.5 - 0); b: .5 + .25 (0 - .5)
    second = step([1.0, 1.0, 0.0], ["a", "b", "c"])
    values = critic.values(second, every_token(second.action_mask))
    assert values.at[:, 0].tolist() == [0.125, 0.375, 1.0]
    # Before anything is sampled an unknown prompt is worth what the last step earned, 1/4.
    prompts = [t.prompt for t in second.trajectories]
    assert critic.prompt_values(prompts).tolist() == [0.125, 0.375, 0.25]


def test_the_running_mean_never_contains_the_outcome_it_is_compared_with(runtime):
    critic = running(runtime)
    critic.observe(step([1.0, 0.0], ["a", "b"]))
    names = ["a", "b", "new", "new", "other"]
    for row in range(5):
        values = []
        for outcome in (0.0, 1.0):
            rewards = [0.5] * 5
            rewards[row] = outcome
            rollouts = step(rewards, names)
            values.append(critic.values(rollouts, every_token(rollouts.action_mask)).at[row, 0])
        assert values[0] == values[1]


def test_a_single_prompt_alone_in_its_step_is_worth_what_the_last_step_earned(runtime):
    critic = running(runtime)
    first = step([1.0], ["a"])
    starts = every_token(first.action_mask)
    assert critic.values(first, starts).at[0, 0] == 0.0
    critic.observe(first)
    assert critic.values(step([0.0], ["b"]), starts).at[0, 0] == 1.0


def test_all_ranks_know_what_each_of_them_saw():
    critic = RunningMean(RunningMeanConfig(rate=1.0), TwoRanks())
    rollouts = step([1.0, 0.0], ["a", "b"])
    values = critic.values(rollouts, every_token(rollouts.action_mask))
    # a: the others are b, a' and b'
    assert values.at[:, 0].tolist() == pytest.approx([1 / 3, 2 / 3])
    critic.observe(rollouts)
    assert critic._means == {"a": 1.0, "b": 0.0, "a'": 1.0, "b'": 0.0}


def test_a_prompt_sampled_on_two_ranks_is_one_prompt():
    class SamePrompts:
        def gather(self, item):
            return [item, item]

    found = prompt_outcomes(step([1.0, 0.0, 0.0], ["a", "a", "b"]), SamePrompts())
    assert [(entry.prompt.id, entry.mean, entry.responses) for entry in found] == [
        ("a", 0.5, 4),
        ("b", 0.0, 2),
    ]


def test_a_restored_running_mean_goes_on_as_if_nothing_had_happened(runtime, tmp_path):
    critic = running(runtime)
    critic.observe(step([1.0, 0.0, 0.25], ["a", "b", "c"]))
    critic.save(tmp_path)
    again = running(runtime)
    again.load(tmp_path)
    following = step([0.0, 1.0, 1.0], ["a", "d", "c"])
    starts = every_token(following.action_mask)
    assert torch.equal(critic.values(following, starts).at, again.values(following, starts).at)
    assert critic.observe(following) == again.observe(following)
    assert (critic._means, critic._latest) == (again._means, again._latest)


def test_foresight_is_ranking_within_the_step():
    def found(means):
        prompts = [
            t.prompt for t in step([0.0] * len(means), list("abcdefg"[: len(means)])).trajectories
        ]
        return [
            PromptOutcome(prompt=prompt, mean=mean, responses=2)
            for prompt, mean in zip(prompts, means, strict=True)
        ]

    right = foresight(torch.tensor([0.9, 0.5, 0.1]), found([1.0, 0.5, 0.0]), (0.0, 1.0))
    # wins (1, .5, 0), losses (0, .5, 1): pairs 2.25, of which a > b .5, a > c 1, b > c .5, b = b .125
    assert right["critic/prompt_auc"].value == pytest.approx(2.125 / 2.25)
    # errors (.1, 0, -.1) of (1, .5, 0): 1 - .02/.5
    assert right["critic/prompt_explained_var"].value == pytest.approx(0.96)
    wrong = foresight(torch.tensor([0.1, 0.9]), found([1.0, 0.0]), (0.0, 1.0))
    assert wrong["critic/prompt_auc"].value == 0.0
    assert "critic/prompt_auc" not in foresight(torch.rand(2), found([1.0, 1.0]), (0.0, 1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "rate must be above 0"),
        ({"rate": 1.1}, "rate must be above 0 and at most 1, found 1.1"),
        ({"reward_range": (1.0, 1.0)}, "reward_range must be"),
        ({"reward_range": (0.0, math.inf)}, "reward_range must be"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunningMeanConfig(**settings)


@pytest.mark.parametrize("settings", [GroupMeanConfig, LeaveOneOutConfig])
def test_a_baseline_of_siblings_asks_for_a_sibling(settings):
    assert settings().least_group_size == 2


@pytest.mark.parametrize(("limits", "start"), [((1.0, 5.0), 1.0), ((-3.0, -1.0), -1.0)])
def test_a_running_mean_starts_inside_the_range(runtime, limits, start):
    critic = running(runtime, reward_range=limits)
    rollouts = step([3.0], ["a"])
    assert critic.prompt_values([t.prompt for t in rollouts.trajectories]).tolist() == [start]
    assert critic.values(rollouts, every_token(rollouts.action_mask)).at[0, 0] == start


def test_averages_beyond_the_range_are_said_as_its_ends_and_counted(runtime):
    critic = running(runtime, rate=1.0)
    rollouts = step([-0.2, 1.5, 1.5, 0.5], ["a", "b", "b", "c"])
    assert critic.observe(rollouts)["critic/vf_target_clipfrac"].value == 0.75
    prompts = [t.prompt for t in rollouts.trajectories]
    assert critic.prompt_values(prompts).tolist() == [0.0, 1.0, 1.0, 0.5]
    # A baseline is compared with outcomes as they are.
    values = critic.values(rollouts, every_token(rollouts.action_mask)).at[:, 0]
    assert values.tolist() == pytest.approx([-0.2, 1.5, 1.5, 0.5])
