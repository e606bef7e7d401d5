"""Which responses are sampled for which prompts."""

import dataclasses
import threading

import pytest
import torch

from llmac.core.plans import Flat
from llmac.core.protocols import Completion, RolloutPlan, SamplingParams
from llmac.core.types import Finish, Prompt

SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=32)


class ScriptedEngine:
    """Answers prompt p with tokens (p, i) for its i-th response and remembers what it was asked."""

    policy_version = 3

    def __init__(self, *, drops=0):
        self.requests, self.drops = [], drops

    def generate(self, requests):
        self.requests.append(list(requests))
        return [
            [
                Completion(
                    token_ids=(request.prompt_ids[0], index),
                    logprobs=(-0.1, -0.2),
                    finish=Finish.LENGTH if index else Finish.STOP,
                    policy_version=self.policy_version,
                )
                for index in range(request.params.n - self.drops)
            ]
            for request in requests
        ]

    def load_weights(self, weights, version):
        raise AssertionError("a plan does not train")

    sleep = wake = close = load_weights


class CountingPrompts:
    """Prompts first, first + 1, ..., for ever."""

    def __init__(self, first=0):
        self.next, self.takes = first, []

    def take(self, count):
        self.takes.append(count)
        self.next += count
        return [
            Prompt(id=str(name), token_ids=(name,), source=str(name))
            for name in range(self.next - count, self.next)
        ]


def equal_unless(informative):
    """Siblings differ in reward for the prompts of which `informative(name)` holds."""

    def score(trajectories):
        return [
            dataclasses.replace(
                t, reward=0.1 + t.response_ids[1] * float(informative(int(t.prompt.id)))
            )
            for t in trajectories
        ]

    return score


def names(trajectories):
    return [int(t.prompt.id) for t in trajectories]


def test_each_prompt_gets_a_group_of_scored_siblings():
    engine, plan = ScriptedEngine(), Flat(group_size=3, prompts_per_step=2, sampling=SAMPLING)
    trajectories, metrics = plan.rollout(
        engine, CountingPrompts(), equal_unless(lambda name: True), seed=5
    )
    assert isinstance(plan, RolloutPlan)
    assert names(trajectories) == [0, 0, 0, 1, 1, 1]
    assert [t.group for t in trajectories] == [0, 0, 0, 1, 1, 1]
    assert [t.response_ids for t in trajectories[3:]] == [(1, 0), (1, 1), (1, 2)]
    assert trajectories[4].finish is Finish.LENGTH
    assert trajectories[4].sampler_logprobs == (-0.1, -0.2)
    assert trajectories[4].action_mask == (True, True)
    assert trajectories[4].policy_version == 3
    assert trajectories[4].reward == pytest.approx(1.1)
    assert metrics == {}
    assert plan.length_limit == 32


def test_requests_carry_the_sampling_and_seeds_that_never_meet():
    engine = ScriptedEngine()
    plan = Flat(group_size=4, prompts_per_step=8, sampling=SAMPLING)
    prompts, score = CountingPrompts(), equal_unless(lambda name: True)
    for seed in (0, 1, 0):
        plan.rollout(engine, prompts, score, seed=seed)
    first, second, again = (
        [request.params.seed for request in requests] for requests in engine.requests
    )
    assert first == again
    used = [seed + sibling for seed in first + second for sibling in range(4)]
    assert len(set(used)) == len(used)
    params = engine.requests[0][0].params
    assert dataclasses.replace(params, seed=None, n=1) == SAMPLING
    assert params.n == 4


def test_an_engine_that_returns_too_few_is_named():
    plan = Flat(group_size=3, prompts_per_step=2, sampling=SAMPLING)
    with pytest.raises(ValueError, match="6 in all, and returned 4"):
        plan.rollout(
            ScriptedEngine(drops=1), CountingPrompts(), equal_unless(lambda name: True), seed=0
        )


def informative_plan(**changes):
    return Flat(
        group_size=2, prompts_per_step=3, sampling=SAMPLING, informative_only=True, **changes
    )


def test_groups_with_equal_rewards_are_replaced():
    prompts = CountingPrompts()
    trajectories, metrics = informative_plan().rollout(
        ScriptedEngine(), prompts, equal_unless(lambda name: name % 2 == 1), seed=0
    )
    # 0 1 2 | 3 4 | 5: one of three, one of two, the last.
    assert prompts.takes == [3, 2, 1]
    assert names(trajectories) == [1, 1, 3, 3, 5, 5]
    assert len({t.group for t in trajectories}) == 3
    assert metrics["rollout/rounds"].value == 3
    assert metrics["rollout/groups_dropped"].value == 3
    assert metrics["rollout/groups_filled"].value == 0
    assert metrics["rollout/groups_surplus"].value == 0


