"""The trainer's half of sending weights to vLLM servers: packs a stream into buckets and says where they are.

The other half, in the servers, is `vllm_transfer.py`; how bytes get across is in `weight_memory.py` (same machine) and
`weight_socket.py` (any). Nothing here imports vllm.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from llmac.engines.weight_memory import SharedMemory
from llmac.engines.weight_socket import WeightSocket

Transport = Literal["shm", "tcp"]
ALIGNMENT = 64
"""Bytes; every tensor begins at a multiple, so that any dtype may be read in place."""
BREAK_OFF = "break_off_weight_update"
"""Method of a server's workers that ends an update which broke off in the middle, for `/collective_rpc`."""


class WeightSender:
    """Puts weights where servers can fetch them; one for a run, on the rank that feeds the servers.

    >>> sender = WeightSender("shm", bucket_bytes=1 << 20)
    >>> [bucket["names"] for bucket in sender.buckets([("a", torch.ones(2)), ("b", torch.ones(3))])]
    [['a', 'b']]
    >>> sender.close()
    """

    backend = "llmac"
    """The weight transfer backend that a server must have been started with."""

    def __init__(self, transport: Transport, bucket_bytes: int, *, host: str = "127.0.0.1") -> None:
        """Nothing is allocated yet.

        Args:
            transport: shm: the servers are on this machine; tcp: anywhere.
            bucket_bytes: of one bucket; two are kept. A tensor that is larger makes its bucket larger.
            host: for tcp, the address of this machine that the servers reach; `weight_socket.host_towards` finds it.

        Raises:
            ConfigError: shm outside of Linux.
            EngineError: `host` is no address of this machine.
        """
        self._transport = transport
        self._bucket_bytes = bucket_bytes
        self._place = SharedMemory() if transport == "shm" else WeightSocket(host)
        self._update = 0

    def init_info(self) -> dict[str, Any]:
        """What a server must know once after its start. Keep it to yourself: it opens the weights to whoever has it."""
        return {"transport": self._transport, "introduction": self._place.introduction()}

    def buckets(
        self, stream: Iterable[tuple[str, Tensor]]
    ) -> Generator[dict[str, Any], None, None]:
        """One update: what to tell every server, bucket by bucket.

        A bucket can be read until the next but one is asked for, so asking for the next before the servers have
        loaded this one lets copying and loading overlap. A tensor is copied before the stream is asked for another.
        Giving up in the middle (`close` of the generator) is fine: the next call begins a new update.
        """
        self._update += 1
        number = 0
        bucket = _Bucket()
        for name, tensor in stream:
            if not bucket.fits(tensor):
                yield self._described(bucket, number, last=False)
                number += 1
                bucket = _Bucket()
            if bucket.memory is None:
                size = max(self._bucket_bytes, tensor.nbytes)
                bucket.memory = self._place.room(number % 2, size)
            bucket.add(name, tensor)
        if bucket.memory is not None:
            yield self._described(bucket, number, last=True)

    def close(self) -> None:
        """Free what was shared. Safe to call twice."""
        self._place.close()

    def _described(self, bucket: "_Bucket", number: int, *, last: bool) -> dict[str, Any]:
        return {
            "update": self._update,
            "number": number,
            "last": last,
            "where": self._place.where(number % 2),
            "size": bucket.size,
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "offsets": bucket.offsets,
        }


class _Bucket:
    """Tensors one after another in one piece of memory."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.size = 0
        self.names: list[str] = []
        self.dtypes: list[str] = []
        self.shapes: list[list[int]] = []
        self.offsets: list[int] = []

    def fits(self, tensor: Tensor) -> bool:
        """Whether there is room left; there always is for the first."""
        return self.memory is None or self._next() + tensor.nbytes <= self.memory.numel()

    def add(self, name: str, tensor: Tensor) -> None:
        assert self.memory is not None
        offset = self._next()
        self.size = offset + tensor.nbytes
        _view(self.memory, offset, tensor.dtype, tensor.shape).copy_(tensor.detach())
        self.names.append(name)
        self.dtypes.append(str(tensor.dtype).removeprefix("torch."))
        self.shapes.append(list(tensor.shape))
        self.offsets.append(offset)

    def _next(self) -> int:
        return math.ceil(self.size / ALIGNMENT) * ALIGNMENT


def unpacked(
    memory: Tensor,
    names: Sequence[str],
    dtypes: Sequence[str],
    shapes: Sequence[Sequence[int]],
    offsets: Sequence[int],
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket, as views into its memory."""
    for name, dtype, shape, offset in zip(names, dtypes, shapes, offsets, strict=True):
        yield name, _view(memory, offset, getattr(torch, dtype), shape)


def transport_for(servers: Sequence[str]) -> Transport:
    """The transport that fits: shared memory if all servers are on this machine, as those are that are started here.

    >>> transport_for([]), transport_for(["http://localhost:8000"]), transport_for(["http://node7:8000"])
    ('shm', 'shm', 'tcp')
    """
    here = {"localhost", "127.0.0.1", "::1"}
    return "shm" if all(urlsplit(server).hostname in here for server in servers) else "tcp"


def _view(memory: Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    return memory[offset : offset + size].view(dtype).view(tuple(shape))
