"""Every distinct (prefix, token) is one node; bins hold every row once and no more nodes than they may."""

import random

import pytest
import torch

from llmac.core.prefixes import common_prefix, depth_first, distinct_tokens
from llmac.models.trie import REACH, Trie, bins


def random_rows(seed, count=30):
    """Rows over three words, some of them copies or beginnings of others."""
    draw = random.Random(seed)
    rows = [
        tuple(draw.choices((1, 2, 3), weights=(6, 2, 1), k=draw.randint(1, 12)))
        for _ in range(count)
    ]
    return [*rows, rows[0], rows[1][:1], (*rows[2], 3)]


def prefixes(rows):
    """What the nodes of a trie stand for, found the slow way."""
    return {row[: end + 1] for row in rows for end in range(len(row))}


@pytest.mark.parametrize("seed", range(5))
def test_every_distinct_prefix_is_one_node_and_rows_run_through_theirs(seed):
    rows = random_rows(seed)
    trie = Trie.of(rows)
    assert len(trie.tokens) == len(prefixes(rows)) == distinct_tokens(rows)
    stands_for = {}
    for row, path, length in zip(rows, trie.paths, trie.lengths, strict=True):
        assert int(length) == len(row)
        for place, node in enumerate(path[: len(row)].tolist()):
            assert trie.tokens[node] == row[place]
            assert trie.depths[node] == place
            assert stands_for.setdefault(node, row[: place + 1]) == row[: place + 1]
    for key, prefix in stands_for.items():
        below = {node for node, other in stands_for.items() if other[: len(prefix)] == prefix}
        assert below == set(range(key, int(trie.ends[key])))


def test_rows_bring_what_no_row_before_them_had():
    trie = Trie.of([(1, 2, 3), (1, 2), (4,), (1, 2, 5, 6), (1, 2)])
    assert trie.shared.tolist() == [2, 0, 0, 2, 2]
    assert int((trie.lengths - trie.shared).sum()) == len(trie.tokens)


def test_side_by_side_rows_share_nothing():
    rows = [(1, 2, 3), (1, 2), (1, 2)]
    lines = Trie.of(rows, share=False)
    assert sorted([0, *lines.paths[lines.paths > 0].tolist()]) == list(range(7))
    assert lines.shared.tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 9, 20, 45, 1000])
def test_bins_hold_every_row_once_and_no_more_nodes_than_they_may(seed, budget):
    rows = random_rows(seed)
    found = bins(rows, [1] * len(rows), max_tokens=budget)
    assert sorted(row for members in found for row in members) == list(range(len(rows)))
    for members in found:
        inside = [rows[row] for row in members]
        size = len(prefixes(inside))
        # Copies and beginnings of a row that is too long cost nothing more.
        assert size <= budget or size == max(map(len, inside)), (size, inside)
    assert found == bins(rows, [1] * len(rows), max_tokens=budget)


def test_a_trie_larger_than_the_budget_is_split_with_its_prefix_repeated():
    rows = [(7, 7, 7, token) for token in range(6)]
    assert bins(rows, [3] * 6, max_tokens=5) == [[0, 1], [2, 3], [4, 5]]


def test_rows_of_a_bin_look_at_a_bounded_number_of_tokens():
    # Twelve rows of 17 tokens, one of them its own, and a copy of each, which looks at nothing.
    rows = [(*[7] * 16, token // 2) for token in range(24)]
    budget = 30  # 16 + 12 nodes
    assert 7 * 17 <= REACH * budget < 8 * 17
    found = bins(rows, [16] * 24, max_tokens=budget)
    assert [len(members) for members in found] == [14, 10]


def test_a_family_stays_together_where_the_bin_is_half_full():
    rows = [(1, 1, token) for token in range(3)] + [(2, 2, token) for token in range(3)]
    begins = [2] * 6
    assert bins(rows, begins, max_tokens=8) == [[0, 1, 2], [3, 4, 5]]
    # two families of 5 fill 10 of 12; the third would be torn
    rows += [(3, 3, token) for token in range(3)]
    assert bins(rows, [2] * 9, max_tokens=12) == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]
    # the same behind a word that all prompts begin with; what fits to the last node is not torn
    same = [(9, *row) for row in rows[:6]]
    assert bins(same, [3] * 6, max_tokens=10) == [[0, 1, 2], [3, 4, 5]]
    assert bins(same, [3] * 6, max_tokens=11) == [[0, 1, 2, 3, 4, 5]]
    # a family that would leave most of the bin empty is torn
    long = [(1, 1, 1), *((2, 2, token) for token in range(9))]
    assert bins(long, [3, *[2] * 9], max_tokens=10)[0] == [0, *range(1, 6)]
    # two families of 22 nodes would fit, but not all that they look at
    wide = [(*[word] * 16, token) for word in (1, 2) for token in range(6)]
    assert 6 * 17 < REACH * 46 < 12 * 17
    assert bins(wide, [16] * 12, max_tokens=46) == [[*range(6)], [*range(6, 12)]]


@pytest.mark.parametrize("seed", range(3))
def test_common_prefixes_are_found_by_halves_as_by_tokens(seed):
    rows = random_rows(seed)
    for one in rows:
        for other in rows:
            slow = next(
                (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                min(len(one), len(other)),
            )
            assert common_prefix(one, other) == slow
    order, shared = depth_first(rows)
    assert [rows[row] for row in order] == sorted(rows)
    assert shared[0] == 0


def test_the_order_of_rows_changes_nothing_but_their_order():
    rows = random_rows(0)
    trie, back = Trie.of(rows), Trie.of(rows[::-1])
    assert torch.equal(trie.tokens, back.tokens)
    assert torch.equal(trie.paths.flip(0), back.paths)
