"""One list of requests for ranks that share an engine; two real processes in test_vllm_ranks.py."""

import pytest

from llmac.core.protocols import Request, SamplingParams
from llmac.engines.tensor_parallel import (
    Offer,
    TensorParallelGroup,
    joined,
    neighbours,
    own_part,
)
from llmac.errors import ConfigError, EngineError


def offer(*first_tokens):
    requests = tuple(Request(prompt_ids=(t,), params=SamplingParams()) for t in first_tokens)
    return Offer(requests=requests, seeds=tuple(10 * t for t in first_tokens))


def test_every_rank_is_in_one_group_of_neighbours():
    for world_size, size in [(1, 1), (4, 1), (4, 2), (8, 4), (6, 3)]:
        groups = neighbours(world_size, size)
        assert [rank for group in groups for rank in group] == list(range(world_size))
        assert {len(group) for group in groups} == {size}


def test_ranks_that_cannot_be_divided_are_refused_naming_both():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 4, but the job has 6 processe"):
        neighbours(6, 4)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2, but the job has 1 processe"):
        TensorParallelGroup(2)


def test_each_rank_gets_the_answers_to_its_own_requests():
    offers = [offer(1, 2), offer(), offer(3, 1, 4)]
    requests, seeds = joined(offers, first_rank=0)
    assert seeds == [10, 20, 30, 10, 40]
    answers = [request.prompt_ids[0] for request in requests]
    assert [own_part(answers, offers, place) for place in range(3)] == [[1, 2], [], [3, 1, 4]]


def test_a_rank_that_cannot_sample_stops_the_group_and_is_named():
    with pytest.raises(EngineError, match=r"rank 5, which shares this engine, .* no weights"):
        joined([offer(1), Offer(refusal="no weights")], first_rank=4)


def test_alone_a_rank_exchanges_with_itself():
    group = TensorParallelGroup(1)
    assert group.exchange("mine") == ["mine"]
    group.close()
