"""scripts/benchmark packing: its workloads have the counts they say, and its table the right ratios."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def packing():
    """The part as a module; its neighbours import each other by bare names."""
    sys.path.insert(0, str(FOLDER))
    try:
        import packing

        yield packing
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def workloads(packing):
    import packed_workloads

    return packed_workloads


def prefixes(rows):
    """Distinct (prefix, token), and those of them in responses, one by one."""
    whole, prompts = set(), set()
    for row in rows:
        ids = row.prompt.token_ids + row.response_ids
        whole |= {ids[:n] for n in range(1, len(ids) + 1)}
        prompts |= {ids[:n] for n in range(1, len(row.prompt.token_ids) + 1)}
    return len(whole), len(whole - prompts)


def test_groups_share_their_prompts(workloads):
    made = workloads.groups(prompts=3)
    assert [len(workloads.ids(row)) for row in made.rows] == [320] * 24
    assert made.distinct == 3 * (256 + 8 * 64)
    assert (made.distinct, made.asked) == prefixes(made.rows)


def test_the_tree_has_258_edges_of_30_tokens(workloads):
    made = workloads.tree()
    assert len(made.rows) == 6 + 36 + 216 == 258
    assert made.distinct == 100 + 258 * 30
    assert made.asked == 258 * 30
    assert made.row_tokens == 258 * 100 + 30 * (6 + 2 * 36 + 3 * 216)
    assert all(len(row.response_ids) - row.fresh_from == 30 for row in made.rows)
    small = workloads.tree(branching=(3, 2), segment=4, prompt=5)
    assert (small.distinct, small.asked) == prefixes(small.rows)


def test_continuations_of_the_chain_leave_their_response_at_its_cuts(workloads):
    made = workloads.chain()
    assert len(made.rows) == 2 * (1 + 5 * 9)
    for first in range(0, len(made.rows), 46):
        whole, *others = made.rows[first : first + 46]
        assert [row.fresh_from for row in others] == [
            at for at in range(20, 120, 20) for _ in range(9)
        ]
        for row in others:
            at = row.fresh_from
            assert row.response_ids[:at] == whole.response_ids[:at]
            assert row.response_ids[at] != whole.response_ids[at]
            assert 90 <= len(row.response_ids) <= 150
    own = sum(len(row.response_ids) - row.fresh_from for row in made.rows)
    assert made.distinct == 100 + own
    small = workloads.chain(responses=2, cuts=2, continuations=3, prompt=4, response=12)
    assert (small.distinct, small.asked) == prefixes(small.rows)


def test_the_ideal_has_as_much_to_compute_and_shares_nothing(workloads):
    for made in (workloads.groups(prompts=1), workloads.tree(branching=(3, 3)), workloads.chain()):
        rows = workloads.unshared(made)
        distinct, asked = prefixes(rows)
        lengths = [len(workloads.ids(row)) for row in rows]
        assert distinct == sum(lengths) == made.distinct
        # Rounded in each row, and one token of each has none before it.
        assert abs(asked - made.asked) <= len(rows)
        assert {*lengths[:-1]} <= {len(workloads.ids(row)) for row in made.rows}


def test_kinds_agree_and_a_trie_computes_distinct_tokens(workloads):
    import packing_job

    policy = packing_job.policy_of("tiny")
    made = workloads.tree(branching=(2, 2), segment=3, prompt=4)
    found = {
        kind: packing_job.work(
            policy,
            made.rows,
            packing_job.Packing(kind=kind, max_tokens=1000, pad_id=0).fitting(policy.model),
        )
        for kind in packing_job.KINDS
    }
    assert [f["computed"] for f in found.values()] == [6 * 10, 4 * 10 + 2 * 7, 4 + 6 * 3]
    same = [f["logprobs"] for f in found.values()]
    assert same == [pytest.approx(same[0], rel=1e-5)] * 3
    assert all(f["seconds"] > 0 for f in found.values())


def test_ratios_are_taken_within_rounds(packing):
    turns = {
        "padded": [8.0, 18.0, 100.0],
        "varlen": [6.0, 12.0, 20.0],
        "trie": [2.0, 3.0, 5.0],
        "unshared": [1.0, 2.0, 5.0],
    }
    timed = {
        "title": "tree",
        "rows": 7,
        "distinct": 10,
        "rounds": {
            name: [{"seconds": s, "computed": 10 * n} for s in seconds]
            for n, (name, seconds) in enumerate(turns.items(), start=1)
        },
    }
    padded, varlen, trie, ideal = packing.table(
        timed, {"padded": 30.0, "varlen": 20.0, "trie": 10.0}
    )
    assert padded == ["tree: 7 rows", "padded", 10, 1.0, 18.0, 6.0, 9.0, 30.0]
    assert varlen[4:] == [12.0, 4.0, 6.0, 20.0]
    assert trie[3:] == [3.0, 3.0, 1.0, 1.5, 10.0]
    assert ideal == ["", "ideal", 40, 4.0, 2.0, pytest.approx(2 / 3), 1.0, None]


def test_kinds_that_disagree_are_not_compared(packing):
    same = {"logprobs": -5.0, "gradient": 2.0}
    packing.check_same({"padded": same, "trie": same})
    with pytest.raises(packing.JobError, match=r"gradient differs: 2\.1 as trie, 2\.0 padded"):
        packing.check_same({"padded": same, "trie": {**same, "gradient": 2.1}})


def test_a_phase_is_judged_behind_the_warm_up(packing):
    seconds = [9.0, 9.0, 1.0, 2.0, 3.0]
    assert packing.median_of({"lines": [{"timing_s/gen": s} for s in seconds]}, "gen") == 2.0
