"""Whole tensors from the parts that ranks hold: DeepSpeed's ZeRO-3 and torch's FSDP2.

Both cut a tensor into one run of elements per rank, in the order of the ranks. The parts are the truth (what the
optimizer has written) and are read where they lie: nothing is gathered, freed or marked inside DeepSpeed or FSDP.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from llmac.errors import ConfigError
from llmac.runtime.shared_memory import SharedMemory

COPIES = 3
"""Memory that gathering takes at most, in sizes of what it puts together: the pieces of `SharedMemory`, or, where
tensors are sent, what has arrived and what it is joined to."""
CPU_BUCKET_BYTES = 96 << 20
"""Beyond what the processor's caches hold, a larger bucket costs more than the calls it saves."""
ALIGNMENT = 64
"""Bytes; the start of every run, so that any dtype can be looked at in place."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold parts of the tensor, possibly a single rank all of it."""
    # DeepSpeed marks parameters instead of giving them a class.
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> torch.Size:
    """Shape of the tensor when put together."""
    return getattr(tensor, "ds_shape", tensor.shape)


def check_readable(tensors: Iterable[Tensor]) -> None:
    """Whether a `Gatherer` can take them.

    Raises:
        ConfigError: a part is on disk or quantized.
    """
    for tensor in tensors:
        # Attributes of DeepSpeed's, on its parameters only.
        part = getattr(tensor, "ds_tensor", None)
        if part is not None and (
            part.status.name != "AVAILABLE" or hasattr(part, "ds_quant_scale")
        ):
            raise ConfigError(
                f"a ZeRO-3 parameter of shape {tuple(whole_shape(tensor))} is on disk or quantized, and its weights "
                "cannot be read; offload to cpu instead of nvme, without zero_quantized_nontrainable_weights"
            )


