"""Which rows a critic learns from: prompts never straddle, ranks together are one process, targets are the returns."""

import itertools

import pytest
import torch

from llmac.core.segments import every_token
from llmac.core.types import Finish, Prompt, Trajectory, Values
from llmac.errors import DataError
from llmac.pretraining.rows import (
    Example,
    chunks,
    examples_of,
    returns_of,
    rollouts_of,
    share_of,
    split_by_prompt,
    targets_of,
)
from llmac.rollout_store import StoredRollouts


def trajectory(prompt=(1,), *, response=(3, 4, 5), mask=None, reward=1.0, finish=Finish.STOP):
    return Trajectory(
        prompt=Prompt(id=f"p{prompt}", token_ids=prompt, source="?"),
        response_ids=response,
        action_mask=mask or (True,) * len(response),
        sampler_logprobs=(0.0,) * len(response),
        finish=finish,
        group=0,
        reward=reward,
    )


def example(*arguments, monte_carlo=None, **fields):
    return Example(trajectory=trajectory(*arguments, **fields), monte_carlo=monte_carlo)


def values_of(rollouts, numbers):
    starts = every_token(rollouts.action_mask)
    return Values(at=torch.tensor(numbers), starts=starts, bootstrap=torch.zeros(len(numbers)))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_no_prompt_is_on_both_sides_and_each_side_has_one(fraction):
    examples = [example((p,), reward=float(s)) for p in range(10) for s in range(3)]
    learn, held = split_by_prompt(examples, fraction, seed=0)
    sides = [{e.trajectory.prompt.token_ids for e in side} for side in (learn, held)]
    assert not sides[0] & sides[1]
    assert len(learn) + len(held) == 30
    assert len(sides[1]) == {0.01: 1, 0.1: 1, 0.5: 5, 0.99: 9}[fraction]


def test_rows_of_a_dataset_with_equal_tokens_are_one_prompt():
    twins = [trajectory((1, 2)), trajectory((1, 2)), trajectory((3,))]
    named = [
        Example(
            trajectory=Trajectory(
                **{
                    "prompt": Prompt(id=str(i), token_ids=t.prompt.token_ids, source="?"),
                    "response_ids": t.response_ids,
                    "action_mask": t.action_mask,
                    "sampler_logprobs": t.sampler_logprobs,
                    "finish": t.finish,
                    "group": i,
                    "reward": 1.0,
                }
            ),
            monte_carlo=None,
        )
        for i, t in enumerate(twins)
    ]
    for seed in range(8):
        learn, held = split_by_prompt(named, 0.5, seed=seed)
        assert sorted(map(len, (learn, held))) == [1, 2]


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_file():
    examples = [example((p,)) for p in range(20)]

    def held(rows, seed):
        return {e.trajectory.prompt.token_ids for e in split_by_prompt(rows, 0.3, seed=seed)[1]}

    assert held(examples, 1) == held(examples[::-1], 1) != held(examples, 2)


def test_one_prompt_cannot_be_held_out_from_itself():
    with pytest.raises(DataError, match="all 2 responses answer one prompt"):
        split_by_prompt([example(), example(reward=0.0)], 0.5, seed=0)


def test_responses_without_reward_are_refused_and_those_without_tokens_left_out(tmp_path):
    path = tmp_path / "r.parquet"
    rows = (trajectory(), trajectory(response=()), trajectory(mask=(False, False, False)))
    assert len(examples_of(StoredRollouts(trajectories=rows), path, skip_truncated=False)) == 1
    with pytest.raises(DataError, match=r"none of its 2 responses can be learned from"):
        examples_of(StoredRollouts(trajectories=rows[1:]), path, skip_truncated=False)
    paused = trajectory((9,), reward=None, finish=Finish.PAUSED)
    with pytest.raises(DataError, match=r"1 responses have no reward, the first to prompt p\(9,\)"):
        examples_of(StoredRollouts(trajectories=(*rows, paused)), path, skip_truncated=False)


def test_cut_responses_are_left_out_where_the_algorithm_masks_them(tmp_path):
    cut = trajectory(finish=Finish.LENGTH)
    stored = StoredRollouts(
        trajectories=(cut, trajectory()), monte_carlo=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    )
    [kept] = examples_of(stored, tmp_path, skip_truncated=True)
    assert kept.monte_carlo == (0.4, 0.5, 0.6)
    assert len(examples_of(stored, tmp_path, skip_truncated=False)) == 2


