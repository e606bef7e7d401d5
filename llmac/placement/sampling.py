"""What the engine that samples costs a GPU: weights, keys and values, working memory; awake and asleep."""

from collections.abc import Mapping
from dataclasses import dataclass

from llmac.config.schema import ModelConfig, RolloutConfig
from llmac.engines.hf_engine import PREFILL_TOKENS
from llmac.engines.row_cache import GROWTH_TOKENS
from llmac.errors import ConfigError
from llmac.placement.skeletons import Skeleton

GIB = 1 << 30
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GRAPHS = 1 * GIB
"""CUDA graphs of vLLM. Assumed: it depends on the model and the batch sizes captured."""
BATCHED_TOKENS = {"vllm": (16384, 8192), "vllm_server": (8192, 2048)}
"""vLLM's default `max_num_batched_tokens` on GPUs of at least 70 GiB, and below."""
LARGE_GPU = 70 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Bytes on one GPU, by what they are, in four moments; and what the cache holds."""

    starting: Mapping[str, int]
    """When the engine is built and gets its first weights."""
    awake: Mapping[str, int]
    """While it samples."""
    asleep: Mapping[str, int]
    """While the policy learns."""
    loading: Mapping[str, int]
    """While new weights arrive, their bucket apart."""
    host: int
    """Main memory of one rank while the engine sleeps."""
    cache: int
    """Keys and values; negative where the budget does not even hold the weights."""
    cache_tokens: int
    """Tokens of prompt and response the cache holds, over all GPUs of the engine."""
    longest: int
    """Tokens the engine promises to hold for one request."""
    rows: int
    """Responses the engine may work on at once."""


def hf_sampler(
    model: Skeleton, spec: ModelConfig, rollout: RolloutConfig, *, rows: int, prompt_tokens: int
) -> Sampler:
    """The transformers engine: a whole copy of the weights on every rank, and room for the rows at work.

    Args:
        model: without adapters; they arrive merged.
        spec: the recipe's `model`.
        rollout: the recipe's `rollout`.
        rows: responses this rank samples in a step.
        prompt_tokens: the longest prompt.
    """
    item = ITEM_BYTES[spec.compute_dtype or spec.dtype]
    rows = min(rows, rollout.max_num_seqs)
    capacity = _grown(prompt_tokens, rollout.max_new_tokens)
    weights, cache = model.elements * item, rows * capacity * token_bytes(model, item)
    # A buffer that grows exists twice, layer by layer.
    growing = cache // (2 * model.layers) if capacity > prompt_tokens + GROWTH_TOKENS else 0
    prefill = min(PREFILL_TOKENS, rows * prompt_tokens)
    workspace = growing + _pass_bytes(model, prefill, item) + _drawing_bytes(model, rows, item)
    # New weights replace the old ones when all have arrived.
    arriving = {"sampler weights": 2 * weights}
    return Sampler(
        starting=arriving,
        awake=_items(weights, cache, workspace),
        asleep={"sleeping sampler": weights},
        loading=arriving,
        host=0,
        cache=cache,
        cache_tokens=rows * capacity,
        longest=prompt_tokens + rollout.max_new_tokens,
        rows=rows,
    )


def vllm_sampler(
    model: Skeleton,
    spec: ModelConfig,
    rollout: RolloutConfig,
    *,
    gpu_memory: int,
    share: float,
    longest: int,
) -> Sampler:
    """A vLLM engine, on one of the `tensor_parallel_size` GPUs it spans.

        keys and values = share · GPU - weights / tp - one batch's activations - CUDA graphs

    Args:
        model: without adapters; they arrive merged.
        spec: the recipe's `model`.
        rollout: the recipe's `rollout`.
        gpu_memory: bytes of the GPU.
        share: the fraction of it that the engine takes.
        longest: tokens of the engine's context, which its cache must hold.

    Raises:
        ConfigError: the attention heads cannot be dealt out to that many GPUs.
    """
    parts = rollout.tensor_parallel_size
    if model.heads % parts:
        divisors = [str(n) for n in range(1, model.heads + 1) if model.heads % n == 0 and n <= 8]
        raise ConfigError(
            f"rollout.tensor_parallel_size is {parts}, which does not divide the {model.heads} attention heads of "
            f"{spec.name}; take one of {', '.join(divisors)}"
        )
    dtype = (spec.compute_dtype or spec.dtype) if rollout.dtype == "auto" else rollout.dtype
    item = ITEM_BYTES[dtype]
    weights = -(-model.elements * item // parts)
    large, small = BATCHED_TOKENS[rollout.engine]
    batch = large if gpu_memory >= LARGE_GPU else small
    graphs = 0 if rollout.enforce_eager else GRAPHS
    workspace = (
        _pass_bytes(model, batch, item, parts)
        + _drawing_bytes(model, rollout.max_num_seqs, item)
        + graphs
    )
    if rollout.kv_cache_mb is not None:
        cache = rollout.kv_cache_mb << 20
    else:
        cache = int(share * gpu_memory) - weights - workspace
    # A key head that is not divided any further is copied.
    cached = -(-token_bytes(model, item) * max(1, model.key_heads // parts) // model.key_heads)
    awake = _items(weights, max(0, cache), workspace)
    sleeps = rollout.engine == "vllm" and rollout.sleep_level > 0
    return Sampler(
        starting=awake,
        awake=awake,
        asleep={"sleeping sampler": graphs if sleeps else sum(awake.values())},
        # It wakes for its weights, and makes the cache anew when it samples.
        loading={"sampler weights": weights, "sleeping sampler": graphs} if sleeps else awake,
        host=weights if sleeps and rollout.sleep_level == 1 else 0,
        cache=cache,
        cache_tokens=max(0, cache) // cached,
        longest=longest,
        rows=rollout.max_num_seqs,
    )


def _items(weights: int, cache: int, workspace: int) -> dict[str, int]:
    return {"sampler weights": weights, "KV cache": cache, "sampler workspace": workspace}


def token_bytes(model: Skeleton, item_bytes: int) -> int:
    """Keys and values of one token in all layers.

    >>> sizes = dict(hidden=8, heads=2, intermediate=32, vocabulary=9, context=None)
    >>> token_bytes(Skeleton(weights=(), layers=3, key_heads=1, head_size=4, **sizes), 2)     # 2 · 3 · 1 · 4 · 2
    48
    """
    return 2 * model.layers * model.key_heads * model.head_size * item_bytes


def _grown(prompt_tokens: int, new_tokens: int) -> int:
    """Columns of the transformers engine's buffers after the longest response: they double when they are full."""
    capacity = prompt_tokens + min(new_tokens, GROWTH_TOKENS)
    while capacity < prompt_tokens + new_tokens - 1:  # the last token is never fed back
        capacity *= 2
    return capacity


def _pass_bytes(model: Skeleton, tokens: int, item: int, parts: int = 1) -> int:
    """One layer of a forward pass without gradient: its three widest tensors, and four of the residual stream."""
    return tokens * item * (3 * model.intermediate // parts + 4 * model.hidden)


def _drawing_bytes(model: Skeleton, rows: int, item: int) -> int:
    """Logits of the next token as computed, in float32, and their log-softmax."""
    return rows * model.vocabulary * (item + 8)
