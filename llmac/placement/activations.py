"""What a forward pass keeps for the backward pass, and the logits.

The method is that of Korthikanti et al. 2022 (arXiv:2205.05198, section 4), for the layers of today's models as
transformers computes them: RMSNorm in float32, rotary positions, gated feed-forward, attention by a fused kernel that
recomputes the scores (no term in the square of the length), no dropout, no tensor parallelism. A token in a layer keeps

                 two norms          queries, keys, values, output     gate, up, their product, its input
    float32      24 h               4 (2 q + 2 k)                     4 · 4 f
    bfloat16     16 h               2 (2 q + 2 k)                     2 · 4 f
    autocast     26 h               2 (2 q + 2 k)                     2 · 4 f         float32 weights, bfloat16 compute

bytes, with h the hidden size, q and k the width of all queries and of all keys, f that of the feed-forward part.
Autocast keeps the residual stream in float32 and casts a norm's output once for each matrix that reads it.
"""

from functools import lru_cache
from typing import Literal

from llmac.placement.skeletons import Skeleton

Precision = Literal["float32", "bfloat16", "autocast"]

NORM_BYTES = {"float32": 24, "bfloat16": 16, "autocast": 26}
"""A token's bytes in the two norms of a layer, in units of the hidden size."""
STREAM_BYTES = {"float32": 4, "bfloat16": 2, "autocast": 4}
"""A number's bytes in the residual stream: what gradient checkpointing keeps of a layer."""
COMPUTE_BYTES = {"float32": 4, "bfloat16": 2, "autocast": 2}
"""A number's bytes inside attention and feed-forward."""
LAST_NORM_BYTES = {"float32": 8, "bfloat16": 6, "autocast": 8}
"""A token's bytes in the norm after the last layer, in units of the hidden size."""
CHUNKS_ALIVE = 4
"""Blocks of logits at a time, see `llmac.models.logprobs`."""


def kept_bytes(
    model: Skeleton, tokens: int, precision: Precision, *, gradient_checkpointing: bool
) -> int:
    """Bytes a forward pass leaves for the backward pass, copies of weights apart.

        without checkpointing   tokens · (layers · layer + last norm)
        with                    tokens · (layers · stream + last norm)

    Args:
        model: sizes.
        tokens: of the micro-batch, padding included.
        precision: of weights and computation.
        gradient_checkpointing: keep the layers' inputs only.
    """
    stream = STREAM_BYTES[precision] * model.hidden
    layer = stream if gradient_checkpointing else layer_bytes(model, precision)
    return tokens * (model.layers * layer + LAST_NORM_BYTES[precision] * model.hidden)


def backward_bytes(
    model: Skeleton, tokens: int, precision: Precision, *, gradient_checkpointing: bool
) -> int:
    """Bytes alive when the backward pass begins: what is kept, and the work in one layer.

        kept + tokens · (layer, if it is recomputed, + 2 · widest tensor + 2 · stream)

    The last two are gradients on their way through the layer.
    """
    recomputed = layer_bytes(model, precision) if gradient_checkpointing else 0
    passing = 2 * COMPUTE_BYTES[precision] * model.intermediate
    passing += 2 * STREAM_BYTES[precision] * model.hidden
    kept = kept_bytes(model, tokens, precision, gradient_checkpointing=gradient_checkpointing)
    return kept + tokens * (recomputed + passing)


def layer_bytes(model: Skeleton, precision: Precision) -> int:
    """What one layer keeps of one token.

    >>> sizes = dict(layers=1, hidden=8, heads=2, key_heads=1, head_size=4, intermediate=32, vocabulary=9, context=None)
    >>> layer_bytes(Skeleton(weights=(), **sizes), "float32")        # 24·8 + 4·(2·8 + 2·4) + 4·4·32
    800
    """
    compute = COMPUTE_BYTES[precision]
    queries, keys = model.heads * model.head_size, model.key_heads * model.head_size
    attention = compute * (2 * queries + 2 * keys)
    return NORM_BYTES[precision] * model.hidden + attention + 4 * compute * model.intermediate


@lru_cache(maxsize=64)
def cast_bytes(model: Skeleton, precision: Precision, *, cached: bool) -> int:
    """Bfloat16 copies of float32 matrices alive at the end of a forward pass, those apart that autograd keeps.

    Args:
        model: sizes.
        precision: of weights and computation.
        cached: autocast holds the copy of every trainable matrix until the pass is over; else that of the matrix at
            work alone, of which the largest counts.
    """
    if precision != "autocast":
        return 0
    if cached:
        return 2 * sum(
            weight.elements for weight in model.weights if weight.linear and weight.trainable
        )
    return 2 * max((weight.elements for weight in model.weights if weight.linear), default=0)


@lru_cache(maxsize=64)
def backward_cast_bytes(
    model: Skeleton, precision: Precision, *, gradient_checkpointing: bool
) -> int:
    """Copies of matrices, frozen ones too, that layers need whose backward pass is still to come."""
    if precision != "autocast":
        return 0
    matrices = [weight for weight in model.weights if weight.linear]
    if gradient_checkpointing:  # of the layer at work
        matrices = [weight for weight in matrices if weight.block == 0]
    return 2 * sum(weight.elements for weight in matrices)


def logits_bytes(model: Skeleton, tokens: int, chunk_mb: int) -> int:
    """Blocks of float32 logits alive at a time: four, each of `model.logprob_chunk_mb`, or of all tokens if less."""
    return CHUNKS_ALIVE * min(chunk_mb << 20, 4 * tokens * model.vocabulary)
