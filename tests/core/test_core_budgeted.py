"""Groups of different sizes, by what a critic thinks of the prompts."""

import dataclasses

import pytest
import torch

from llmac.core.budget import UTILITIES
from llmac.core.budgeted import Budgeted
from llmac.core.plans import Flat
from llmac.core.protocols import AsksPromptValues, Completion, RolloutPlan, SamplingParams
from llmac.core.types import Finish, Prompt

SAMPLING = SamplingParams(max_new_tokens=4)


class Engine:
    """Answers with one token, the number of the response, and remembers what it was asked."""

    policy_version = 0

    def generate(self, requests):
        self.requests = list(requests)
        return [
            [
                Completion(token_ids=(index,), logprobs=(0.0,), finish=Finish.STOP)
                for index in range(request.params.n)
            ]
            for request in requests
        ]

    def load_weights(self, weights, version):
        raise AssertionError("a plan does not train")

    sleep = wake = close = load_weights


class Prompts:
    """Prompts 0, 1, ..."""

    def take(self, count):
        return [Prompt(id=f"p{name}", token_ids=(name,), source="?") for name in range(count)]


def score(trajectories):
    """The reward names the prompt, so that a response in the wrong group shows."""
    return [dataclasses.replace(t, reward=float(t.prompt.token_ids[0])) for t in trajectories]


def plan(values=(0.05, 0.5, 0.95), **changes):
    fields = {"utility": "failures", "min_responses": 2, "max_responses": 24, **changes}
    flat = Flat(group_size=8, prompts_per_step=len(values), sampling=SAMPLING)
    return Budgeted(
        flat=flat, prompt_values=lambda prompts: torch.tensor(values[: len(prompts)]), **fields
    )


def test_the_responses_go_where_they_are_worth_most():
    budgeted, engine = plan(), Engine()
    assert isinstance(budgeted, RolloutPlan)
    assert isinstance(budgeted, AsksPromptValues)
    assert not isinstance(budgeted.flat, AsksPromptValues)
    trajectories, metrics = budgeted.rollout(engine, Prompts(), score, seed=0)
    # (20, 2, 2)
    assert [t.group for t in trajectories] == [0] * 20 + [1] * 2 + [2] * 2
    assert [t.reward for t in trajectories] == [0.0] * 20 + [1.0] * 2 + [2.0] * 2
    assert [t.prompt.id for t in trajectories[-2:]] == ["p2", "p2"]
    assert [request.params.n for request in engine.requests] == [20, 2, 2]
    assert metrics["rollout/group_size_max"].value == 20
    assert metrics["rollout/budget_gain"].value == pytest.approx(12.425282 / 6.661386, abs=1e-5)


def test_each_utility_divides_in_its_own_way():
    trajectories, _ = plan(utility="mixed").rollout(Engine(), Prompts(), score, seed=0)
    sizes = torch.tensor([t.group for t in trajectories]).bincount()
    # 5 to the middle one, 9 and 10 to the others
    assert sorted(sizes.tolist()) == [5, 9, 10]


def test_equal_prompts_are_sampled_as_without_a_budget():
    budgeted, engine = plan(values=(0.5, 0.5), utility="mixed"), Engine()
    trajectories, metrics = budgeted.rollout(engine, Prompts(), score, seed=3)
    budgeted_requests = engine.requests
    expected, _ = budgeted.flat.rollout(engine, Prompts(), score, seed=3)
    assert budgeted_requests == engine.requests
    assert trajectories == expected
    assert metrics["rollout/budget_gain"].value == pytest.approx(1.0)


def test_seeds_of_unequal_groups_never_meet():
    engine = Engine()
    plan().rollout(engine, Prompts(), score, seed=0)
    used = [r.params.seed + sibling for r in engine.requests for sibling in range(r.params.n)]
    assert len(set(used)) == len(used) == 24


def test_values_in_other_units_are_chances_between_failure_and_success():
    budgeted = plan(values=(-0.9, 0.0, 0.9), reward_range=(-1.0, 1.0))
    trajectories, _ = budgeted.rollout(Engine(), Prompts(), score, seed=0)
    assert [t.group for t in trajectories] == [0] * 20 + [1] * 2 + [2] * 2


def test_bounds_are_kept():
    trajectories, _ = plan(min_responses=3, max_responses=10).rollout(
        Engine(), Prompts(), score, seed=0
    )
    sizes = torch.tensor([t.group for t in trajectories]).bincount()
    assert int(sizes.sum()) == 24
    assert 3 <= int(sizes.min()) <= int(sizes.max()) <= 10


@pytest.mark.parametrize(
    ("values", "reward_range", "clipped"),
    [
        ((0.05, 0.5, 0.95), (0.0, 1.0), 0),
        ((-0.2, 0.5, 1.4), (0.0, 1.0), 2),  # a length penalty, a bonus
        ((0.0, 0.0, 0.0), (1.0, 5.0), 3),  # a running mean before its first outcome
        ((-float("inf"), 0.0, 1e-6 + 1.0), (0.0, 1.0), 1),
    ],
)
def test_values_outside_the_range_count_as_its_ends_and_are_reported(values, reward_range, clipped):
    low, high = reward_range
    found, expected = plan(values=values), plan(values=[min(max(v, low), high) for v in values])
    found.reward_range = expected.reward_range = reward_range  # as build sets it
    trajectories, metrics = found.rollout(Engine(), Prompts(), score, seed=0)
    assert trajectories == expected.rollout(Engine(), Prompts(), score, seed=0)[0]
    assert metrics["rollout/prompt_values_clipped"].value == clipped


def test_without_a_critic_or_with_one_that_is_broken_it_is_said_so():
    with pytest.raises(
        ValueError, match=r"set critic: \{name: prompt_value\}, or allocation: equal"
    ):
        dataclasses.replace(plan(), prompt_values=None).rollout(Engine(), Prompts(), score, seed=0)
    with pytest.raises(ValueError, match="that of prompt p1 is NaN"):
        plan(values=(0.5, float("nan"))).rollout(Engine(), Prompts(), score, seed=0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"min_responses": 9}, "must be rising, from 1 on; found 9, 8 and 24"),
        ({"max_responses": 7}, "must be rising, from 1 on; found 2, 8 and 7"),
        ({"min_responses": 0}, "found 0, 8 and 24"),
    ],
)
def test_bounds_that_leave_no_allocation_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        plan(**changes)


def test_a_budget_and_informative_groups_are_two_ways_to_the_same_end():
    flat = dataclasses.replace(plan().flat, informative_only=True)
    with pytest.raises(ValueError, match="choose one of the two"):
        dataclasses.replace(plan(), flat=flat)


@pytest.mark.parametrize("utility", UTILITIES)
def test_rounding_of_values_at_the_ends_is_forgiven(utility):
    trajectories, _ = plan(values=(-1e-6, 1 + 1e-6, 0.5), utility=utility).rollout(
        Engine(), Prompts(), score, seed=0
    )
    assert len(trajectories) == 24
