"""Noise on every weight of a module, shards and all, put back bitwise: for proofs that changed weights arrive."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

NOISE = 0.1
"""Standard deviation, as a fraction of the root mean square of the tensor that is changed."""


@contextlib.contextmanager
@torch.no_grad()
def perturbed(module: nn.Module, *, seed: int, rank: int) -> Iterator[None]:
    """Inside, every parameter of `module` is another one; afterwards it is what it was, bit for bit.

        w' = w + 0.1 · rms(w) · ε,    ε ~ N(0, 1);    rms of an all-zero tensor counts as 1

    Each rank changes what it holds: the whole tensor, or its shard. A copy of that is kept meanwhile in main memory.
    No random state is consumed.

    Args:
        module: plain, in DDP, with adapters, or sharded by ZeRO or FSDP2.
        seed: same seed, same noise.
        rank: of this process; shards of different ranks get different noise.

    >>> layer = nn.Linear(2, 1)
    >>> before = layer.weight.clone()
    >>> with perturbed(layer, seed=0, rank=0):
    ...     bool((layer.weight != before).all())
    True
    >>> bool((layer.weight == before).all())
    True
    """
    _reshard(module)
    held = [_held(parameter) for parameter in module.parameters()]
    kept = [tensor.to("cpu", copy=True) for tensor, _ in held]
    try:
        for place, (tensor, is_shard) in enumerate(held):
            generator = torch.Generator()
            generator.manual_seed(
                1_000_003 * seed + 2 * place + (2_000_003 * rank if is_shard else 0)
            )
            tensor.add_(_noise(tensor, generator))
        yield
    finally:
        _reshard(module)
        for (tensor, _), true in zip(held, kept, strict=True):
            tensor.copy_(true)


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    scale = tensor.float().square().mean().sqrt() if tensor.numel() else torch.zeros(())
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    drawn = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    return (NOISE * scale * drawn).to(tensor.dtype)


def _reshard(module: nn.Module) -> None:
    """Cut the parameters again that ZeRO-3 keeps whole between passes, so that a shard is its only copy."""
    whole: list[Any] = [p for p in module.parameters() if hasattr(p, "ds_tensor") and p.numel()]
    if whole:
        whole[0].partition(param_list=whole, has_been_updated=False)


def _held(parameter: nn.Parameter) -> tuple[Tensor, bool]:
    """The memory behind a parameter on this rank, and whether it is only a shard."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3's own attribute
        return parameter.ds_tensor.data, True  # type: ignore[attr-defined]
    if isinstance(parameter.data, DTensor):
        return parameter.data.to_local(), True
    return parameter.data, False
