"""The plan that neither samples nor scores: a step's rows are the completions of its prompts."""

import pytest

from llmac.core.collate import collate
from llmac.core.demonstrations import Demonstrations
from llmac.core.protocols import Demonstration, NeedsDemonstrations, NeedsRollouts, RolloutPlan
from llmac.core.stored import Stored, share_of
from llmac.core.types import Finish, Prompt, Trajectory


class Nobody:
    """Stands for engine and rewards, and must not be asked for anything but the version."""

    policy_version = 7

    def ask(self, *args, **kwargs):
        raise AssertionError("what is given is neither sampled nor scored")

    __call__ = generate = load_weights = sleep = wake = close = ask


class Prompts:
    """p0, p1, p2, p0, ..."""

    def __init__(self):
        self.cursor = 0

    def take(self, count):
        ids = [(self.cursor + i) % 3 for i in range(count)]
        self.cursor += count
        return [Prompt(id=f"p{i}", token_ids=(i,), source=str(i)) for i in ids]


GIVEN = {
    f"p{i}": Demonstration(token_ids=(5,) * (i + 1) + (1,), text=f"five {i}") for i in range(3)
}


def plan(completions=GIVEN, **fields):
    fields = {"prompts_per_step": 2, "length_limit": 8, **fields}
    made = Demonstrations(column="completion", append_end=True, **fields)
    made.completions = completions
    return made


def rollout(made, prompts):
    return made.rollout(Nobody(), prompts, Nobody(), seed=3)


def test_it_is_a_plan_that_needs_demonstrations_and_replays_nothing():
    made = plan(None)
    assert isinstance(made, RolloutPlan)
    assert isinstance(made, NeedsDemonstrations)
    assert not isinstance(made, NeedsRollouts)
    assert made.length_limit == 8


def test_each_prompt_of_a_step_is_answered_by_its_completion():
    made, prompts = plan(), Prompts()
    first, counts = rollout(made, prompts)
    second, _ = rollout(made, prompts)
    assert [t.prompt.id for t in (*first, *second)] == ["p0", "p1", "p2", "p0"]
    assert [t.response_ids for t in first] == [(5, 1), (5, 5, 1)]
    assert [t.response_text for t in first] == ["five 0", "five 1"]
    assert [t.group for t in first] == [t.group for t in second] == [0, 1]
    assert counts["rollout/sampled_tokens"].value == 0


def test_a_demonstration_ended_is_of_this_version_and_counts_in_all_its_tokens():
    batch = collate(rollout(plan(), Prompts())[0], length_limit=8)
    assert {(t.finish, t.policy_version, t.reward, t.age) for t in batch.trajectories} == {
        (Finish.STOP, 7, 0.0, 0)
    }
    assert batch.action_mask.tolist() == [[True, True, False], [True, True, True]]
    assert not batch.truncated.any()


def test_a_prompt_without_a_completion_is_named():
    with pytest.raises(ValueError, match="no completion of prompt p0 was handed over"):
        rollout(plan(None), Prompts())
    with pytest.raises(ValueError, match="no completion of prompt p1"):
        rollout(plan({"p0": GIVEN["p0"]}), Prompts())
    with pytest.raises(ValueError, match="prompts_per_step is at least 1; found 0"):
        plan(prompts_per_step=0)


def stored(rewards):
    return [
        Trajectory(
            prompt=Prompt(id=f"p{i // 2}", token_ids=(1,), source="?"),
            response_ids=(i,),
            action_mask=(True,),
            sampler_logprobs=(-0.5,),
            finish=Finish.STOP,
            group=i // 2,
            reward=reward,
        )
        for i, reward in enumerate(rewards)
    ]


def test_of_stored_responses_those_above_the_bound_are_dealt_and_no_other():
    rows = stored([1.0, 0.5, 0.0, 0.0, 0.6, 1.0])  # groups of two
    first, second = (share_of(rows, rank=rank, world_size=2, keep_above=0.5) for rank in range(2))
    assert [t.response_ids for t in first] == [(0,)]
    assert [t.response_ids for t in second] == [(4,), (5,)]
    assert len(share_of(rows, rank=0, world_size=1)) == 6
    assert len(share_of(rows, rank=0, world_size=1, keep_above=-1.0)) == 6


def test_a_bound_that_nothing_is_above_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"none of 2 .* above 1\.0 .*, the largest is 1\.0"):
        share_of(stored([1.0, 0.0]), rank=0, world_size=1, keep_above=1.0)
    with pytest.raises(ValueError, match="1 groups of stored responses cannot be shared by 2"):
        share_of(stored([1.0, 0.0, 0.0, 0.0]), rank=0, world_size=2, keep_above=0.5)


def test_a_stored_plan_says_what_it_keeps():
    made = Stored(path="r.parquet", prompts_per_step=1, length_limit=4, keep_above=0.5)
    assert isinstance(made, NeedsRollouts)
    assert made.keep_above == 0.5
    assert Stored(path="r.parquet", prompts_per_step=1, length_limit=4).keep_above is None
