"""Buckets of weights in memory that processes of one machine share.

The memory is anonymous (Linux `memfd`): it has no name in a file system, so a process that is killed leaves nothing
behind, and a container's small /dev/shm does not limit it. Another process of the same user finds it among the open
files of its owner: `/proc/<pid>/fd/<number>`.

It stays mapped on both sides from bucket to bucket and from sync to sync: the first touch of a page costs more than
the copy into it.
"""

import mmap
import os
import secrets
import warnings
from typing import Any

import torch
from torch import Tensor

from llmac.errors import ConfigError, EngineError

OTHER_WAY = "with rollout.weight_transport=tcp the server may be anywhere"


class SharedMemory:
    """The owner's side: memory for each slot, and where others find it."""

    def __init__(self) -> None:
        """Nothing is allocated yet.

        Raises:
            ConfigError: the operating system has no such memory.
        """
        if not hasattr(os, "memfd_create"):
            raise ConfigError(f"rollout.weight_transport is shm, which needs Linux; {OTHER_WAY}")
        self._shared: dict[int, tuple[int, str, Tensor]] = {}

    def introduction(self) -> dict[str, Any]:
        """What a reader needs once: a first place to look, which shows whether it can look at all."""
        if 0 not in self._shared:
            self.room(0, 1)
        return self.where(0)

    def room(self, slot: int, size: int) -> Tensor:
        """Memory of `size` bytes for the slot, to be written; what was in it is lost.

        A larger size than before replaces the memory, a smaller one keeps it.
        """
        if slot not in self._shared or self._shared[slot][2].numel() < size:
            self._release(slot)
            name = f"llmac-{secrets.token_hex(8)}"
            file = os.memfd_create(name)
            os.ftruncate(file, size)
            self._shared[slot] = file, name, _as_bytes(mmap.mmap(file, size))
        return self._shared[slot][2][:size]

    def where(self, slot: int) -> dict[str, Any]:
        """Where readers find the memory of the slot."""
        file, name, _ = self._shared[slot]
        return {"slot": slot, "path": f"/proc/{os.getpid()}/fd/{file}", "name": name}

    def close(self) -> None:
        """Give the memory back; readers keep what they have mapped. Safe to call twice."""
        for slot in list(self._shared):
            self._release(slot)

    def _release(self, slot: int) -> None:
        if slot in self._shared:
            os.close(self._shared.pop(slot)[0])


class SharedMemoryReader:
    """The other side: the memory of each slot, mapped when first seen."""

    def __init__(self, introduction: dict[str, Any]) -> None:
        """See whether the owner's memory can be reached at all.

        Raises:
            EngineError: it cannot.
        """
        self._mapped: dict[int, tuple[str, Tensor]] = {}
        self._map(introduction)

    def read(self, where: dict[str, Any], size: int) -> Tensor:
        """The first `size` bytes of a slot, not copied; valid until the owner writes it anew.

        Raises:
            EngineError: the owner's memory is gone, or is smaller than it should be.
        """
        slot, name = where["slot"], where["name"]
        if slot not in self._mapped or self._mapped[slot][0] != name:
            self._mapped.pop(slot, None)
            self._mapped[slot] = name, self._map(where)
        memory = self._mapped[slot][1]
        if memory.numel() < size:
            raise EngineError(
                f"the trainer's shared memory has {memory.numel()} bytes; its bucket of weights needs {size}"
            )
        return memory[:size]

    def close(self) -> None:
        """Unmap everything. Safe to call twice."""
        self._mapped.clear()

    @staticmethod
    def _map(where: dict[str, Any]) -> Tensor:
        path, name = where["path"], where["name"]
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise EngineError(
                f"the trainer's shared memory cannot be opened ({error}). The trainer has ended, or runs on another "
                f"machine, in another container or as another user; {OTHER_WAY}"
            ) from error
        try:
            # The process number may have gone to somebody else, whose file this would be.
            if name not in os.readlink(path):
                raise EngineError(
                    f"{path} is not the trainer's memory; expected {name}: the trainer has ended or runs in another "
                    f"container; {OTHER_WAY}"
                )
            return _as_bytes(mmap.mmap(file, 0, access=mmap.ACCESS_READ))
        finally:
            os.close(file)


def _as_bytes(memory: mmap.mmap) -> Tensor:
    with warnings.catch_warnings():
        # torch knows no read-only tensors and warns that nobody should write this one; nobody does.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=torch.uint8)
