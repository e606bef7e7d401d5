"""Responses that branch: what is asked of the engine, what becomes a row, and what the rows are worth."""

import dataclasses
import itertools
import logging
import math
import random
from collections import Counter

import pytest
import torch

from llmac.core.baselines import group_mean, leave_one_out
from llmac.core.collate import collate
from llmac.core.plans import Flat
from llmac.core.protocols import (
    Completion,
    ReadsText,
    RolloutPlan,
    SamplingParams,
    Stateful,
    Uneven,
)
from llmac.core.returns import segment_gae
from llmac.core.spans import span_values
from llmac.core.tree import Tree
from llmac.core.types import Finish, Prompt, Rollouts

from .exact_world import ExactWorld

LIMIT, END = 8, 0
SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=LIMIT)


class Untrained:
    """The part of an engine that a plan leaves alone."""

    policy_version = 3
    reuses_prefixes = True

    def __init__(self):
        self.asked = []

    def load_weights(self, weights, version):
        raise AssertionError("a plan does not train")

    sleep = wake = close = load_weights

    def generate(self, requests):
        self.asked.append(list(requests))
        return [self.siblings(r.prompt_ids[1:], r.params) for r in requests]

    def completion(self, tokens, ended):
        return Completion(
            token_ids=tuple(tokens),
            logprobs=tuple(-float(t) for t in tokens),
            finish=Finish.STOP if ended else Finish.LENGTH,
            policy_version=self.policy_version,
        )


