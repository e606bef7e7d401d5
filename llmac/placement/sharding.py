"""What a module in training costs a GPU under each way to spread it, in the precisions of this project.

With N ranks, bytes a parameter (Rajbhandari et al. 2020, arXiv:1910.02054, section 3, with this project's precisions in
place of the paper's 2 + 2 + K):

                    model.dtype float32                     model.dtype bfloat16
    ddp             4 + 4 + 8, and 4 of buckets             2 + 2 + 4, and 2 of buckets
    zero1           4 + 4 + (4 + 8)/N                       2 + 2 + (4 + 8)/N
    zero2           4 + 4/N + (4 + 8)/N                     2 + 2/N + (4 + 8)/N
    zero3           (4 + 4 + 4 + 8)/N                       (2 + 2 + 4 + 8)/N
    zero3_offload   4/N, on the host (4 + 4 + 4 + 8)/N      2/N, on the host (2 + 4 + 4 + 8)/N
    fsdp2           (4 + 4 + 8)/N                           (2 + 2 + 4)/N

in the order parameters, gradients, optimizer. DeepSpeed keeps a float32 master copy of what it updates, even of
float32 weights; AdamW alone keeps its two moments in the precision of the weights. Nothing but the
parameters is kept for what does not learn.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

from llmac.placement.skeletons import Skeleton, Weight
from llmac.runtime.zero import bucket_sizes

MAX_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: gathered weights it holds on to."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's `sub_group_size`: parameters updated at a time at stage 3."""
FLOAT32 = 4
STEP_BYTES = 4
"""AdamW counts the steps of each tensor in one float32."""


