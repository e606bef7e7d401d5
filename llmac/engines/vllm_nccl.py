"""Weights to vLLM servers on GPUs through NCCL: the trainer's half; the other is vLLM's own backend "nccl".

Never run: written from the sources of vLLM 0.32 on machines without GPUs. `rollout.weight_transport: auto` does not
choose it. Needs vLLM in the trainer's environment, for its binding of NCCL.

Each server gets a communicator of its own, made anew each time it starts, so that one that dies takes no other along.
"""

import logging
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmac.engines.vllm_launch import free_port
from llmac.errors import EngineError

logger = logging.getLogger(__name__)

MEETING_SECONDS = 120.0
"""Longest wait for a server to join its communicator."""
STALL_SECONDS = 60.0
"""Longest wait for a bucket to be taken; then its server counts as dead, and its communicator is aborted."""
SECONDS_BETWEEN_LOOKS = 0.001


@dataclass(slots=True)
class _Server:
    """One server's communicator, whose type belongs to vLLM, and what is under way on it."""

    communicator: Any
    stream: torch.cuda.Stream
    under_way: list[tuple[torch.cuda.Event, list[Tensor]]] = field(default_factory=list)

    def settled(self, *, but: int) -> bool:
        """Whether all broadcasts but the last few are taken; forgets those that are."""
        while self.under_way and self.under_way[0][0].query():
            del self.under_way[0]
        return len(self.under_way) <= but


class NCCLWeightSender:
    """The same as `weight_sender.WeightSender`, over NCCL."""

    backend = "nccl"

    def __init__(self, bucket_bytes: int, *, host: str, workers: int) -> None:
        """No server is known yet.

        Args:
            bucket_bytes: of one bucket on the GPU; two are kept.
            host: address of this machine that the servers reach.
            workers: GPUs of each server.
        """
        self._bucket_bytes = bucket_bytes
        self._host = host
        self._workers = workers
        self._device = torch.cuda.current_device()
        self._threads = ThreadPoolExecutor(thread_name_prefix="nccl")
        self._meetings: list[Future[_Server]] = []
        self._servers: list[_Server] = []

    def init_info(self) -> dict[str, Any]:
        """For one server that has just started: how it joins. To be posted at once, to that server alone."""
        meeting: dict[str, Any] = {
            "master_address": self._host,
            "master_port": free_port(self._host),
            "world_size": 1 + self._workers,
        }
        self._meetings.append(self._threads.submit(self._meet, meeting))
        return {**meeting, "rank_offset": 1, "packed": False}

    def buckets(
        self, stream: Iterable[tuple[str, Tensor]]
    ) -> Generator[dict[str, Any], None, None]:
        """One update: what to tell every server, bucket by bucket, while its broadcast is already under way.

        As with `WeightSender.buckets`, the answers to a bucket must be in when the next but one is asked for.

        Raises:
            EngineError: no server joined, or none is left.
        """
        self._greet()
        bucket: list[tuple[str, Tensor]] = []
        size = 0
        try:
            for name, tensor in stream:
                if bucket and size + tensor.nbytes > self._bucket_bytes:
                    yield self._broadcast(bucket)
                    bucket, size = [], 0
                # A copy: the stream may write the next tensor over this one.
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
                bucket.append((name, copy.copy_(tensor.detach())))
                size += tensor.nbytes
            if bucket:
                yield self._broadcast(bucket)
        finally:
            # A broadcast that nobody takes would block every later synchronization of this GPU.
            self._settle(but=0)

    def close(self) -> None:
        """Leave all communicators. Safe to call twice."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for server in self._servers:
            server.communicator.destroy()
        self._servers.clear()

    def _meet(self, meeting: dict[str, Any]) -> _Server:
        """In a thread of its own, as it returns only when the server has joined."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        torch.cuda.set_device(self._device)  # each thread has a current device of its own
        return _Server(trainer_init(meeting), torch.cuda.Stream())

    def _greet(self) -> None:
        meetings, self._meetings = self._meetings, []
        self._servers += _joined(meetings, self._workers)

    def _broadcast(self, bucket: list[tuple[str, Tensor]]) -> dict[str, Any]:
        self._settle(but=1)
        if not self._servers:
            raise EngineError("no vLLM server takes weights over NCCL any more")
        filled = torch.cuda.current_stream().record_event()
        tensors = [tensor for _, tensor in bucket]
        for server in self._servers:
            server.stream.wait_event(filled)
            for tensor in tensors:
                server.communicator.broadcast(tensor, src=0, stream=server.stream)
            taken = torch.cuda.Event()
            taken.record(server.stream)
            server.under_way.append((taken, tensors))
        return {
            "names": [name for name, _ in bucket],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
        }

    def _settle(self, *, but: int) -> None:
        """Wait for broadcasts to be taken; who does not take them is dead and left behind."""
        deadline = time.monotonic() + STALL_SECONDS
        for server in list(self._servers):
            while not server.settled(but=but) and time.monotonic() < deadline:
                time.sleep(SECONDS_BETWEEN_LOOKS)
            if not server.settled(but=but):
                self._servers.remove(server)
                server.communicator.destroy()


def _joined(
    meetings: Sequence[Future[_Server]], workers: int, seconds: float = MEETING_SECONDS
) -> list[_Server]:
    """The servers that joined; who did not is left out, and told of in a warning.

    Args:
        meetings: one for each server that has started.
        workers: GPUs expected of each.
        seconds: longest wait for one.
    """
    servers: list[_Server] = []
    for meeting in meetings:
        try:
            servers.append(meeting.result(seconds))
        # Of any kind, as what NCCL raises when the other side dies has never been seen: one server must not fail the
        # update of all.
        except Exception as error:
            logger.warning(
                "a vLLM server did not join NCCL within %g s (%s: %s) and gets no weights; expected %d GPUs for each "
                "server, as rollout.tensor_parallel_size says. Data-parallel servers need rollout.weight_transport=tcp",
                seconds,
                type(error).__name__,
                error,
                workers,
            )
    return servers
