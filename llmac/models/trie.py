"""Rows that share prefixes as one trie: each distinct (prefix, token) is one node, nodes in depth-first order.

Sorted rows are met in depth-first order, so that a row needs to add only what it does not share with the row before
it, and every subtree is an interval of nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmac.core.prefixes import Ids, depth_first

REACH = 4
"""Tokens that rows of a bin may look at, as a multiple of its budget: on the CPU their keys and values are gathered row
by row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trie:
    """N nodes, each with a token, and where the rows run through them."""

    tokens: Tensor
    """[N] token of each node."""
    depths: Tensor
    """[N] tokens before it on its path: its position."""
    ends: Tensor
    """[N] the first node behind its subtree: k lies on the path to q (or is q) iff k <= q < ends[k]."""
    paths: Tensor
    """[rows, longest] nodes of each row; behind the row's end, 0."""
    lengths: Tensor
    """[rows] tokens."""
    shared: Tensor
    """[rows] the tokens at its beginning that an earlier row brought; the others follow each other as nodes, too."""

    @classmethod
    def of(cls, rows: Sequence[Ids], *, share: bool = True) -> "Trie":
        """The trie of some rows, in any order, of at least one token each.

        Args:
            rows: token ids.
            share: False: every row has nodes of its own, and the trie is a bundle of lines.

        >>> Trie.of([(5, 6, 7), (5, 6, 8)]).paths
        tensor([[0, 1, 2],
                [0, 1, 3]])
        """
        order, shared = depth_first(rows)
        if not share:
            shared = [0] * len(rows)
        lengths = torch.tensor([len(row) for row in rows])
        paths = torch.zeros((len(rows), int(lengths.max())), dtype=torch.long)
        tokens: list[int] = []
        last = order[0]
        behind = torch.zeros(len(rows), dtype=torch.long)
        for row, known in zip(order, shared, strict=True):
            paths[row, :known] = paths[last, :known]
            own = rows[row][known:]
            paths[row, known : known + len(own)] = torch.arange(len(tokens), len(tokens) + len(own))
            tokens.extend(own)
            behind[row] = len(tokens)
            last = row
        inside = torch.arange(paths.shape[1]) < lengths[:, None]
        nodes = paths[inside]
        depths, ends = torch.zeros(2, len(tokens), dtype=torch.long)
        depths[nodes] = torch.arange(paths.shape[1]).expand_as(paths)[inside]
        ends.scatter_reduce_(0, nodes, behind[:, None].expand_as(paths)[inside], "amax")
        brought = torch.zeros_like(lengths)
        brought[torch.tensor(order)] = torch.tensor(shared)
        return cls(
            tokens=torch.tensor(tokens),
            depths=depths,
            ends=ends,
            paths=paths,
            lengths=lengths,
            shared=brought,
        )


def bins(rows: Sequence[Ids], begins: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Rows dealt into tries of at most `max_tokens` nodes, neighbours together.

    A row costs the tokens it does not share with the row before it. If there are any, they look at the whole row: such
    rows have at most `REACH * max_tokens` tokens together. Where a bin is full, the next row begins another and brings
    its prefix along; a row longer than the budget stands alone. A family of rows that begin alike stays together if the
    bin it would be torn between is half full already.

    Args:
        rows: token ids.
        begins: length of each row's prompt: rows are a family with the row before them if they share it all.
        max_tokens: the budget.

    Returns:
        Row numbers, every one in exactly one bin.

    >>> bins([(1, 2, 3), (1, 2, 4), (1, 2, 5)], [2, 2, 2], max_tokens=4)
    [[0, 1], [2]]
    """
    order, shared = depth_first(rows)
    found: list[list[int]] = []
    used = looked_at = 0
    for family in _families(order, shared, begins):
        sizes = [len(rows[row]) for row, _ in family]
        own = [size - known for size, (_, known) in zip(sizes, family, strict=True)]
        whole = [size if new else 0 for size, new in zip(sizes, own, strict=True)]
        together = max(used + sum(own), (looked_at + sum(whole)) / REACH)
        half_full = 2 * max(used, looked_at / REACH) >= max_tokens
        apart = bool(found) and together > max_tokens and half_full
        for (row, _), size, new, looks_at in zip(family, sizes, own, whole, strict=True):
            filled = max(used + new, (looked_at + looks_at) / REACH)
            if not found or apart or filled > max_tokens:
                found.append([])
                used = looked_at = size
                apart = False
            else:
                used += new
                looked_at += looks_at
            found[-1].append(row)
    return found


def _families(
    order: list[int], shared: list[int], begins: Sequence[int]
) -> list[list[tuple[int, int]]]:
    families: list[list[tuple[int, int]]] = []
    for row, known in zip(order, shared, strict=True):
        if not families or known < begins[row]:
            families.append([])
        families[-1].append((row, known))
    return families
