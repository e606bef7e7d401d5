"""The plan that replays: every stored response, in groups, in an order a resumed run continues."""

import pytest

from llmac.core.protocols import NeedsRollouts, RolloutPlan, Stateful
from llmac.core.stored import Stored, share_of
from llmac.core.types import Finish, Prompt, Trajectory


class Nobody:
    """Stands for engine, prompts and rewards, and must not be asked for anything."""

    policy_version = 0

    def ask(self, *args, **kwargs):
        raise AssertionError("replaying needs no engine, prompts or rewards")

    __call__ = generate = load_weights = sleep = wake = close = take = ask


NOBODY = Nobody()


def trajectory(prompt, group, *, reward=1.0, length=2, version=0):
    return Trajectory(
        prompt=Prompt(id=f"p{prompt}", token_ids=(prompt,), source="?"),
        response_ids=(prompt,) * length,
        action_mask=(True,) * length,
        sampler_logprobs=(-0.5,) * length,
        finish=Finish.STOP,
        group=group,
        reward=reward,
        policy_version=version,
    )


def pairs(count):
    """`count` groups of two, numbered as two steps of a run would have them."""
    return [trajectory(p, p % 4) for p in range(count) for _ in range(2)]


def plan(trajectories, *, groups=2, limit=4, seed=0):
    made = Stored(path="r.parquet", prompts_per_step=groups, length_limit=limit)
    made.stored = trajectories
    made.seed = seed
    return made


def replay(made, steps):
    return [made.rollout(NOBODY, NOBODY, NOBODY, seed=7)[0] for _ in range(steps)]


def seen(steps):
    return [t.prompt.id for rows in steps for t in rows]


def test_a_stored_plan_is_a_plan_that_remembers_and_needs_rollouts():
    made = Stored(path="r.parquet", prompts_per_step=2, length_limit=4)
    assert isinstance(made, RolloutPlan)
    assert isinstance(made, Stateful)
    assert isinstance(made, NeedsRollouts)
    assert (made.path, made.stored, made.length_limit) == ("r.parquet", None, 4)


def test_each_pass_replays_every_response_once():
    steps = replay(plan(pairs(6)), steps=6)
    everything = sorted(t.prompt.id for t in pairs(6))
    assert sorted(seen(steps[:3])) == sorted(seen(steps[3:])) == everything
    assert seen(steps[:3]) != seen(steps[3:])


def test_siblings_stay_together_and_groups_are_numbered_anew():
    for rows in replay(plan(pairs(6), groups=3), steps=4):
        assert [t.group for t in rows] == [0, 0, 1, 1, 2, 2]
        assert all(rows[i].prompt == rows[i + 1].prompt for i in (0, 2, 4))


def test_a_step_may_reach_into_the_next_pass():
    steps = replay(plan(pairs(3), groups=2), steps=3)
    names = seen(steps)
    assert all(names.count(f"p{p}") == 4 for p in range(3))


def test_nothing_else_about_a_response_changes():
    given = trajectory(3, group=9, reward=0.25, version=12)
    [[replayed]] = replay(plan([given], groups=1), steps=1)
    assert replayed.group == 0
    assert (replayed.policy_version, replayed.reward) == (12, 0.25)
    assert replayed.sampler_logprobs == given.sampler_logprobs


def test_a_restored_plan_goes_on_where_it_stood():
    straight = replay(plan(pairs(5)), steps=7)
    first = plan(pairs(5))
    replay(first, steps=3)
    resumed = plan(pairs(5))
    resumed.restore(first.state())
    assert replay(resumed, steps=4) == straight[3:]


def test_the_order_is_that_of_the_runs_seed():
    orders = {tuple(seen(replay(plan(pairs(6), seed=seed), steps=3))) for seed in range(8)}
    assert len(orders) > 4
    again = [seen(replay(plan(pairs(6), seed=3), steps=6)) for _ in "ab"]
    assert again[0] == again[1]


def test_a_restored_plan_with_a_seed_goes_on_where_it_stood():
    straight = replay(plan(pairs(5), seed=11), steps=7)
    first = plan(pairs(5), seed=11)
    replay(first, steps=3)
    resumed = plan(pairs(5), seed=11)
    resumed.restore(first.state())
    assert replay(resumed, steps=4) == straight[3:]


def test_another_file_is_no_continuation():
    other = plan(pairs(5))
    with pytest.raises(ValueError, match=r"replayed 6 groups .* and r\.parquet now has 5"):
        other.restore(plan(pairs(6)).state())


def test_groups_of_one_number_and_of_one_prompt_are_told_apart():
    rows = [trajectory(1, 0), trajectory(2, 0), trajectory(2, 1), trajectory(2, 1)]
    [replayed] = replay(plan(rows, groups=3), steps=1)
    assert sorted(t.prompt.id for t in replayed) == ["p1", "p2", "p2", "p2"]
    assert sorted(t.group for t in replayed) in ([0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2])


def test_the_mean_reward_is_that_of_what_is_replayed():
    rows = [trajectory(p, p, reward=float(p)) for p in range(4)]
    made = plan(rows, groups=2)
    for _ in range(2):
        replayed, metrics = made.rollout(NOBODY, NOBODY, NOBODY, seed=0)
        assert metrics["rollout/sampled_tokens"].value == 0
        assert metrics["reward/mean"].value == sum(t.reward for t in replayed) / 2
        assert metrics["reward/mean"].weight == 2


def test_how_often_the_responses_were_seen_is_reported():
    made = plan(pairs(4), groups=3)
    passes = [
        made.rollout(NOBODY, NOBODY, NOBODY, seed=0)[1]["rollout/stored_passes"].value for _ in "ab"
    ]
    assert passes == [0.75, 1.5]


def test_ranks_share_whole_groups_without_overlap():
    everything = pairs(7)
    shares = [share_of(everything, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(t.prompt.id for share in shares for t in share) == sorted(
        t.prompt.id for t in everything
    )
    assert [len(share) for share in shares] == [6, 4, 4]
    assert not {t.prompt.id for t in shares[0]} & {t.prompt.id for t in shares[1]}


def test_more_ranks_than_groups_are_refused():
    with pytest.raises(ValueError, match="2 groups of stored responses cannot be shared by 3"):
        share_of(pairs(2), rank=0, world_size=3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], r"r\.parquet has no responses to replay"),
        ([trajectory(1, 0, reward=None)], "response to prompt p1 has no reward"),
        ([trajectory(1, 0, length=5)], "has 5 tokens, and the length limit of this run is 4"),
    ],
)
def test_what_cannot_be_replayed_is_refused_when_it_is_handed_over(given, says):
    made = Stored(path="r.parquet", prompts_per_step=2, length_limit=4)
    with pytest.raises(ValueError, match=says):
        made.stored = given


def test_a_plan_that_was_given_nothing_says_so():
    made = Stored(path="r.parquet", prompts_per_step=2, length_limit=4)
    with pytest.raises(ValueError, match=r"no responses of r\.parquet were handed over"):
        made.rollout(NOBODY, NOBODY, NOBODY, seed=0)
    with pytest.raises(ValueError, match="prompts_per_step is at least 1; found 0"):
        Stored(path="r.parquet", prompts_per_step=0, length_limit=4)