class Gatherer:
    """Puts shards together, bucket by bucket.

    Processes of one machine without GPUs write their shards into memory they share, and keep it for the next stream:
    sending them through sockets takes five to ten times as long, and pages of new memory longer than what is written to
    them (docs/benchmarks.md). All others use one all-gather a bucket.
    """

    _shared: ClassVar[dict[dist.ProcessGroup, SharedMemory | None]] = {}
    """None: the group's ranks cannot share memory."""

    def whole(self, shards: Sequence[tuple[Tensor, torch.dtype]]) -> dict[int, Tensor]:
        """Whole tensors by the `id` of the sharded one, each in the precision asked for.

        Every rank must call with the same tensors in the same order.
        """
        whole: dict[int, Tensor] = {}
        groups: dict[tuple[dist.ProcessGroup, torch.device], list[_Part]] = {}
        for tensor, dtype in shards:
            part = (
                _zero3_part(tensor, dtype)
                if hasattr(tensor, "ds_id")
                else _fsdp2_part(tensor, dtype)
            )
            if part is None:
                assert isinstance(tensor, DTensor)
                # Cut into columns, or along several dimensions of ranks.
                with torch.no_grad():
                    whole[id(tensor)] = tensor.full_tensor().to(dtype)
            else:
                groups.setdefault((part.group, part.device), []).append(part)
        for (group, device), parts in groups.items():
            whole.update(self._exchanged(parts, group, device))
        return whole

    def _exchanged(
        self, parts: list["_Part"], group: dist.ProcessGroup, device: torch.device
    ) -> dict[int, Tensor]:
        if dist.get_world_size(group) == 1:
            return {part.key: part.own.to(device, part.dtype).view(part.shape) for part in parts}
        if device.type == "cpu":
            if group not in self._shared:
                self._shared[group] = SharedMemory(group, at_least=CPU_BUCKET_BYTES // COPIES)
            shared = self._shared[group]
            found = _written(parts, shared) if shared else None
            if found is not None:
                return found
            self._shared[group] = None
        return _sent(parts, group, device)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Part:
    """What this rank holds of a tensor that is spread over a group of ranks."""

    key: int
    own: Tensor
    """One run of its elements, flat and in row-major order."""
    runs: tuple[int, ...]
    """Number of elements on each rank of the group. All but the last nonempty one are equal."""
    shape: torch.Size
    dtype: torch.dtype
    """To send it in."""
    group: dist.ProcessGroup
    device: torch.device
    """Where the ranks of the group talk to each other; an offloaded part is elsewhere."""

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


def _zero3_part(parameter: Tensor, dtype: torch.dtype) -> _Part:
    # Attributes that DeepSpeed adds to its parameters and no type declares.
    flat: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    group: dist.ProcessGroup = parameter.ds_process_group  # type: ignore[attr-defined]
    run: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    shape = whole_shape(parameter)
    # The last ranks' runs are padded to the length of the others.
    ranks = range(dist.get_world_size(group))
    runs = tuple(max(0, min(run, prod(shape) - run * rank)) for rank in ranks)
    return _Part(
        key=id(parameter),
        own=flat.detach().flatten()[: runs[dist.get_rank(group)]],
        runs=runs,
        shape=shape,
        dtype=dtype,
        group=group,
        device=parameter.device,
    )


def _fsdp2_part(tensor: Tensor, dtype: torch.dtype) -> _Part | None:
    """None: not cut into one run of rows per rank."""
    assert isinstance(tensor, DTensor)
    # `type`, as subclasses of Shard order rows in their own way.
    cut = [dim for dim, placement in enumerate(tensor.placements) if type(placement) is Shard]
    rest = [placement for dim, placement in enumerate(tensor.placements) if dim not in cut]
    if len(cut) != 1 or not all(isinstance(placement, Replicate) for placement in rest):
        return None
    [dim] = cut
    if tensor.placements[dim] != Shard(0):
        return None
    mesh = tensor.device_mesh
    rows, width = tensor.shape[0], prod(tensor.shape[1:])
    run = -(-rows // mesh.size(dim))
    return _Part(
        key=id(tensor),
        own=tensor.to_local().detach().reshape(-1),
        runs=tuple(max(0, min(run, rows - run * r)) * width for r in range(mesh.size(dim))),
        shape=tensor.shape,
        dtype=dtype,
        group=mesh.get_group(dim),
        device=_current_device(mesh.device_type),
    )


def _current_device(kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _written(parts: list[_Part], shared: SharedMemory) -> dict[int, Tensor] | None:
    """By writing each rank's runs where all see them; None: they cannot."""
    starts, size = _laid_out([part.size for part in parts])
    memory = shared.bytes(size)
    if memory is None:
        return None
    whole: dict[int, Tensor] = {}
    for part, start in zip(parts, starts, strict=True):
        flat = memory[start : start + part.size].view(part.dtype)
        begin = sum(part.runs[: part.rank])
        flat[begin : begin + part.runs[part.rank]].copy_(part.own)
        whole[part.key] = flat.view(part.shape)
    shared.meet()
    return whole


def _sent(parts: list[_Part], group: dist.ProcessGroup, device: torch.device) -> dict[int, Tensor]:
    """By one all-gather."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    starts, slot = _laid_out([max(part.runs) * part.dtype.itemsize for part in parts])
    wire = torch.empty(ranks, slot, dtype=torch.uint8, device=device)
    for part, start in zip(parts, starts, strict=True):
        _run(wire, part, start, rank).copy_(part.own)
    _all_gather(wire.view(-1), wire[rank], group)
    if len(parts) == 1:  # its runs are neighbours already
        [part] = parts
        return {part.key: wire.view(-1)[: part.size].view(part.dtype).view(part.shape)}
    return {
        part.key: torch.cat([_run(wire, part, start, r) for r in range(ranks)]).view(part.shape)
        for part, start in zip(parts, starts, strict=True)
    }


def _laid_out(lengths: list[int]) -> tuple[list[int], int]:
    """Start of each of several byte strings in one, and its length."""
    if len(lengths) == 1:
        return [0], lengths[0]
    starts, end = [], 0
    for length in lengths:
        starts.append(end)
        end += -(-length // ALIGNMENT) * ALIGNMENT
    return starts, end


def _run(wire: Tensor, part: _Part, start: int, rank: int) -> Tensor:
    end = start + part.runs[rank] * part.dtype.itemsize
    return wire[rank, start:end].view(part.dtype)


def _all_gather(output: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    # Older releases of torch have it under its first name only, newer ones warn about that name.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(output, own, group=group)
