"""Memory that the processes of one machine have in common, to put tensors together without sending them."""

import ctypes
import mmap
import os
import secrets
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

HEADER_BYTES = 64
"""In front of what is shared, for the secret by which a process knows that it has opened the right memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Address:
    """Where the first rank's memory can be opened: on its machine, by its processes."""

    machine: str
    pid: int
    descriptor: int
    size: int
    secret: bytes


PIECES = 3
"""Taking turns: one is written, one is read, of one a loop still holds the last tensor when it asks for the next."""


class SharedMemory:
    """Bytes that every rank of a group sees; Linux, and ranks of one machine that may look at each other's files.

    The memory has no name: it is gone with the last process that uses it, however that ends. Tensors over it stay
    valid as long as they are held: memory that somebody still looks at is replaced instead of being written anew.
    """

    def __init__(self, group: dist.ProcessGroup, *, at_least: int) -> None:
        """Nothing is taken before the first `bytes`.

        Args:
            group: of processes that talk to each other over the CPU.
            at_least: size of each of `PIECES` pieces, bytes; pages that nobody touches take no memory.
        """
        self._group = group
        self._first = dist.get_global_rank(group, 0)
        self._pieces = [_Piece(at_least) for _ in range(PIECES)]
        self._free = list(self._pieces)
        """On every rank, when they last met. What was free then is free until it is lent."""

    def bytes(self, size: int) -> Tensor | None:
        """`size` bytes that nobody looks at; None if the ranks cannot share memory. Every rank calls in step.

        Each writes its part and calls `meet`; what they hold before is undefined.
        """
        piece = self._fitting(size)
        if piece is None:
            self.meet()  # since the last time, somebody may have let go
            piece = self._fitting(size)
        if piece is None:
            piece = max(self._free or self._pieces, key=lambda piece: piece.size)
            piece.size, piece.map = size, None
        if piece.map is None:
            piece.map = self._renewed(piece.size)
        self._free = [other for other in self._free if other is not piece]
        return None if piece.map is None else piece.lent(size)

    def _fitting(self, size: int) -> "_Piece | None":
        """The smallest that does, so that a large one is there for the next large request."""
        large = [piece for piece in self._free if piece.size >= size]
        return min(large, key=lambda piece: piece.size, default=None)

    def meet(self) -> None:
        """Wait until every rank is here: what was written before is seen after."""
        free = self._agreed([piece.lease() is None for piece in self._pieces])
        self._free = [piece for piece, here in zip(self._pieces, free, strict=True) if here]

    def _renewed(self, size: int) -> mmap.mmap | None:
        size += HEADER_BYTES
        is_first = dist.get_rank() == self._first
        address, descriptor = _create(size) if is_first else (None, -1)
        sent = [address]
        dist.broadcast_object_list(sent, src=self._first, group=self._group)
        if not is_first:
            descriptor = _open(sent[0])
        found = mmap.mmap(descriptor, size) if descriptor >= 0 else None
        [everywhere] = self._agreed([found is not None])
        if descriptor >= 0:
            os.close(descriptor)
        return found if everywhere else None

    def _agreed(self, flags: list[bool]) -> list[bool]:
        """Those that hold on every rank."""
        both = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(both, op=dist.ReduceOp.MIN, group=self._group)
        return [bool(flag) for flag in both]


class _Piece:
    """Memory, and whether a tensor over it is alive."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.map: mmap.mmap | None = None
        """None: not taken yet."""
        self.lease: Callable[[], ctypes.Array | None] = lambda: None

    def lent(self, size: int) -> Tensor:
        assert self.map is not None
        lease = (ctypes.c_char * size).from_buffer(self.map, HEADER_BYTES)
        # The tensor and its views hold it, and nobody else.
        self.lease = weakref.ref(lease)
        return torch.frombuffer(lease, dtype=torch.uint8)


def _machine() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read()


def _create(size: int) -> tuple[_Address | None, int]:
    """Memory of this process that others can open, and its descriptor; None, -1: not on this system."""
    if not hasattr(os, "memfd_create"):
        return None, -1
    secret = secrets.token_bytes(HEADER_BYTES)
    descriptor = os.memfd_create("llmac weights", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
    except OSError:  # beyond a limit on files
        os.close(descriptor)
        return None, -1
    os.write(descriptor, secret)
    address = _Address(
        machine=_machine(), pid=os.getpid(), descriptor=descriptor, size=size, secret=secret
    )
    return address, descriptor


def _open(address: _Address | None) -> int:
    """Descriptor of another process's memory; -1: out of reach, or not what was meant."""
    if address is None or not hasattr(os, "memfd_create") or _machine() != address.machine:
        return -1
    try:
        descriptor = os.open(
            f"/proc/{address.pid}/fd/{address.descriptor}", os.O_RDWR | os.O_NONBLOCK
        )
    except OSError:  # of another container, or forbidden
        return -1
    if (
        os.fstat(descriptor).st_size != address.size
        or os.read(descriptor, HEADER_BYTES) != address.secret
    ):
        os.close(descriptor)
        return -1
    return descriptor