def test_an_epoch_has_every_row_once_in_an_order_of_its_own():
    first, again, second = (chunks(23, 5, seed=3, epoch=e) for e in (1, 1, 2))
    for epoch in (first, second):
        assert sorted(itertools.chain(*epoch)) == list(range(23))
        assert {len(part) for part in epoch} == {4, 5}
    assert first == again != second
    assert first != chunks(23, 5, seed=4, epoch=1)


def test_the_share_of_the_limit_that_is_used_up_does_not_depend_on_the_rows():
    assert rollouts_of([example()], length_limit=8).length_limit == 8
    with_longer = [example(), example(response=(1,) * 6)]
    assert rollouts_of(with_longer, length_limit=8).length_limit == 8


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("minibatches", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_minibatch_of_all_ranks_together_is_that_of_one_process(rows, minibatches, world_size):
    def counted(world):
        """For each minibatch, the rows that count, over all ranks."""
        found = [[] for _ in range(minibatches)]
        widths = set()
        for rank in range(world):
            share = share_of(range(rows), minibatches=minibatches, rank=rank, world_size=world)
            widths.add(len(share.rows))
            assert len(share.rows) % minibatches == 0
            part = len(share.rows) // minibatches
            for place, (row, counts) in enumerate(zip(share.rows, share.counts, strict=True)):
                if counts:
                    found[place // part].append(row)
        assert len(widths) == 1, "a rank would wait for another"
        return [sorted(part) for part in found]

    assert counted(world_size) == counted(1)
    assert sorted(itertools.chain(*counted(world_size))) == list(range(rows))


def test_with_lambda_one_the_target_is_the_outcome_whatever_the_critic_says():
    examples = [example(reward=0.25), example(response=(3,), reward=-2.0, finish=Finish.LENGTH)]
    rollouts = rollouts_of(examples, length_limit=8)
    values = values_of(rollouts, [[0.5, 0.1, 0.9], [0.4, 0.0, 0.0]])
    for asked in (None, values):
        returns = returns_of(examples, rollouts, gamma=1.0, values=asked)
        assert returns.tolist() == [[0.25, 0.25, 0.25], [-2.0, 0.0, 0.0]]


def test_discount_and_lambda_are_those_of_generalized_advantage_estimation():
    examples = [example(reward=1.0)]
    rollouts = rollouts_of(examples, length_limit=8)
    # .5² · 1, .5 · 1, 1
    assert returns_of(examples, rollouts, gamma=0.5).tolist() == [[0.25, 0.5, 1.0]]
    # A(.95) = [.7655, .49, .2] with V = [.2, .5, .8]; targets A + V
    values = values_of(rollouts, [[0.2, 0.5, 0.8]])
    returns = returns_of(examples, rollouts, gamma=1.0, lam=0.95, values=values)
    assert returns[0].tolist() == pytest.approx([0.9655, 0.99, 1.0])
    # and with λ = 1 they are the outcome, not those
    returns = returns_of(examples, rollouts, gamma=1.0, lam=1.0, values=values)
    assert returns[0].tolist() == [1.0, 1.0, 1.0]


def test_estimates_of_sampled_continuations_take_the_place_of_the_outcome():
    examples = [example(reward=1.0, monte_carlo=(0.25, None, 0.75)), example(reward=0.0)]
    returns = returns_of(examples, rollouts_of(examples, length_limit=8), gamma=1.0)
    assert returns.tolist() == [[0.25, 1.0, 0.75], [0.0, 0.0, 0.0]]


def test_nothing_is_learned_at_injected_tokens_or_from_rows_that_stand_in():
    examples = [example(mask=(True, False, True)), example(response=(3, 4))]
    rollouts = rollouts_of(examples, length_limit=8)
    values = values_of(rollouts, [[0.5, 0.1, 0.9], [0.4, 0.2, 0.0]])
    targets = targets_of(returns_of(examples, rollouts, gamma=1.0), values, counts=(True, False))
    assert targets.value_mask.tolist() == [[True, False, True], [False, False, False]]
    assert targets.returns.tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    # What it said before it learned: the centre of a value clip.
    assert targets.old_values[0].tolist() == pytest.approx([0.5, 0.0, 0.9])