def test_later_rounds_use_other_seeds():
    engine = ScriptedEngine()
    informative_plan().rollout(
        engine, CountingPrompts(), equal_unless(lambda name: name > 3), seed=0
    )
    seeds = [request.params.seed for requests in engine.requests for request in requests]
    assert len(set(seeds)) == len(seeds) > 3


def test_when_rounds_run_out_the_share_is_filled_up_and_counted():
    prompts = CountingPrompts()
    trajectories, metrics = informative_plan(max_rounds=2).rollout(
        ScriptedEngine(), prompts, equal_unless(lambda name: name == 4), seed=0
    )
    assert names(trajectories) == [4, 4, 0, 0, 1, 1]
    assert metrics["rollout/rounds"].value == 2
    assert metrics["rollout/groups_filled"].value == 2
    assert metrics["rollout/groups_dropped"].value == 3
    assert metrics["rollout/sampled_tokens"].value == 6 * 2 * 2  # those of dropped groups, too


def test_without_any_informative_group_the_shape_stays():
    trajectories, metrics = informative_plan(max_rounds=3).rollout(
        ScriptedEngine(), CountingPrompts(), equal_unless(lambda name: False), seed=0
    )
    assert len(trajectories) == 6
    assert metrics["rollout/rounds"].value == 3
    assert metrics["rollout/groups_filled"].value == 3
    assert metrics["rollout/groups_dropped"].value == 6


def two_ranks(informative, **changes):
    """Both ranks' results of one rollout; their sums meet at a barrier, as collectives do."""
    meeting, parts, results = threading.Barrier(2, timeout=20), {}, {}

    def rank(number):
        def sum_across(part):
            meeting.wait()
            parts[number] = part
            meeting.wait()
            return parts[0] + parts[1]

        prompts = CountingPrompts(first=1000 * number)
        results[number] = (
            *informative_plan(**changes).rollout(
                ScriptedEngine(), prompts, equal_unless(informative), seed=0, sum_across=sum_across
            ),
            prompts.takes,
        )

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[0], results[1]


def test_a_full_rank_goes_on_until_all_ranks_are_full():
    # Rank 0 is full at once; rank 1 finds one group in its first three, then two.
    (full, full_metrics, full_takes), (late, late_metrics, late_takes) = two_ranks(
        lambda name: name < 1000 or name >= 1002
    )
    assert full_takes == late_takes == [3, 2]
    assert names(full) == [0, 0, 1, 1, 2, 2]
    assert names(late) == [1002, 1002, 1003, 1003, 1004, 1004]
    assert full_metrics["rollout/groups_surplus"].value == 2
    assert late_metrics["rollout/groups_dropped"].value == 2
    assert full_metrics["rollout/rounds"].value == late_metrics["rollout/rounds"].value == 2


def test_ranks_give_up_together():
    (full, _, full_takes), (late, late_metrics, late_takes) = two_ranks(
        lambda name: name < 1000, max_rounds=4
    )
    assert full_takes == late_takes == [3, 3, 3, 3]
    assert len(full) == len(late) == 6
    assert late_metrics["rollout/groups_filled"].value == 3


def test_no_rank_draws_more_than_its_share_in_a_round():
    _, (_, _, takes) = two_ranks(lambda name: False, max_rounds=2)
    assert takes == [3, 3]


@pytest.mark.parametrize("name", ["group_size", "prompts_per_step", "max_rounds"])
def test_counts_below_one_are_named(name):
    counts = {"group_size": 2, "prompts_per_step": 2, "max_rounds": 2, name: 0}
    with pytest.raises(ValueError, match=f"{name} is at least 1; found 0"):
        Flat(sampling=SAMPLING, **counts)


def test_informative_groups_need_siblings():
    with pytest.raises(ValueError, match="group_size >= 2"):
        Flat(group_size=1, prompts_per_step=1, sampling=SAMPLING, informative_only=True)


def test_missing_prompts_are_counted_as_integers():
    seen = []

    def sum_across(part):
        seen.append(part)
        return part

    informative_plan().rollout(
        ScriptedEngine(), CountingPrompts(), equal_unless(lambda name: True), seed=0,
        sum_across=sum_across,
    )  # fmt: skip
    assert [part.tolist() for part in seen] == [0]
    assert not torch.is_floating_point(seen[0])
