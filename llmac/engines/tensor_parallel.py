"""Ranks that share one engine: who they are, and how their requests become one list that all of them serve.

Each rank of a group runs its part of the model on the same requests in the same order; the group samples what its ranks
would have sampled alone, because every request keeps the seed its own rank gave it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as distributed

from llmac.core.protocols import Request
from llmac.errors import ConfigError, EngineError

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long a rank waits for its neighbours' requests: as long as for any other collective of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one rank brings to a call of `generate`."""

    requests: tuple[Request, ...] = ()
    seeds: tuple[int, ...] = ()
    """One for each request, from the rank's own random state."""
    refusal: str | None = None
    """Why this rank cannot sample; None: it can."""


class TensorParallelGroup:
    """This rank's neighbours in one engine; alone it costs nothing."""

    def __init__(self, size: int) -> None:
        """Find the neighbours. With more than one rank a collective of the whole job: every rank, same order.

        Args:
            size: ranks that share an engine; ranks 0..size-1 share the first.

        Raises:
            ConfigError: the ranks cannot be divided into groups of that size.
        """
        started = distributed.is_initialized()
        rank, world_size = (
            (distributed.get_rank(), distributed.get_world_size()) if started else (0, 1)
        )
        groups = neighbours(world_size, size)
        self.size = size
        self.place = rank % size
        self.first_rank = rank - self.place
        self._group: Any = None  # torch's stubs say int where a rank is in no group
        if size > 1:
            # Requests are objects in main memory: gloo, whatever the trainer's backend.
            self._group, _ = distributed.new_subgroups_by_enumeration(
                [list(group) for group in groups], timeout=PATIENCE, backend="gloo"
            )

    def exchange(self, mine: T) -> list[T]:
        """What every rank of the group brought, by place in the group."""
        if self._group is None:
            return [mine]
        everyone: list[T] = [mine] * self.size
        distributed.all_gather_object(everyone, mine, group=self._group)
        return everyone

    def close(self) -> None:
        """Leave the group. Safe to call twice."""
        group, self._group = self._group, None
        if group is not None and distributed.is_initialized():
            distributed.destroy_process_group(group)


def neighbours(world_size: int, size: int) -> list[range]:
    """The ranks of each engine.

    Raises:
        ConfigError: `world_size` is not a multiple of `size`.

    >>> neighbours(4, 2)
    [range(0, 2), range(2, 4)]
    """
    if world_size % size:
        raise ConfigError(
            f"rollout.tensor_parallel_size is {size}, but the job has {world_size} processes; expected a multiple of "
            f"{size}, as {size} neighbouring processes share an engine. Change accelerate's num_processes or "
            "rollout.tensor_parallel_size"
        )
    return [range(first, first + size) for first in range(0, world_size, size)]


def joined(offers: Sequence[Offer], first_rank: int) -> tuple[list[Request], list[int]]:
    """All requests and their seeds: the first rank's, then the second's; the same on every rank.

    Args:
        offers: by place in the group.
        first_rank: rank in the job of place 0, for the message.

    Raises:
        EngineError: a rank cannot sample. Raised by all of the group, as none can go on without it.
    """
    for place, offer in enumerate(offers):
        if offer.refusal is not None:
            raise EngineError(
                f"rank {first_rank + place}, which shares this engine, cannot sample: {offer.refusal}"
            )
    requests = [request for offer in offers for request in offer.requests]
    return requests, [seed for offer in offers for seed in offer.seeds]


def own_part(answers: Sequence[T], offers: Sequence[Offer], place: int) -> list[T]:
    """The answers to what the rank at `place` asked, in its order."""
    start = sum(len(offer.requests) for offer in offers[:place])
    return list(answers[start : start + len(offers[place].requests)])