class Scripted(Untrained):
    """Says what a table has for what it is asked to continue, one entry a sibling, cut at the length asked."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def siblings(self, before, params):
        entries = self.table[before]
        assert len(entries) == params.n
        return [
            self.completion(e[: params.max_new_tokens], END in e[: params.max_new_tokens])
            for e in entries
        ]


class Random(Untrained):
    """Draws from the seed of the request alone; token 0 ends a response."""

    def __init__(self, symbols=6):
        super().__init__()
        self.symbols = symbols

    def siblings(self, before, params):
        answers = []
        for sibling in range(params.n):
            generator = torch.Generator().manual_seed(params.seed + sibling)
            size = (params.max_new_tokens,)
            drawn = torch.randint(self.symbols, size, generator=generator).tolist()
            ended = END in drawn
            answers.append(
                self.completion(drawn[: drawn.index(END) + 1] if ended else drawn, ended)
            )
        return answers


class Prompts:
    """Prompts first, first + 1, ..., for ever, or the same few again and again."""

    def __init__(self, first=100, different=10**6, **columns):
        self.next, self.different, self.columns = first, different, columns

    def take(self, count):
        self.next += count
        names = (name % self.different for name in range(self.next - count, self.next))
        return [
            Prompt(id=str(name), token_ids=(name,), source=str(name), columns=self.columns)
            for name in names
        ]


def parity(trajectories):
    """1 for an even sum of tokens."""
    assert all(t.finish is not Finish.PAUSED and t.reward is None for t in trajectories)
    return [
        dataclasses.replace(t, reward=float(sum(t.response_ids) % 2 == 0)) for t in trajectories
    ]


def tree(*branching, **changes):
    fields = {"segment_tokens": 2, "prompts_per_step": 1, "sampling": SAMPLING, "keep": "all"}
    return Tree(branching=branching, **{**fields, **changes})


def grown(plan, engine, *, score=parity, seed=0, prompts=None, **options):
    rows, metrics = plan.rollout(engine, prompts or Prompts(), score, seed=seed, **options)
    return rows, {name: measure.value for name, measure in metrics.items()}


def own(row):
    return row.response_ids[row.fresh_from :]


def advantages(rows):
    batch = collate(rows, length_limit=LIMIT)
    rollouts = Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)
    values = span_values(rollouts)
    token = segment_gae(
        rollouts.rewards, values.at, values.starts, values.bootstrap, gamma=1.0, lam=0.0
    )
    return [token[i, row.fresh_from].item() for i, row in enumerate(rows)]


SMALL = {
    (): [[1, 2], [3, 0]],  # the second is a leaf above the last level
    (1, 2): [[4, 4, 4, 0], [5, 5, 5, 5, 5, 5, 5, 5, 5]],  # the second is cut at the limit
}


def test_a_tree_by_hand():
    engine, rewards = Scripted(SMALL), {(3, 0): 1.0, (1, 2, 4, 4, 4, 0): 0.5}
    scored = []

    def score(trajectories):
        scored.append([t.response_ids for t in trajectories])
        return [
            dataclasses.replace(t, reward=rewards.get(t.response_ids, 0.0)) for t in trajectories
        ]

    rows, metrics = grown(tree(2, 2), engine, score=score)
    long = (1, 2, *[5] * 6)
    assert scored == [[(1, 2, 4, 4, 4, 0), long, (3, 0)]]  # in one call
    assert [(r.response_ids, r.fresh_from, r.finish, r.reward) for r in rows] == [
        ((1, 2), 0, Finish.PAUSED, None),
        ((1, 2, 4, 4, 4, 0), 2, Finish.STOP, 0.5),
        (long, 2, Finish.LENGTH, 0.0),
        ((3, 0), 0, Finish.STOP, 1.0),
    ]
    # V(1 2) = (.5 + 0)/2 = .25, V(prompt) = (.25 + 1)/2 = .625
    assert [r.value_span for r in rows] == [(0.625, 0.25), (0.25, 0.5), (0.25, 0.0), (0.625, 1.0)]
    assert [r.sibling_std for r in rows] == [0.375, 0.25, 0.25, 0.375]
    assert advantages(rows) == [-0.375, 0.25, -0.25, 0.375]
    assert all(len(r.response_ids) == len(r.action_mask) == len(r.sampler_logprobs) for r in rows)
    assert rows[1].sampler_logprobs == (-1.0, -2.0, -4.0, -4.0, -4.0, 0.0)
    assert {(r.group, r.policy_version, r.age, all(r.action_mask)) for r in rows} == {
        (0, 3, 0, True)
    }
    # 2 + 2 tokens, then 4 + 6; of rows 3 + 7 + 9 + 3 tokens, prompts included, 1 + 2 + 4 + 6 + 2 distinct
    expected = {
        "sampled_tokens": 14,
        "edges": 4,
        "edges_dropped": 0,
        "edges_merged": 0,
        "edges_replayed": 0,
        "edges_waiting": 0,
        "edges_expired": 0,
        "edges_missing": 64 - 4,
        "leaves": 3,
        "tree_depth": 5 / 3,
        "distinct_tokens": 15 / 22,
    }
    lengths = {"mean": (6 + 8 + 2) / 3, "max": 8, "clip_ratio": 1 / 3}
    assert metrics == {f"rollout/{name}": value for name, value in expected.items()} | {
        f"response_length/{name}": value for name, value in lengths.items()
    } | {"reward/mean": 0.625}


def test_a_tree_is_the_plan_that_the_loop_and_build_expect():
    plan = tree(2, 2)
    assert isinstance(plan, RolloutPlan)
    assert isinstance(plan, Stateful)
    assert isinstance(plan, ReadsText)
    assert isinstance(plan, Uneven)
    assert plan.uneven
    assert plan.length_limit == LIMIT


def test_all_prompts_are_asked_about_level_by_level_with_seeds_that_never_meet():
    engine, plan = Random(symbols=30), tree(3, 2, 2, prompts_per_step=4)
    rows, _ = grown(plan, engine)
    assert len(engine.asked[0]) == 4
    assert len(engine.asked) == 3
    for level, (requests, limit) in enumerate(zip(engine.asked, (2, 2, 4), strict=True)):
        open_nodes = {
            (*r.prompt.token_ids, *r.response_ids)
            for r in rows
            if r.finish is Finish.PAUSED and len(r.response_ids) == 2 * level
        } or {(100,), (101,), (102,), (103,)}
        assert {r.prompt_ids for r in requests} == open_nodes
        for r in requests:
            assert dataclasses.replace(r.params, n=1, seed=None, max_new_tokens=LIMIT) == SAMPLING
            assert (r.params.n, r.params.max_new_tokens) == ((3, 2, 2)[level], limit)
    taken = [r.params.seed + i for level in engine.asked for r in level for i in range(r.params.n)]
    assert len(set(taken)) == len(taken)
    assert grown(tree(3, 2, 2, prompts_per_step=4), Random(symbols=30))[0] == rows
    assert grown(tree(3, 2, 2, prompts_per_step=4), Random(symbols=30), seed=1)[0] != rows


@pytest.mark.parametrize("segment", [1, 3, 4, 20])
def test_no_response_is_longer_than_the_limit_and_the_engine_is_asked_once_a_level(segment):
    engine = Random(symbols=40)
    rows, _ = grown(tree(2, 2, 2, 2, segment_tokens=segment), engine)
    assert len(engine.asked) == 4  # also where nothing goes on
    assert (engine.asked[-1] == []) == (3 * segment >= LIMIT)
    assert max(len(r.response_ids) for r in rows) == LIMIT
    for row in rows:
        assert (row.finish is Finish.STOP) == (row.response_ids[-1] == END)
        assert row.finish is not Finish.LENGTH or len(row.response_ids) == LIMIT
        assert len(own(row)) <= segment or row.fresh_from == 3 * segment


def test_an_engine_without_room_to_go_on_ends_the_response():
    rows, _ = grown(tree(2, 2, segment_tokens=3), Scripted({(): [[1, 2], [3, 0]]}))
    assert [(r.finish, r.reward) for r in rows] == [(Finish.LENGTH, 0.0), (Finish.STOP, 0.0)]


@pytest.mark.parametrize("seed", [0, 5])
def test_every_value_is_the_mean_of_those_behind_it_and_every_token_is_one_rows_own(seed):
    plan = tree(3, 2, 3, prompts_per_step=2)
    rows, metrics = grown(plan, Random(symbols=7), seed=seed)
    for group in (0, 1):
        edges = [r for r in rows if r.group == group]
        value = {r.response_ids: r.value_span[1] for r in edges}
        for parent, some in itertools.groupby(
            sorted(edges, key=lambda r: r.response_ids[: r.fresh_from]),
            key=lambda r: r.response_ids[: r.fresh_from],
        ):
            some = list(some)
            ends = torch.tensor([r.value_span[1] for r in some], dtype=torch.float64)
            assert {r.value_span[0] for r in some} == {some[0].value_span[0]}
            assert some[0].value_span[0] == pytest.approx(ends.mean().item())
            assert some[0].sibling_std == pytest.approx(ends.std(unbiased=False).item())
            assert parent == () or value[parent] == some[0].value_span[0]
        assert all(r.value_span[1] == r.reward for r in edges if r.finish is not Finish.PAUSED)
    assert metrics["rollout/sampled_tokens"] == sum(len(own(r)) for r in rows)
    assert metrics["rollout/leaves"] == sum(r.finish is not Finish.PAUSED for r in rows)


@pytest.mark.parametrize(("how", "baseline"), [("rloo", group_mean), ("leave_one_out", None)])
def test_one_level_is_a_flat_plan_with_a_group_baseline(how, baseline):
    flat = Flat(group_size=5, prompts_per_step=3, sampling=SAMPLING)
    expected, _ = flat.rollout(Random(), Prompts(), parity, seed=4)
    plan = tree(5, prompts_per_step=3, edge_advantage=how, segment_tokens=1)
    rows, _ = grown(plan, Random(), seed=4)
    bare = [dataclasses.replace(r, value_span=None, sibling_std=None) for r in rows]
    assert bare == expected
    rewards = torch.tensor([t.reward for t in expected])
    group = torch.tensor([t.group for t in expected])
    wanted = rewards - baseline(rewards, group)[0] if baseline else leave_one_out(rewards, group)
    assert torch.allclose(torch.tensor(advantages(rows)), wanted, atol=1e-6)


def letters(token_ids):
    return "".join("abcdefgh"[t] for t in token_ids)


class Writing(Untrained):
    """Writes a given text; like the real ones it sees stop strings in its own continuation only."""

    def __init__(self, text):
        super().__init__()
        self.tokens = ["abcdefgh".index(c) for c in text]

    def siblings(self, before, params):
        new = self.tokens[len(before) : len(before) + params.max_new_tokens]
        ends = [
            n for n in range(1, len(new) + 1) if any(s in letters(new[:n]) for s in params.stop)
        ]
        return [self.completion(new[: ends[0]] if ends else new, bool(ends))] * params.n


@pytest.mark.parametrize("segment", [1, 2, 3, 5])
def test_a_stop_string_across_segments_ends_the_response_where_it_would_without_them(segment):
    sampling = dataclasses.replace(SAMPLING, stop=("bcd",))
    plan = tree(1, 1, 1, 1, segment_tokens=segment, sampling=sampling, decode=letters)
    rows, metrics = grown(plan, Writing("fabcdffff"))
    assert letters(rows[-1].response_ids) == "fabcd"
    assert rows[-1].finish is Finish.STOP
    assert "".join(letters(own(r)) for r in rows) == "fabcd"
    assert metrics["rollout/sampled_tokens"] >= 5  # what was sampled behind it was sampled
    with pytest.raises(ValueError, match="may begin in one segment and end in the next"):
        grown(tree(1, 1, sampling=sampling), Writing("fabcd"))
    whole, _ = grown(tree(2, sampling=sampling), Writing("fabcdffff"))
    assert letters(whole[0].response_ids) == "fabcd"


def test_equal_segments_are_gone_on_from_once_and_count_as_often_as_they_were_sampled():
    table = {
        (): [[1, 2], [3, 3], [1, 2], [1, 0], [1, 0]],
        (1, 2): [[4, 0]] * 5,
        (3, 3): [[2, 0], [1, 0], [1, 0], [1, 0], [1, 0]],
    }
    engine = Scripted(table)
    rows, metrics = grown(tree(5, 5, merge_duplicates=True), engine, score=last_but_one)
    assert [r.prompt_ids[1:] for r in engine.asked[1]] == [(1, 2), (3, 3)]
    # V: 4, (2 + 4·1)/5 = 1.2, and 1, 1 of the leaves: (4 + 1.2 + 4 + 1 + 1)/5 = 2.24
    upper = [r for r in rows if not r.fresh_from]
    assert [r.response_ids for r in upper] == [(1, 2), (1, 2), (3, 3), (1, 0), (1, 0)]
    assert all(r.value_span[0] == pytest.approx(2.24) for r in upper)
    assert metrics["rollout/edges_merged"] == 1
    assert metrics["rollout/sampled_tokens"] == 10 + 20
    assert metrics["rollout/edges"] == len(rows) == 5 + 10
    apart, _ = grown(tree(5, 5), Scripted(table), score=last_but_one)
    assert apart[0].value_span == upper[0].value_span


def last_but_one(trajectories):
    """The token before the end."""
    return [dataclasses.replace(t, reward=float(t.response_ids[-2])) for t in trajectories]


def constant(trajectories):
    return [dataclasses.replace(t, reward=0.3) for t in trajectories]


def test_edges_with_nothing_to_say_are_dropped_but_one_where_no_other_is():
    everything, _ = grown(tree(3, 3, prompts_per_step=2), Random())
    rows, metrics = grown(tree(3, 3, prompts_per_step=2, keep="informative"), Random())
    assert rows == [r for r in everything if r.value_span[0] != r.value_span[1]]
    assert 0 < metrics["rollout/edges_dropped"] == len(everything) - len(rows)

    equal = tree(3, 3, prompts_per_step=2, keep="informative", replay_steps=4)
    rows, metrics = grown(equal, Random(), score=constant)
    assert len(rows) == 1
    assert own(rows[0]) == ()
    assert metrics["rollout/edges_dropped"] == metrics["rollout/edges"] > 1
    assert metrics["rollout/edges_waiting"] == 0


def test_lengths_are_of_all_leaves_whichever_edges_are_chosen():
    def lengths(**changes):
        _, metrics = grown(tree(4, 3, prompts_per_step=3, **changes), Random())
        return {name: x for name, x in metrics.items() if name.startswith("response_length/")}

    assert len(lengths()) == 3
    assert 0 < lengths()["response_length/clip_ratio"] < 1
    assert lengths() == lengths(edges_per_step=1) == lengths(keep="informative")


def test_edges_that_are_not_used_wait_and_are_used_once():
    plan = tree(4, 4, prompts_per_step=3, keep="informative", edges_per_prompt=5, replay_steps=2)
    prompts, steps, engine = Prompts(), [], Random(symbols=60)
    for step in range(6):
        engine.policy_version = step
        rows, metrics = grown(plan, engine, seed=step, prompts=prompts)
        steps.append((rows, metrics))
        assert max(Counter(r.prompt.id for r in rows).values()) <= 5
        assert all(r.age == step - r.policy_version <= 2 for r in rows)
        assert metrics["rollout/edges_replayed"] == sum(r.age > 0 for r in rows)
        # Of a tree together, numbered from 0 on.
        assert [r.group for r in rows] == sorted(r.group for r in rows)
        assert {r.group for r in rows} == set(range(len({r.prompt.id for r in rows})))
    used = [(r.prompt.id, r.response_ids, r.fresh_from) for rows, _ in steps for r in rows]
    assert len(set(used)) == len(used), "an edge was used twice"
    assert sum(m["rollout/edges_replayed"] for _, m in steps) > 10
    # What is kept is used, waits, or expires.
    flow = [m["rollout/edges"] - m["rollout/edges_dropped"] for _, m in steps]
    gone = [len(rows) + m["rollout/edges_expired"] for rows, m in steps]
    assert sum(flow) == sum(gone) + steps[-1][1]["rollout/edges_waiting"]
    ages = [[r.age for r in rows] for rows, _ in steps]
    assert any(some not in (sorted(some), sorted(some)[::-1]) for some in ages)  # mixed


def test_a_step_has_its_number_of_edges_the_youngest_first():
    plan = tree(4, 4, prompts_per_step=2, keep="all", edges_per_step=13, replay_steps=3)
    prompts = Prompts()
    for step in range(3):
        rows, metrics = grown(plan, Random(), seed=step, prompts=prompts)
        assert len(rows) == 13
        assert all(r.age == 0 for r in rows)
        assert metrics["rollout/edges_missing"] == 0
        assert metrics["rollout/edges_waiting"] <= 3 * 13  # more could not be used
    few = tree(2, prompts_per_step=1, keep="all", edges_per_step=5)
    for ranks, missing in ((1, 3), (2, 1)):
        rows, metrics = grown(few, Random(), sum_across=lambda x, ranks=ranks: ranks * x)
        assert (len(rows), metrics["rollout/edges_missing"]) == (2, missing)
    many, _ = grown(tree(9, 9, prompts_per_step=2, segment_tokens=1), Random(symbols=99))
    assert len(many) == 2 * 64  # of more than 160


def test_six_steps_are_three_a_restore_and_three(tmp_path):
    columns = {"answer": 3, "pair": (1, "a")}

    def plan():
        bounds = {"edges_per_step": 6, "edges_per_prompt": 2, "replay_steps": 2}
        return tree(3, 3, prompts_per_step=2, keep="informative", **bounds)

    def steps(plan, prompts, numbers):
        return [grown(plan, Random(), seed=n, prompts=prompts) for n in numbers]

    straight = steps(plan(), Prompts(**columns), range(6))
    before, prompts = plan(), Prompts(**columns)
    first = steps(before, prompts, range(3))
    torch.save(before.state(), tmp_path / "state.pt")
    steps(before, Prompts(**columns), range(2))  # what is saved stays
    after = plan()
    after.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    second = steps(after, Prompts(prompts.next, **columns), range(3, 6))
    assert first + second == straight
    assert second[0][1]["rollout/edges_replayed"] == 2
    for rows, _ in second:  # no new tree has the number of one that waits
        assert len({(r.group, r.prompt.id) for r in rows}) == len({r.group for r in rows})
    assert steps(plan(), Prompts(prompts.next, **columns), range(3, 6)) != second
    with pytest.raises(ValueError, match="column x of prompt 100 holds a object; an edge that"):
        grown(plan(), Random(), prompts=Prompts(x=object()))


def test_an_engine_that_does_not_reuse_prefixes_is_named_once_with_the_cost(caplog):
    class Forgetful(Random):
        reuses_prefixes = False

    engine, plan = Forgetful(symbols=50), tree(2, 2, segment_tokens=3)
    with caplog.at_level(logging.WARNING):
        for seed in (1, 2):
            grown(plan, engine, seed=seed)
        grown(tree(2, 2), Random())
        grown(tree(4), Forgetful())  # nothing is read twice
    (said,) = [record.getMessage() for record in caplog.records]
    reads = sum(len(r.prompt_ids) for r in engine.asked[1])
    assert said.startswith(f"Forgetful reads prompt and response anew at every branch: {reads} tok")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"branching": ()}, "branching is empty"),
        ({"branching": (2, 0, 3)}, "from the nodes of level 1 0 segments cannot be sampled"),
        ({"branching": (2, 1), "edge_advantage": "leave_one_out"}, "every number is at least 2"),
        ({"segment_tokens": 0}, "segment_tokens is at least 1; found 0"),
        ({"prompts_per_step": 0}, "prompts_per_step is at least 1; found 0"),
        ({"edges_per_step": 0}, "edges_per_step is at least 1; found 0"),
        ({"edges_per_prompt": 0}, "edges_per_prompt is at least 1; found 0"),
        ({"replay_steps": -1}, "replay_steps is at least 0; found -1"),
    ],
)
def test_trees_that_cannot_grow_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        tree(*fields.pop("branching", (2, 2)), **fields)


class World(Untrained):
    """Samples an enumerable world, segments and all."""

    def __init__(self, world):
        super().__init__()
        self.world, self.chance = world, world.logits.detach().softmax(-1).tolist()
        self.random = random.Random(0)

    def siblings(self, before, params):
        answers = []
        for _ in range(params.n):
            tokens = ()
            while len(tokens) < params.max_new_tokens and not self.world.ended(before + tokens):
                weights = self.chance[self.world.row[before + tokens]]
                tokens += tuple(self.random.choices(range(self.world.symbols), weights))
            answers.append(self.completion(tokens, self.world.ended(before + tokens)))
        return answers


@pytest.fixture(scope="module")
def world():
    return ExactWorld(
        symbols=3,
        horizon=4,
        reward=lambda tokens: (
            float(len(tokens) == 4 and sum(tokens) % 2 == 0) + 0.5 * (tokens == (2,))
        ),
        seed=1,
    )


@pytest.mark.parametrize(
    ("how", "factor", "merge"), [("leave_one_out", 1, True), ("rloo", 2 / 3, False)]
)
def test_an_edge_is_worth_what_it_is_in_expectation(world, how, factor, merge):
    # Three siblings: an advantage whose baseline contains the edge is 2/3 of the true one.
    rows = world_tree(world, 3, 2, trees=400, edge_advantage=how, merge_duplicates=merge)
    for token in range(3):
        exact = world.action_value((), token) - world.value(())
        mean, se = mean_of([r for r in rows if r.response_ids == (token,)])
        assert se < 0.03
        assert abs(mean - factor * exact) < 4 * se
        if token == 2:  # the noise would not hide the factor
            assert abs(exact) / 3 > 5 * se


def world_tree(world, *branching, trees, **changes):
    sampling = dataclasses.replace(SAMPLING, max_new_tokens=4)
    fields = {"segment_tokens": 1, "prompts_per_step": trees, "sampling": sampling}
    return grown(tree(*branching, **fields, **changes), World(world), score=rewarded(world))[0]


def rewarded(world):
    def score(trajectories):
        return [
            dataclasses.replace(
                t,
                reward=sum(
                    world.reward(t.response_ids[: n + 1]) for n in range(len(t.response_ids))
                ),
            )
            for t in trajectories
        ]

    return score


def mean_of(edges):
    """Mean advantage of the edges and its standard error; edges of a tree are not independent."""
    found = torch.tensor([r.value_span[1] - r.value_span[0] for r in edges], dtype=torch.float64)
    _, tree_of = torch.tensor([r.group for r in edges]).unique(return_inverse=True)
    sums = torch.zeros(len(found), dtype=torch.float64).index_add(0, tree_of, found - found.mean())
    return found.mean().item(), sums.square().sum().sqrt().item() / len(found)


def test_the_noise_of_a_node_falls_as_one_over_its_leaves(world):
    def variance(below):
        rows = world_tree(world, 3, below, trees=200)
        found = [r.value_span[1] for r in rows if r.response_ids == (0,)]
        return torch.tensor(found, dtype=torch.float64).var().item(), len(found)

    (one, n), (four, m) = variance(1), variance(4)
    # The relative error of a variance is about √(2/n).
    assert one / four == pytest.approx(4, rel=3 * math.sqrt(2 / n + 2 / m))


def test_a_tree_in_which_nothing_differs_says_so_once_and_remembers_nothing(caplog):
    def all_right(trajectories):
        return [dataclasses.replace(t, reward=1.0) for t in trajectories]

    plan = tree(2, 2, keep="informative", replay_steps=2)
    for seed in (1, 2):
        rows, _ = grown(plan, Random(), score=all_right, seed=seed)
        assert own(rows[0]) == ()
    assert sum("leaves, rewards 1)" in r.getMessage() for r in caplog.records) == 1
    assert plan.state() == {}