class Sharding(StrEnum):
    """How training is spread over the GPUs: the files of recipes/accelerate/."""

    DDP = "ddp"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"
    ZERO3_OFFLOAD = "zero3_offload"
    FSDP2 = "fsdp2"

    @property
    def cuts_weights(self) -> bool:
        """Whether a GPU holds a shard of the weights instead of all."""
        return self in (Sharding.ZERO3, Sharding.ZERO3_OFFLOAD, Sharding.FSDP2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Bytes of one module on the fullest GPU."""

    parameters: int = 0
    """From the start."""
    gradients: int = 0
    """While it learns."""
    optimizer: int = 0
    """From the first update on."""
    buffers: int = 0
    """Buckets of gradients and gathered weights, while it learns."""
    update: int = 0
    """Copies that exist during the optimizer's step only, when the activations are gone."""
    idle_gradients: int = 0
    """How much of the gradients stays while it does not learn."""
    idle_buffers: int = 0
    """How much of the buffers does."""
    host: int = 0
    """In main memory, for each rank."""


@lru_cache(maxsize=256)
def held(module: Skeleton, sharding: Sharding, ranks: int) -> Held:
    """What a module costs each of `ranks` GPUs.

    Args:
        module: parameters, trainable or not.
        sharding: how they are spread.
        ranks: GPUs that train.

    >>> weight = Weight(shape=(1000, 1000), item_bytes=4, trainable=True, linear=True, block=0)
    >>> sizes = dict(layers=1, hidden=1, heads=1, key_heads=1, head_size=1, intermediate=4, vocabulary=9, context=None)
    >>> h = held(Skeleton(weights=(weight,), **sizes), Sharding.FSDP2, 2)
    >>> h.parameters, h.gradients, h.optimizer     # half of 4 MB, as many gradients, two moments and a counter
    (2000000, 2000000, 4000004)
    """
    if sharding is Sharding.DDP:
        return _replicated(module.weights, ranks)
    if sharding is Sharding.FSDP2:
        return _fully_sharded(module.weights, ranks)
    weights = _as_deepspeed_holds(module.weights)
    if sharding in (Sharding.ZERO1, Sharding.ZERO2):
        bucket = bucket_sizes(module.hidden)["reduce_bucket_size"]
        return _zero_optimizer(weights, ranks, bucket, cuts_gradients=sharding is Sharding.ZERO2)
    offload = sharding is Sharding.ZERO3_OFFLOAD
    return _zero_weights(weights, ranks, bucket_sizes(module.hidden), offload=offload)


def _replicated(weights: tuple[Weight, ...], ranks: int) -> Held:
    trainable = _trainable(weights)
    gradients = _bytes(trainable)
    # PyTorch's gradient_as_bucket_view is off: gradients exist a second time, in the buckets they travel in.
    buckets = gradients if ranks > 1 else 0
    return Held(
        parameters=_bytes(weights),
        gradients=gradients,
        optimizer=2 * gradients + STEP_BYTES * len(trainable),
        buffers=buckets,
        idle_buffers=buckets,
    )


def _fully_sharded(weights: tuple[Weight, ...], ranks: int) -> Held:
    if ranks == 1:
        return _replicated(weights, ranks)
    shards = [_first_rows(weight, ranks) for weight in weights]
    trainable = _trainable(shards)
    outside, block = _bytes(_outside(weights)), _largest_block(weights)
    # Gathered: what is outside of the blocks, the block at work and the next one; the block's gradient whole, and
    # once more in the order in which it is scattered.
    return Held(
        parameters=_bytes(shards),
        gradients=_bytes(trainable),
        optimizer=2 * _bytes(trainable) + STEP_BYTES * len(trainable),
        buffers=outside + 4 * block if trainable else outside + 2 * block,
    )


def _zero_optimizer(
    weights: tuple[Weight, ...], ranks: int, bucket: int, *, cuts_gradients: bool
) -> Held:
    trainable = _trainable(weights)
    if not trainable:
        return Held(parameters=_bytes(weights))
    share = sum(_cut_flat(group, ranks) for group in _decay_groups(trainable))
    item = trainable[0].item_bytes
    groups = len(_decay_groups(trainable))
    # The gradient just made, whole, while it is copied into the bucket or, too large for it, reduced by itself.
    fresh = max(weight.elements for weight in trainable) if cuts_gradients else 0
    return Held(
        # Flattened, and padded so that the shards are equal.
        parameters=_bytes(_frozen(weights)) + share * ranks * item,
        gradients=share * item if cuts_gradients else _bytes(trainable),
        optimizer=share * (FLOAT32 + 2 * FLOAT32) + STEP_BYTES * groups,
        buffers=(bucket + fresh) * item,
        # The shard's gradient flattened, and in float32 if it was not.
        update=share * (item if item == FLOAT32 else item + FLOAT32),
    )


def _zero_weights(
    weights: tuple[Weight, ...], ranks: int, sizes: Mapping[str, int], *, offload: bool
) -> Held:
    trainable = _trainable(weights)
    shards = [_evenly(weight, ranks) for weight in weights]
    share = sum(shard.elements for shard in _trainable(shards))
    elements = sum(weight.elements for weight in weights)
    item = max(weights, key=lambda weight: weight.elements).item_bytes
    threshold = sizes["stage3_param_persistence_threshold"]
    kept_whole = [weight for weight in weights if weight.elements <= threshold]
    gathered = min(elements, MAX_LIVE_ELEMENTS) * item
    if not trainable:
        return Held(parameters=_bytes(shards) + _bytes(kept_whole), buffers=gathered)
    gradients = share * item
    groups = len(_decay_groups(trainable))
    optimizer = (FLOAT32 + 2 * FLOAT32) * share + STEP_BYTES * groups
    bucket = sizes["reduce_bucket_size"] * item
    # A second time in the order in which it is scattered; or the gradient that is too large for it.
    scattered = max(bucket, item * max(weight.elements for weight in trainable))
    on_gpu = Held(
        parameters=_bytes(shards) + (_bytes(kept_whole) if ranks > 1 else 0),
        buffers=bucket + scattered + (gathered if ranks > 1 else 0),
    )
    if offload:
        return replace(on_gpu, idle_buffers=bucket, host=gradients + FLOAT32 * share + optimizer)
    return replace(
        on_gpu,
        gradients=gradients,
        optimizer=optimizer,
        update=min(share, SUB_GROUP_ELEMENTS) * FLOAT32,
        idle_gradients=gradients,
        idle_buffers=bucket,
    )


def _as_deepspeed_holds(weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """With bfloat16 switched on, DeepSpeed casts everything: adapters and a value head, too."""
    main = max(weights, key=lambda weight: weight.elements).item_bytes
    return tuple(replace(weight, item_bytes=main) for weight in weights)


def _trainable(weights: Iterable[Weight]) -> list[Weight]:
    return [weight for weight in weights if weight.trainable]


def _frozen(weights: Iterable[Weight]) -> list[Weight]:
    return [weight for weight in weights if not weight.trainable]


def _outside(weights: Iterable[Weight]) -> list[Weight]:
    return [weight for weight in weights if weight.block is None]


def _largest_block(weights: Iterable[Weight]) -> int:
    sizes: dict[int, int] = {}
    for weight in weights:
        if weight.block is not None:
            sizes[weight.block] = sizes.get(weight.block, 0) + weight.elements * weight.item_bytes
    return max(sizes.values(), default=0)


def _decay_groups(weights: list[Weight]) -> list[list[Weight]]:
    """The optimizer's two groups: matrices, and the rest without weight decay."""
    groups = ([w for w in weights if len(w.shape) > 1], [w for w in weights if len(w.shape) <= 1])
    return [group for group in groups if group]


def _bytes(weights: Iterable[Weight]) -> int:
    return sum(weight.elements * weight.item_bytes for weight in weights)


def _cut_flat(group: list[Weight], ranks: int) -> int:
    """Elements of a rank's part of the flattened group, padded to a multiple of two a rank (DeepSpeed's alignment)."""
    return 2 * _ceil(sum(weight.elements for weight in group), 2 * ranks)


def _evenly(weight: Weight, ranks: int) -> Weight:
    """The part of a parameter that ZeRO-3 leaves each rank."""
    return replace(weight, shape=(_ceil(weight.elements, ranks),))


def _first_rows(weight: Weight, ranks: int) -> Weight:
    """The part of a parameter that FSDP2 leaves rank 0, whose is never smaller than another's."""
    rows, *rest = weight.shape or (1,)
    return replace(weight, shape=(_ceil(rows, ranks), *rest))


def _ceil(count: int, parts: int) -> int:
    return -(-count // parts)
