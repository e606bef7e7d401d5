"""An endless stream of prompts, shared by ranks and resumed."""

import json

import pytest

from llmac.core.protocols import PromptSource
from llmac.data.prompts import PromptStream
from llmac.errors import CheckpointError, DataError


def taken(stream, count):
    return [prompt.id for prompt in stream.take(count)]


def test_each_epoch_is_a_permutation_and_differs(numbered):
    stream: PromptSource = PromptStream(numbered(50), seed=3)
    first, second = taken(stream, 50), taken(stream, 50)
    assert sorted(first, key=int) == sorted(second, key=int) == [str(i) for i in range(50)]
    assert first != second
    assert first != [str(i) for i in range(50)]


def test_the_seed_decides(numbered):
    orders = [taken(PromptStream(numbered(50), seed=seed), 50) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_without_shuffling_the_datasets_order_repeats(numbered):
    assert taken(PromptStream(numbered(3), shuffle=False), 7) == list("0120120")


def test_taking_in_pieces_across_an_epoch_is_taking_at_once(numbered):
    whole = taken(PromptStream(numbered(7)), 21)
    stream = PromptStream(numbered(7))
    assert taken(stream, 5) + taken(stream, 5) + taken(stream, 11) == whole


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_together_what_one_process_takes(numbered, world_size):
    prompts = numbered(7)  # 7 is a multiple of neither: an epoch ends within a step
    alone = PromptStream(prompts, seed=5)
    ranks = [
        PromptStream(prompts, rank=r, world_size=world_size, seed=5) for r in range(world_size)
    ]
    for _ in range(5):
        step = taken(alone, 2 * world_size)
        assert sorted(id_ for rank in ranks for id_ in taken(rank, 2)) == sorted(step)


def test_ranks_that_take_different_numbers_never_share_a_prompt(numbered):
    ranks = [PromptStream(numbered(12), rank=r, world_size=2) for r in range(2)]
    both = taken(ranks[0], 6) + taken(ranks[1], 2) + taken(ranks[1], 4)
    assert sorted(both, key=int) == [str(i) for i in range(12)]


@pytest.mark.parametrize("before", [0, 3, 7, 14, 16])  # 7 and 14 are the ends of epochs
def test_a_restored_stream_goes_on_where_it_was(numbered, before):
    stream = PromptStream(numbered(7), seed=1)
    stream.take(before)
    state = json.loads(json.dumps(stream.state()))
    resumed = PromptStream(numbered(7), seed=1)
    resumed.restore(state)
    assert taken(resumed, 10) == taken(stream, 10)
    assert resumed.epoch == (before + 10) / 7


def test_a_stream_is_saved_in_a_folder(numbered, tmp_path):
    stream = PromptStream(numbered(7))
    stream.take(9)
    stream.save(tmp_path)
    resumed = PromptStream(numbered(7))
    resumed.load(tmp_path)
    assert taken(resumed, 5) == taken(stream, 5)


def test_another_number_of_ranks_goes_on_without_repeating(numbered):
    ranks = [PromptStream(numbered(30), rank=r, world_size=3) for r in range(3)]
    seen = [id_ for rank in ranks for id_ in taken(rank, 5)]
    resumed = [PromptStream(numbered(30), rank=r, world_size=2) for r in range(2)]
    for stream in resumed:
        stream.restore(ranks[0].state())
    later = [id_ for stream in resumed for id_ in taken(stream, 7)]
    assert len({*seen, *later}) == 29  # 15 is odd: one of 30 is passed over


@pytest.mark.parametrize(
    "changed", [{"seed": 2}, {"shuffle": False}, {"prompts": 8}], ids=["seed", "shuffle", "prompts"]
)
def test_a_state_of_another_stream_is_refused(numbered, changed):
    stream = PromptStream(numbered(7), seed=1)
    with pytest.raises(CheckpointError, match=f"saved with {next(iter(changed))} ="):
        stream.restore({**stream.state(), **changed})


def test_a_stream_of_nothing_is_refused():
    with pytest.raises(DataError, match="at least one prompt"):
        PromptStream([])
