"""How ranks that share servers stay in step: an error on one is an error on all; a stream is read to its end."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from torch import Tensor

from llmac.errors import EngineError, LlmacError

T = TypeVar("T")
WeightStream = Iterable[tuple[str, Tensor]]


class Ranks(Protocol):
    """How the processes of the job talk to each other. Implementation: `runtime.context.Runtime`."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        ...

    def broadcast(self, item: T) -> T:
        """Rank 0's object on every rank."""
        ...

    def gather(self, item: T) -> list[T]:
        """Every rank's object, on every rank."""
        ...

    def max(self, number: float) -> float:
        """The largest over the ranks."""
        ...


def told(ranks: Ranks, error: LlmacError | None, report: T) -> list[T]:
    """Every rank's report, on every rank; if one has an error instead, it is raised on all.

    Raises:
        LlmacError: this rank's own error, or an `EngineError` that names the rank that has one.
    """
    reports = ranks.gather((str(error) if error is not None else None, report))
    for rank, (text, _) in enumerate(reports):
        if text is not None:
            raise error if error is not None else EngineError(f"rank {rank}: {text}")
    return [report for _, report in reports]


class Lockstep:
    """A stream that every rank can be made to read to the end."""

    def __init__(self, weights: WeightStream) -> None:
        """Nothing is read yet."""
        self._items = iter(weights)
        self.broken = False
        """It raised."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        try:
            return next(self._items)
        except StopIteration:
            raise
        except BaseException:
            self.broken = True
            raise

    def drain(self) -> None:
        """Read what is left and keep nothing of it."""
        for _ in self._items:
            pass
