"""Loads are counted in distinct tokens, and dealt so that no rank waits longer than before."""

import itertools
import random

import pytest

from llmac.core.balance import SLACK, destinations, imbalance, rank_loads
from llmac.core.prefixes import distinct_tokens


def test_distinct_tokens_are_the_distinct_prefixes():
    draw = random.Random(0)
    for _ in range(50):
        rows = [
            tuple(draw.choices((1, 2), k=draw.randint(0, 6))) for _ in range(draw.randint(0, 9))
        ]
        prefixes = {row[:length] for row in rows for length in range(1, len(row) + 1)}
        assert distinct_tokens(rows) == len(prefixes)


def test_a_tree_counts_each_segment_once():
    prompt, segment = (7, 7, 7), {place: (place, place) for place in range(6)}
    edges = [prompt + segment[a] for a in (0, 1)]
    edges += [prompt + segment[a] + segment[b] for a in (0, 1) for b in (2, 3)]
    assert distinct_tokens(edges) == 3 + 2 * 2 + 4 * 2


def drawn(draw):
    """Loads of up to 4 ranks with up to 4 groups each."""
    return [
        [draw.choice((1, draw.randint(1, 9), draw.randint(1, 100))) for _ in range(groups)]
        for groups in (draw.randint(1, 4) for _ in range(draw.randint(1, 4)))
    ]


def test_no_rank_gets_more_than_the_fullest_had_and_none_is_left_empty():
    draw = random.Random(1)
    evened = 0
    for _ in range(300):
        loads = drawn(draw)
        to = destinations(loads)
        before, after = [sum(own) for own in loads], rank_loads(loads, to)
        assert [len(own) for own in to] == [len(own) for own in loads]
        assert sum(after) == sum(before)
        assert min(after) > 0
        assert max(after) <= max(before)
        assert to == destinations(loads)
        evened += max(after) < max(before)
    assert evened > 100


def test_the_fullest_rank_is_within_the_bound_of_the_best_division():
    draw = random.Random(2)
    for _ in range(60):
        loads = [[draw.randint(1, 40) for _ in range(3)] for _ in range(2)]
        flat = [load for own in loads for load in own]
        best = min(
            max(sum(x for x, r in zip(flat, ranks, strict=True) if r == side) for side in (0, 1))
            for ranks in itertools.product((0, 1), repeat=6)
        )
        found = max(rank_loads(loads, destinations(loads)))
        assert best <= found <= (1 + SLACK) * (4 / 3 - 1 / 6) * best


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([[5, 5], [10]], [[0, 0], [1]]),
        # Staying below the mean of 11 leaves 6 + 5 and 5 + 6 as well.
        ([[6, 6], [5, 5]], [[0, 1], [1, 0]]),
        # Largest first: 61 would lift its rank above the mean of 150 and goes, 39 still fits.
        ([[100, 61, 39], [61, 39]], [[0, 1, 0], [1, 1]]),
        # A giant stays where it is, and what is with it leaves.
        ([[10, 100], [10, 10]], [[1, 0], [1, 1]]),
        # 203 | 199 could be 200 | 202: not worth the way.
        ([[50, 50, 50, 50, 3], [50, 50, 50, 49]], [[0] * 5, [1] * 4]),
        # More ranks than groups: nothing to do.
        ([[3], []], [[0], []]),
        ([[3, 2], []], [[0, 1], []]),
    ],
)
def test_groups_go_where(loads, expected):
    assert destinations(loads) == expected


def test_few_groups_travel_where_staying_is_as_even():
    draw = random.Random(3)
    loads = [[draw.randint(500, 1500) for _ in range(200)] for _ in range(4)]
    to = destinations(loads)
    moved = sum(target != rank for rank, own in enumerate(to) for target in own)
    assert moved < 0.1 * 800
    assert imbalance(rank_loads(loads, to)) < 1.01 < imbalance([sum(own) for own in loads])


def test_imbalance_is_the_largest_over_the_mean():
    assert imbalance([2, 2, 2]) == 1.0
    assert imbalance([6, 0, 0]) == 3.0
    assert imbalance([0, 0]) == 1.0
