"""The server's half of sending weights: a weight transfer backend of vLLM named "llmac", run in vLLM's workers.

A server is started with `--weight-transfer-config '{"backend": "llmac"}'` and with `WorkerExtension` of this file as
`--worker-extension-cls` (`vllm_launch.server_command`). vLLM imports that class in each worker before it loads the
model, and importing this file registers the backend. An entry point for vLLM's plugins would do it too, but in every
vLLM of the machine, also in those that are not ours, and not in an editable install older than the entry point.

One update is one session: start, bucket after bucket, finish. Facts it rests on (vLLM 0.32):
    - A worker counts a session as open until `finish` succeeds or `update` fails, and refuses to start another. Hence
      `break_off_weight_update`, and a `start` that begins from anything.
    - When several workers share an engine and one raises, vLLM does not read what the others answer, takes it for the
      answer to the next call, and from then on is told that weights were loaded when they were not. Hence a server of
      several workers takes no more weights after a failure: it has to be started anew.
    - Where vLLM computes with the parameters as they were loaded, as on CPU with packing switched off, tensors are
      copied from the bucket into the parameters and that is all. Elsewhere layers are made anew, loaded, processed and
      copied over the old ones, over all buckets of one session; half-loaded layers are kept until their last part.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from llmac.engines import vllm_process, vllm_weights
from llmac.engines.weight_memory import SharedMemoryReader
from llmac.engines.weight_sender import WeightSender, unpacked
from llmac.engines.weight_socket import WeightSocketReader

Reader = SharedMemoryReader | WeightSocketReader


class WorkerExtension:
    """What vLLM's worker inherits besides its own: to be called through `/collective_rpc`."""

    def break_off_weight_update(self) -> None:
        """End an update that nobody will finish, if there is one. The model may then hold a mixture of weights."""
        self._weight_update_active = False  # the worker's own, a private name of vLLM


@dataclass
class Introduction(WeightTransferInitInfo):
    """What `WeightSender.init_info` says."""

    transport: str
    introduction: dict[str, Any]


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """What `WeightSender.buckets` says of one bucket."""

    update: int
    number: int
    last: bool
    where: dict[str, Any]
    size: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class WeightReceiver(WeightTransferEngine[Introduction, Bucket]):
    """Loads buckets into the model of one worker."""

    init_info_cls = Introduction
    update_info_cls = Bucket
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module):
        """Called by vLLM after the model has been loaded."""
        super().__init__(config, vllm_config, device, model)
        self._reader: Reader | None = None
        self._as_loaded = (
            device.type == "cpu"
            and not self.model_config.use_mla  # derives matrices from kv_b_proj
            and vllm_weights._computes_plainly(model)
        )
        self._half_loaded = False
        self._update: int | None = None
        self._next_number = 0
        self._complete = False
        self._alone = vllm_config.parallel_config.world_size == 1
        self._failed = False

    def init_transfer_engine(self, init_info: Introduction) -> None:
        """Meet a sender; the one before is forgotten."""
        with self._failures_noted():
            self.shutdown()
            reader = SharedMemoryReader if init_info.transport == "shm" else WeightSocketReader
            self._reader = reader(init_info.introduction)

    def start_weight_update(self) -> None:
        """Begin an update, whatever became of the one before."""
        with self._failures_noted():
            self._start()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket; an exception ends the session."""
        with self._failures_noted():
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def finish_weight_update(self) -> None:
        """End an update.

        Raises:
            RuntimeError: its last bucket did not arrive; the session stays open.
        """
        with self._failures_noted():
            self._finish()

    def shutdown(self) -> None:
        """Forget the sender."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @contextlib.contextmanager
    def _failures_noted(self) -> Iterator[None]:
        """Refuse to go on after a failure that leaves vLLM out of step with its workers."""
        if self._failed and not self._alone:
            raise RuntimeError(
                "an update failed on this server of several workers, and vLLM no longer knows what its workers answer; "
                "start the server anew"
            )
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def _start(self) -> None:
        self._next_number, self._complete = 0, False
        if self._as_loaded:
            return
        if self._half_loaded:
            # Layers would go on counting what arrived in the update that broke off.
            finalize_layerwise_reload(self.model, self.model_config)
        self._half_loaded = True
        vllm_weights._pack_experts_anew(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Bucket) -> None:
        """Load one bucket.

        Raises:
            RuntimeError: a bucket is missing, or the worker has not met a sender.
            EngineError: the bucket cannot be read.
        """
        bucket = update_info
        if self._reader is None:
            raise RuntimeError("a bucket of weights arrived before /init_weight_transfer_engine")
        first = self._next_number == 0
        if bucket.number != self._next_number or not (first or bucket.update == self._update):
            raise RuntimeError(
                f"bucket {bucket.number} of update {bucket.update} arrived; expected bucket {self._next_number}"
                f"{'' if first else f' of update {self._update}'}: send the complete weights again"
            )
        memory = self._reader.read(bucket.where, bucket.size)
        if not self._as_loaded:
            # Layers keep what they have of a fused weight until its last part arrives, in a later bucket perhaps.
            memory = memory.to(self.device, copy=True)
        with torch.no_grad():
            self.model.load_weights(  # type: ignore[operator]
                unpacked(memory, bucket.names, bucket.dtypes, bucket.shapes, bucket.offsets)
            )
        self._update, self._next_number, self._complete = (
            bucket.update,
            bucket.number + 1,
            bucket.last,
        )

    def _finish(self) -> None:
        if not self._complete:
            raise RuntimeError(
                f"the update ended after {self._next_number} buckets, before the last: the model holds a mixture of "
                "old and new weights; send the complete weights again"
            )
        if not self._as_loaded:
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                vllm_weights._dispatch_head_anew(self.model)
        self._half_loaded = False


# Once in each worker: packing is switched off before the model is loaded, and the backend is known by its name.
vllm_process.import_vllm()
WeightTransferEngineFactory.register_engine(WeightSender.backend, WeightReceiver)
