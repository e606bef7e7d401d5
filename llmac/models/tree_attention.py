"""Attention along the paths of a trie, for any transformers model whose attention can be replaced.

All other layers see N distinct tokens as one sequence. In attention, the tokens that a row brought ask, and all tokens
of the row answer: rows of similar size form a block [rows, heads, asking, answering] for the fused kernels, instead of
one mask of N x N, nearly all of which would be False. On CUDA, flex attention skips those blocks of the N x N mask.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmac.errors import ConfigError
from llmac.models.block_mask import block_mask
from llmac.models.trie import Trie

logger = logging.getLogger(__name__)

WASTE = 1.25
"""A block may be this much larger than the rows in it."""
SMALL_AREA = 8192
"""Queries x keys that cost no more than one more block would."""

_USUAL = "sdpa"
_ALONG_PATHS = "along_paths_over_sdpa"
_OVERLOOKS = "_overlooks_paths"
_NEUTRAL = {"is_causal", "position_ids", "use_cache", "output_attentions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows of similar size, padded."""

    asking: Tensor
    """[r * Q] nodes that ask; padding asks as node 0 and is not listened to."""
    answering: Tensor
    """[r * K] nodes on the paths of the rows; behind a row's end, 0."""
    rows: int
    mask: Tensor | None
    """[r, 1, Q, K] who may look at whom; None: the rows share nothing, and plain causality does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Who looks at whom in a trie. Opaque to whatever casts or moves the arguments of layers."""

    depths: Tensor
    """[1, N] positions."""
    blocks: tuple[Block, ...]
    answers: Tensor
    """[N] where each node's answer is among those of all blocks, one behind the other."""
    ends: Tensor
    """[N] see `Trie`."""
    block_mask: BlockMask | None = None
    """The same for flex attention, which is then used."""

    @classmethod
    def of(cls, trie: Trie) -> "Paths":
        """Those of a trie."""
        own = trie.lengths - trie.shared
        answers = torch.zeros_like(trie.tokens)
        blocks: list[Block] = []
        seen = 0
        for members in _alike(trie.shared.tolist(), trie.lengths.tolist()):
            index = torch.tensor(members)
            shared, length = trie.shared[index, None], trie.lengths[index, None]
            queries, keys = int(own[index].max()), int(length.max())
            steps = torch.arange(queries)
            asks = steps < length - shared
            at = (shared + steps).clamp(max=keys - 1)
            answering = trie.paths[index, :keys]
            asking = answering.gather(1, at).where(asks, 0)
            answers[asking[asks]] = seen + torch.arange(asking.numel()).view_as(asking)[asks]
            seen += asking.numel()
            # Looking no further than one's own place, nobody looks at padding.
            mask = torch.arange(keys) <= (shared + steps)[:, :, None]
            blocks.append(
                Block(
                    asking=asking.flatten(),
                    answering=answering.flatten(),
                    rows=len(members),
                    mask=mask[:, None] if bool(shared.any()) else None,
                )
            )
        return cls(depths=trie.depths[None], blocks=tuple(blocks), answers=answers, ends=trie.ends)

    def to(self, device: torch.device) -> "Paths":
        """The same on another device; on CUDA, for flex attention."""
        moved = Paths(
            depths=self.depths.to(device),
            blocks=tuple(
                Block(
                    asking=block.asking.to(device),
                    answering=block.answering.to(device),
                    rows=block.rows,
                    mask=None if block.mask is None else block.mask.to(device),
                )
                for block in self.blocks
            ),
            answers=self.answers.to(device),
            ends=self.ends.to(device),
        )
        return moved.flexible() if device.type == "cuda" else moved

    def flexible(self) -> "Paths":
        """The same for flex attention."""
        return Paths(
            depths=self.depths,
            blocks=(),
            answers=self.answers,
            ends=self.ends,
            block_mask=block_mask(self.ends),
        )


def narrow_view(config: PreTrainedConfig) -> str | None:
    """Why some layers of a text model do not look at everything before a token; None: all of them do."""
    # Which of these fields there are, depends on the architecture.
    kinds = getattr(config, "layer_types", None)
    other = sorted(set(kinds or ()) - {"full_attention"})
    if other:
        return f"it has layers with {', '.join(other)}"
    window = getattr(config, "sliding_window", None)
    return f"its attention slides over {window} tokens" if window and not kinds else None


def why_not(model: nn.Module) -> str | None:
    """Why a model's attention cannot follow paths; None: it can."""
    inner = _transformer(model)
    if inner is None:
        return "it is not a transformers model"
    config = inner.config.get_text_config()
    narrow = narrow_view(config)
    if narrow is not None:
        return narrow
    if not inner._supports_attention_backend:
        return "its attention cannot be replaced"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are capped"
    name = inner.config._attn_implementation
    if name not in (_USUAL, _ALONG_PATHS):
        return f"its attention is {name}; set model.attention: sdpa"
    return found_out(model)


