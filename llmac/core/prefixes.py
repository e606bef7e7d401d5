"""What token sequences share from their beginning on."""

from collections.abc import Sequence
from itertools import pairwise

Ids = tuple[int, ...]


def common_prefix(one: Ids, other: Ids) -> int:
    """Number of tokens that both begin with.

    >>> common_prefix((1, 2, 3), (1, 2, 4, 5)), common_prefix((1, 2), (1, 2, 3))
    (2, 2)
    """
    low, high = 0, min(len(one), len(other))
    while low < high:  # by halves: comparing slices is faster than comparing tokens
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def depth_first(rows: Sequence[Ids]) -> tuple[list[int], list[int]]:
    """Rows sorted by their tokens, and how many tokens each then shares with the one before it.

    Sorted rows are met in the depth-first order of their prefix tree, so nobody further back shares
    more.

    >>> depth_first([(1, 3), (1, 2, 4), (1, 2)])
    ([2, 1, 0], [0, 2, 1])
    """
    order = sorted(range(len(rows)), key=lambda row: rows[row])
    pairs = pairwise(order)
    return order, [0, *(common_prefix(rows[a], rows[b]) for a, b in pairs)]


def distinct_tokens(rows: Sequence[Ids]) -> int:
    """Tokens that are left to compute when what rows share from their beginning on counts once.

        Σ_i |row_i| - Σ_i |common prefix of row_i and row_{i+1}|,      rows in lexicographic order

    That is the number of nodes of their prefix tree.

    Args:
        rows: token ids, from the first token of the prompt on.

    >>> distinct_tokens([(1, 2, 3), (1, 2, 4, 5), (9,)])
    6
    """
    _, shared = depth_first(rows)
    return sum(map(len, rows)) - sum(shared)
