"""Attention of one new token over a cache, for transformers models: query heads that share a key are read together."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "llmac_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs,  # transformers passes every architecture's own options; those that matter here are named above
) -> tuple[Tensor, None]:
    """`sdpa` for a prompt; for a single new token, the same sum without repeating keys and values.

    With H query heads over K key heads, the H/K heads of a group become H/K query positions of one head: [B, K, H/K, D]
    against [B, K, S, D]. transformers repeats keys and values H/K times whenever there is a mask, which at decoding is
    most of the time spent. Grouped-query attention: Ainslie et al. 2023, arXiv:2305.13245.
    """
    batch, heads, length, width = query.shape
    if length != 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    groups, seen = key.shape[1], key.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    query = query.reshape(batch, groups, heads // groups, width)
    if query.is_cuda or query.dtype != torch.float32:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scale
        )
    else:
        # On CPU the fused kernel is made for long queries; two plain products are faster for one token.
        scores = torch.matmul(query * scale, key.transpose(2, 3))
        if attention_mask is not None:
            scores = scores.add_(attention_mask[..., :seen])
        out = torch.matmul(scores.softmax(dim=-1), value)
    return out.reshape(batch, 1, heads, -1), None


def use_grouped_attention(model: nn.Module) -> None:
    """Switch a transformers model to `grouped_attention`; a model that does not take the switch is left as it is."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if getattr(
        model, "_supports_attention_backend", False
    ):  # a class attribute of newer architectures only
        model.set_attn_implementation(NAME)  # type: ignore[operator]