def follow_paths(model: nn.Module) -> None:
    """Let a model's attention follow the `paths` it is called with; called without, it is as before."""
    inner = _transformer(model)
    assert inner is not None, "`why_not` was asked"
    if not follows_paths(model):
        AttentionInterface.register(_ALONG_PATHS, _over(ALL_ATTENTION_FUNCTIONS[_USUAL]))
        AttentionMaskInterface.register(_ALONG_PATHS, ALL_MASK_ATTENTION_FUNCTIONS[_USUAL])
        inner.set_attn_implementation(_ALONG_PATHS)


def follows_paths(model: nn.Module) -> bool:
    """Whether `follow_paths` has been called, and nobody found out that it does not help."""
    inner = _transformer(model)
    return inner is not None and inner.config._attn_implementation == _ALONG_PATHS


def find_out(model: nn.Module, reason: str) -> None:
    """Never again let a model follow paths: it overlooks them, `reason` says how that was seen."""
    inner = _transformer(model)
    assert inner is not None, "it was called as a transformers model"
    if follows_paths(model):
        inner.set_attn_implementation(_USUAL)
    setattr(inner, _OVERLOOKS, reason)  # copies of the model overlook them, too


def found_out(model: nn.Module) -> str | None:
    """What `find_out` was told."""
    return getattr(_transformer(model), _OVERLOOKS, None)


def name_of(model: nn.Module) -> str:
    """The architecture inside any wrappers."""
    return type(_transformer(model) or model).__name__


def arguments(paths: Paths) -> dict[str, Any]:
    """What to call a model with besides token ids, so that its attention follows `paths`.

    Passed to the layers, not kept anywhere: gradient checkpointing calls them again in the backward pass.
    """
    # A mask of four dimensions is taken for ready-made: nobody makes one of N x N.
    ready = torch.empty((1, 1, 1, 1), device=paths.depths.device)
    return {"position_ids": paths.depths, "attention_mask": ready, "paths": paths}


def _transformer(model: nn.Module) -> PreTrainedModel | None:
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)


def _over(usual: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function that follows paths where there are any."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        paths: Paths | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **others: Any,  # what architectures hand to their attention
    ) -> tuple[Tensor, Tensor | None]:
        if paths is None:
            settings = {"scaling": scaling, "dropout": dropout, **others}
            return usual(module, query, key, value, attention_mask, **settings)
        unknown = [n for n, v in others.items() if n not in _NEUTRAL and v is not None]
        if unknown or dropout:
            raise ConfigError(
                f"{type(module).__name__} asks more of its attention than paths can give "
                f"({', '.join(unknown) or 'dropout'}); set actor.packing: padded"
            )
        if paths.block_mask is not None:
            return _flex(query, key, value, paths.block_mask, scaling), None
        return attend(query, key, value, paths, scaling), None

    return attention


def attend(query: Tensor, key: Tensor, value: Tensor, paths: Paths, scale: float | None) -> Tensor:
    """Attention [1, N, heads, D] of nodes [1, heads, N, D], each looking at the nodes on its path."""
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    answers = [
        scaled_dot_product_attention(
            _gathered(queries, block.asking, block.rows),
            _gathered(keys, block.answering, block.rows),
            _gathered(values, block.answering, block.rows),
            attn_mask=block.mask,
            is_causal=block.mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        .transpose(1, 2)
        .flatten(0, 1)
        for block in paths.blocks
    ]
    return torch.cat(answers).index_select(0, paths.answers)[None]


def _gathered(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """[rows, heads, L, D] of [N, heads, D]."""
    return x.index_select(0, index).unflatten(0, (rows, -1)).transpose(1, 2)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None
) -> Tensor:
    attention = _compiled_flex() if query.device.type == "cuda" else flex_attention
    grouped = query.shape[1] != key.shape[1]
    # Under autocast rotary positions leave queries and keys in float32, and flex attention does not cast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    found = attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    return found.transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def _alike(shared: list[int], lengths: list[int]) -> list[list[int]]:
    """Rows that bring tokens, those of similar size together; apart from them, those that share nothing."""
    groups: list[list[int]] = []
    for roots in (True, False):
        rows = [
            r for r in range(len(lengths)) if (shared[r] == 0) is roots and lengths[r] > shared[r]
        ]
        rows.sort(key=lambda r: (lengths[r], lengths[r] - shared[r], r))
        open_group: list[int] = []
        longest = widest = area = 0
        for row in rows:
            own = lengths[row] - shared[row]
            longest, widest = max(longest, lengths[row]), max(widest, own)
            area += lengths[row] * own
            padded = (len(open_group) + 1) * longest * widest
            if open_group and padded > WASTE * area + SMALL_AREA:
                groups.append(open_group)
                open_group, longest, widest, area = [], lengths[row], own, lengths[row] * own
            open_group.append(row)
        if open_group:
            groups.append(open_group)
    return groups
