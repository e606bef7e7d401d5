"""The mask of a trie for flex attention, made from intervals: never of N x N elements."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

SIZE = 128
"""Nodes on a side of a block, flex attention's own default."""


def block_mask(ends: Tensor) -> BlockMask:
    """Who looks at whom in a trie: node q at node k iff k <= q < ends[k].

    Of block I of asking and an earlier block J of answering nodes, somebody looks at somebody iff the subtree that
    reaches furthest from J reaches into I, and everybody looks at everybody iff all reach beyond I:

        max ends[J] > first of I,        min ends[J] > last of I

    Args:
        ends: [N] the first node behind each node's subtree.
    """
    nodes, device = len(ends), ends.device
    blocks = -(-nodes // SIZE)
    first = torch.arange(blocks, device=device)[:, None] * SIZE
    # Behind the last node nobody asks or answers: its block is never seen whole, and reaches no further for it.
    reach = torch.zeros(blocks * SIZE, dtype=ends.dtype, device=device)
    reach[:nodes] = ends
    reach = reach.view(blocks, SIZE)
    earlier = torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril(-1)
    some = earlier & (reach.amax(1) > first)
    whole = earlier & (reach.amin(1) >= first + SIZE)
    own = torch.eye(blocks, dtype=torch.bool, device=device)

    def on_path(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key])

    return BlockMask.from_kv_blocks(
        *_listed(own | (some & ~whole)),
        *_listed(whole),
        BLOCK_SIZE=SIZE,
        mask_mod=on_path,
        seq_lengths=(nodes, nodes),
    )


def _listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of blocks has, and which they are, the others behind them."""
    which = wanted.int().argsort(dim=1, descending=True, stable=True)
    return wanted.sum(1).int()[None, None], which.int()[None, None]
