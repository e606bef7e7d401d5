"""The trained weights on their way out: checkpoint names, adapters merged, gathered a bucket at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from llmac.errors import ConfigError
from llmac.runtime.gathering import (
    COPIES,
    CPU_BUCKET_BYTES,
    Gatherer,
    check_readable,
    is_sharded,
    whole_shape,
)
from llmac.runtime.merging import Entry, entries
from llmac.runtime.naming import Conversion, conversions

BUCKET_BYTES = 512 << 20


def full_weights(
    model: nn.Module, *, bucket_bytes: int = BUCKET_BYTES, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights of a transformers model as its checkpoint would have them: names, layouts, tied ones once.

    A LoRA layer comes out merged, computed when its turn comes and never written into the base:

        W' = W + Σ over active adapters of (alpha / r) · B A

    Where adapters are disabled the base comes out; a module trained in full beside the adapter
    (`modules_to_save`) comes out as trained. Tied weights come once, under the name
    `save_pretrained` keeps. The order is that of `state_dict`.

    Weights that ZeRO-3 or FSDP2 spread over ranks are put together bucket by bucket, one collective
    a bucket. It is then on every rank to take the stream to its end: a rank that stops early leaves
    the others waiting in their next bucket until the process group times out. Closing the stream
    frees its bucket on the rank that closes it, and nothing else.

    A tensor is valid for as long as it is held, and holding it keeps its bucket alive: copy what is
    to outlive the next bucket. Never write to one: whole weights share memory with the model, and
    gathered ones, on a CPU machine, with the other ranks. There, buckets are at most 96 MiB, and
    their memory stays for the next stream.

    Args:
        model: a transformers model, plain, with a peft LoRA adapter, or wrapped in DDP or by
            DeepSpeed (any ZeRO stage), or sharded by FSDP2 in place.
        bucket_bytes: bound on the memory above the shards: gathered, merged, cast and converted
            tensors. What cannot be produced within it is a bucket of its own.
        dtype: precision of floating-point tensors in the stream; None: the model's. Shards are cast
            before they are sent, merged layers are rounded once.

    Raises:
        ConfigError: an adapter that is not W + scaling · B A (DoRA, quantized base, IA3, ...), one
            that tells tied weights apart, which no checkpoint of the architecture can hold, or
            shards that cannot be read (on disk, quantized). Raised before the first tensor.

    >>> layer = nn.Linear(2, 1)
    >>> [(name, tuple(weight.shape)) for name, weight in full_weights(layer)]
    [('weight', (1, 2)), ('bias', (1,))]
    """
    model = _bare(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # What forward passes have gathered may be older than the shards.
            module.reshard()
    found = list(entries(model))
    # transformers' own account of what is tied: name left out of checkpoints -> name kept.
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    _check_tied({entry.name: entry for entry in found}, tied)
    for entry in found:
        check_readable(entry.tensors)
    # Likewise: names that checkpoints of the architecture do without.
    unsaved: list[str] = getattr(model, "_keys_to_ignore_on_save", None) or []
    kept = {e.name: e for e in _once(found, left_out=set(tied)) if e.name not in unsaved}
    units = [
        _Unit(conversion, tuple(kept[name] for name in conversion.sources), dtype)
        for conversion in conversions(model, kept)
    ]
    sharded = [tensor for unit in units for tensor, _ in unit.shards()]
    if sharded and all(tensor.device.type == "cpu" for tensor in sharded):
        bucket_bytes = min(bucket_bytes, CPU_BUCKET_BYTES)
    return _stream(units, model, bucket_bytes)


def _bare(model: nn.Module) -> nn.Module:
    """Without the wrappers of data parallelism, DeepSpeed and peft."""
    # By name: importing deepspeed to ask for its class would take seconds in runs without it.
    while isinstance(model, DistributedDataParallel) or any(
        kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__
    ):
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_tied(entries: dict[str, Entry], tied: dict[str, str]) -> None:
    for left_out, kept in tied.items():
        both = entries.get(left_out), entries.get(kept)
        if both[0] and both[1] and both[0].identity != both[1].identity:
            raise ConfigError(
                f"{left_out} and {kept} are tied in this architecture, but the adapter changes one "
                "without the other, and a checkpoint has room for one only. Take both out of "
                "model.lora's target_modules and modules_to_save"
            )


def _once(entries: list[Entry], left_out: set[str]) -> Iterator[Entry]:
    """One entry for each weight; of those that are the same, one whose name is not `left_out`."""
    kept = {entry.identity for entry in entries if entry.name not in left_out}
    done: set[tuple[int, ...]] = set()
    for entry in entries:
        again = entry.identity in done
        if again or (entry.name in left_out and entry.identity in kept):
            continue
        done.add(entry.identity)
        yield entry


@dataclass(frozen=True, slots=True)
class _Unit:
    """Entries that a checkpoint knows only together (as a rule one), and what producing them takes."""

    conversion: Conversion
    entries: tuple[Entry, ...]
    dtype: torch.dtype | None

    def shards(self) -> list[tuple[Tensor, torch.dtype]]:
        """What has to be put together, and in which precision."""
        return [
            # What an adapter is added to keeps its precision until then.
            (tensor, tensor.dtype if entry.adapters else self._dtype(tensor))
            for entry in self.entries
            for tensor in entry.tensors
            if is_sharded(tensor)
        ]

    def held_bytes(self) -> int:
        """Of all tensors made for it that live until the bucket's end."""
        gathered = sum(_bytes(tensor, dtype) for tensor, dtype in self.shards())
        computed = [
            entry
            for entry in self.entries
            if entry.adapters
            or not (is_sharded(entry.tensor) or self._dtype(entry.tensor) == entry.tensor.dtype)
        ]
        converted = self.entries if self.conversion.converter else ()
        return COPIES * gathered + sum(
            _bytes(entry.tensor, self._dtype(entry.tensor)) for entry in (*computed, *converted)
        )

    def passing_bytes(self) -> int:
        """Of what lives only while an entry is merged: B A, and the same scaled."""
        merged = [entry for entry in self.entries if entry.adapters]
        return max((2 * _bytes(entry.tensor, torch.float32) for entry in merged), default=0)

    def stream(self, model: nn.Module, whole: Mapping[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the checkpoint."""
        found = self.conversion(
            {e.name: e.weight(whole).to(self._dtype(e.tensor)) for e in self.entries}, model
        )
        # Held nowhere else: whoever drops each tensor has one alive.
        for name in list(found):
            yield name, found.pop(name)

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype


def _bytes(tensor: Tensor, dtype: torch.dtype) -> int:
    return prod(whole_shape(tensor)) * dtype.itemsize


def _stream(
    units: list[_Unit], model: nn.Module, bucket_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    gatherer = Gatherer()
    for bucket in _buckets(units, bucket_bytes):
        # A generator of its own, so that all it holds is gone before the next bucket is gathered.
        yield from _stream_bucket(bucket, model, gatherer)


def _stream_bucket(
    bucket: list[_Unit], model: nn.Module, gatherer: Gatherer
) -> Iterator[tuple[str, Tensor]]:
    whole = gatherer.whole([shard for unit in bucket for shard in unit.shards()])
    for unit in bucket:
        yield from unit.stream(model, whole)


def _buckets(units: list[_Unit], limit: int) -> Iterator[list[_Unit]]:
    """Neighbours whose memory together is within `limit` bytes; a unit beyond it is alone."""
    bucket: list[_Unit] = []
    held = passing = 0
    for unit in units:
        held += unit.held_bytes()
        passing = max(passing, unit.passing_bytes())
        if bucket and held + passing > limit:
            yield bucket
            bucket, held, passing = [], unit.held_bytes(), unit.passing_bytes()
        bucket.append(unit)
    if bucket:
        yield bucket
