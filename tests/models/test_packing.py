"""Rows say where each state's hidden vector is; micro-batches hold every row once, within the budget."""

from dataclasses import replace

import pytest
import torch

from llmac.core.collate import collate
from llmac.core.types import Credit, Rollouts
from llmac.models.packing import Packing, micro_batches, minibatches, pack, row_tokens


def test_a_state_sits_at_its_last_token(ragged):
    rows = pack(ragged, pad_id=0)
    flat = rows.input_ids.flatten()
    for row, trajectory in enumerate(ragged):
        tokens = trajectory.prompt.token_ids + trajectory.response_ids
        for t in range(rows.states.shape[1]):
            known = min(t, len(trajectory.response_ids))
            # s_t = prompt + response[:t]; beyond the end, the last state again
            assert flat[rows.states[row, t]] == tokens[len(trajectory.prompt.token_ids) + known - 1]


def test_injected_and_padded_tokens_are_not_actions(ragged):
    mask = pack(ragged, pad_id=0).action_mask
    assert mask.tolist() == [
        [True, True, True, True],
        [True, False, False, False],
        [True, False, True, False],
        [False, False, False, False],
    ]


def test_micro_batches_hold_every_row_once_within_the_budget(make_trajectory):
    generator = torch.Generator().manual_seed(0)
    rows = [
        make_trajectory(range(int(p)), range(int(r)))
        for p, r in torch.randint(1, 20, (50, 2), generator=generator)
    ]
    batches = micro_batches(rows, max_tokens=64)
    assert sorted(torch.cat(batches).tolist()) == list(range(50))
    for batch in batches:
        longest = max(row_tokens(rows[int(i)]) for i in batch)
        assert longest * len(batch) <= 64 or len(batch) == 1


def test_a_row_longer_than_the_budget_stands_alone(make_trajectory):
    rows = [make_trajectory(range(2), range(2)), make_trajectory(range(30), range(30))]
    assert [batch.tolist() for batch in micro_batches(rows, max_tokens=10)] == [[0], [1]]


def test_rows_side_by_side_fill_the_budget_without_padding(make_trajectory):
    rows = [make_trajectory([1] * size, [2]) for size in (5, 1, 3, 2, 9)]
    packing = Packing(kind="varlen", max_tokens=8, pad_id=0)
    found = packing.micro_batches(rows)
    assert [batch.tolist() for batch in found] == [[1, 3], [2], [0], [4]]  # 2 + 3, 4, 6, 10 alone
    assert packing.pack(rows[:3]).input_ids.shape == (1, 6 + 2 + 4)


def packed_as(packing, rows):
    found = list(packing.packed(rows))
    assert sorted(torch.cat([index for index, _ in found]).tolist()) == list(range(len(rows)))
    return ["padded" if packed.paths is None else "trie" for _, packed in found]


def test_a_trie_is_made_where_it_saves_a_fifth_of_the_padded_tokens(make_trajectory):
    auto = Packing(kind="auto", max_tokens=1000, pad_id=0)
    # Two rows of 10 that begin alike by 4 tokens: 16 of 20
    assert packed_as(auto, [make_trajectory([1] * 4, [2 + i] * 6) for i in range(2)]) == ["trie"]
    assert packed_as(auto, [make_trajectory([1] * 3, [2 + i] * 7) for i in range(2)]) == ["padded"]


def test_bins_are_those_of_a_trie_where_it_saves_a_fifth(make_trajectory):
    rows = [make_trajectory([1] * 7, [2 + i] * 13) for i in range(8)]  # 7 + 8 · 13 of 160: 69 %
    auto, trie = (Packing(kind=kind, max_tokens=60, pad_id=0) for kind in ("auto", "trie"))
    found, wanted = (
        [batch.tolist() for batch in packing.micro_batches(rows)] for packing in (auto, trie)
    )
    assert found == wanted == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_no_micro_batch_of_an_automatic_packing_is_larger_than_the_budget(make_trajectory):
    auto = Packing(kind="auto", max_tokens=30, pad_id=0)
    shared = [make_trajectory([1] * 8, [2 + i] * 2) for i in range(16)]
    # Rows alone in their groups share nothing; those of 9, 11 and 9 tokens fit into a bin, but not padded.
    alone = [make_trajectory([20 + i] * size, [1]) for i, size in enumerate([8, 8, 10, 8, 8, 8])]
    for rows in (shared, alone, shared + alone):
        kinds = packed_as(auto, rows)
        assert ("trie" in kinds) is (rows is not alone)
        assert all(packed.input_ids.numel() <= 30 for _, packed in auto.packed(rows))


@pytest.mark.parametrize(("device", "kind"), [("cpu", "auto"), ("cuda", "padded")])
def test_automatic_packing_asks_where_the_model_will_be_and_not_what_the_machine_has(
    device, kind, make_model, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cpu")
    auto = Packing(kind="auto", max_tokens=1, pad_id=0)
    assert auto.fitting(make_model(), device=device).kind == kind


def test_a_rank_with_fewer_rows_than_minibatches_takes_part_with_a_row_that_counts_nothing(
    make_trajectory,
):
    batch = collate([replace(make_trajectory([1], [2, 3]), reward=1.0)], length_limit=8)
    rollouts = Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)
    credit = Credit(advantages=batch.rewards, policy_mask=batch.action_mask)
    parts = list(minibatches(rollouts, credit, 3))
    assert [len(part.trajectories) for part, _ in parts] == [1, 1, 1]
    assert [int(of_part.policy_mask.sum()) for _, of_part in parts] == [2, 0, 0]


@pytest.mark.parametrize(
    ("whole_groups", "groups"), [(False, [[0, 0, 0], [0, 1, 1]]), (True, [[0] * 4, [1, 1]])]
)
def test_siblings_stay_in_one_minibatch_where_they_are_compared_in_it(
    make_trajectory, whole_groups, groups
):
    rows = [
        replace(make_trajectory([1], [2]), reward=1.0, group=group) for group in (0, 0, 0, 0, 1, 1)
    ]
    batch = collate(rows, length_limit=8)
    rollouts = Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)
    credit = Credit(advantages=batch.rewards, policy_mask=batch.action_mask)
    parts = minibatches(rollouts, credit, 2, whole_groups=whole_groups)
    assert [part.group.tolist() for part, _ in parts] == groups
