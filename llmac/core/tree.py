"""Responses as a tree: they branch every few tokens, and what follows a branch says what it was worth.

Rollouts of SPO-tree (Segment Policy Optimization, arXiv:2505.23564).
"""

import dataclasses
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from llmac.core.edges import EdgeAdvantage, informative
from llmac.core.growing import continued, refuse_blind_stops
from llmac.core.measures import Max, Mean, Measure, Sum
from llmac.core.nodes import Node, depths, edges, leaves, merged
from llmac.core.plain_trajectory import refuse_what_cannot_be_saved
from llmac.core.plans import ask, request_seed
from llmac.core.prefixes import distinct_tokens
from llmac.core.protocols import PromptSource, Request, RolloutEngine, SamplingParams, Scorer
from llmac.core.replay import Drawn, ReplayBuffer
from llmac.core.types import AllSum, Finish, Prompt, Trajectory, identity

logger = logging.getLogger(__name__)

EDGES_PER_PROMPT = 64
"""Rows of a step for each prompt unless a plan says otherwise: 1,024 of 16 prompts in SPO's GSM8K runs."""


@dataclass(slots=True)
class _Sampling:
    """What a step's sampling cost."""

    tokens: int = 0
    merged: int = 0
    read_again: int = 0
    """Tokens of prompt and response that were in an earlier request of the step."""


@dataclass(kw_only=True)
class Tree:
    """`branching[0]` segments from each prompt, `branching[1]` from the end of each of those, ...

    A segment has at most `segment_tokens` tokens, one of the last level as many as the length limit
    leaves. A response that ends earlier, or is cut at the limit, is a leaf wherever it is. Leaves
    are scored, and upwards

        V(node) = mean of V over its children

    so that siblings are each other's Monte-Carlo samples and no continuation is thrown away. Each
    segment is an edge, and each edge one row: prompt, the tokens before it, its own from
    `fresh_from` on, and the values of both ends (`value_span`). Rows that are not leaves are
    `PAUSED` and have no reward. All rows of a tree have one group number.

    Edges with nothing to say are dropped (`keep`), at most `edges_per_prompt` of a prompt and
    `edges_per_step` in all are returned, and others wait up to `replay_steps` steps
    (`core.replay.ReplayBuffer`, with a checkpoint). A rank always returns a row: where it has no
    edge to learn from, one that has no tokens of its own.

    With one level this is `Flat`, its rows carrying the group's mean as value.
    """

    uneven: ClassVar[bool] = True
    """How many edges have something to say differs from rank to rank."""

    branching: tuple[int, ...]
    """Segments sampled from each node, one number a level."""
    segment_tokens: int
    """Most tokens of a segment, but for the last level."""
    prompts_per_step: int
    """Trees this rank grows in a step."""
    sampling: SamplingParams
    """How to sample; `max_new_tokens` is the length limit of a whole response. `n` and `seed` are
    set by the plan."""
    edge_advantage: EdgeAdvantage = "rloo"
    """What V(start) of an edge is: `core.edges.baselines`."""
    keep: Literal["informative", "all"] = "informative"
    """informative: edges of `core.edges.informative`; all: all."""
    edges_per_step: int | None = None
    """Most rows of a step, over all ranks; each contributes its part, rounded up. None:
    `EDGES_PER_PROMPT` for each prompt of the step."""
    edges_per_prompt: int | None = None
    """Most rows of a step that answer the same prompt; None: no such bound."""
    replay_steps: int = 0
    """Later steps in which an edge that was not used may be; 0: it is forgotten."""
    merge_duplicates: bool = False
    """Whether equal segments from one node, that go on, are gone on from once. V counts each of
    them, and each is an edge; but they share the samples behind them."""
    decode: Callable[[Sequence[int]], str] | None = field(default=None, compare=False)
    """Text of token ids, special tokens included. Needed for stop strings: an engine is asked only
    to continue, and cannot see one that begins in an earlier segment."""
    _buffer: ReplayBuffer = field(init=False, repr=False, compare=False)
    _trees: int = field(default=0, init=False, repr=False, compare=False)
    """Trees grown so far: those that wait keep their number."""
    _warned: bool = field(default=False, init=False, repr=False, compare=False)
    _silent: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse trees that cannot grow, and bounds that leave nothing."""
        if not self.branching:
            raise ValueError(
                "branching is empty; it has one number a level, for example (6, 6, 6): 6 segments "
                "from the prompt, 6 from the end of each, and 6 from the end of each of those"
            )
        if min(self.branching) < 1:
            level = next(level for level, number in enumerate(self.branching) if number < 1)
            raise ValueError(
                f"branching is {self.branching}, and from the nodes of level {level} "
                f"{self.branching[level]} segments cannot be sampled; every number is at least 1: "
                "leave a level out to have fewer"
            )
        if self.edge_advantage == "leave_one_out" and min(self.branching) < 2:
            raise ValueError(
                f"branching is {self.branching}, and leave_one_out compares a segment with the "
                "others that begin where it does; every number is at least 2 then"
            )
        for name in ("segment_tokens", "prompts_per_step", "edges_per_step", "edges_per_prompt"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} is at least 1; found {count}")
        self._buffer = ReplayBuffer(steps=self.replay_steps)

    @property
    def length_limit(self) -> int:
        """Length of a whole response, tokens, at which sampling is cut."""
        return self.sampling.max_new_tokens

    def rollout(
        self,
        engine: RolloutEngine,
        prompts: PromptSource,
        score: Scorer,
        *,
        seed: int,
        sum_across: AllSum = identity,
    ) -> tuple[list[Trajectory], dict[str, Measure]]:
        """Grow `prompts_per_step` trees, score their leaves, and choose edges of them and of earlier ones.

        The engine is asked once a level, with an empty list where nothing goes on: ranks may share
        it. Leaves are scored in one call, each once, however little of the tree is left to it; the
        mean reward is of responses all the same.

        Args:
            engine: samples.
            prompts: this rank's share of the prompts.
            score: sets the rewards of the leaves.
            seed: of this step and rank; same seed, state, weights and prompts: same rows.
            sum_across: sums over ranks; used once, to count them.

        Returns:
            trajectories: edges, those of a tree adjacent; with replay, trees in random order.
            metrics:
                `rollout/sampled_tokens`: all tokens sampled for the trees of this step;
                `rollout/edges`: edges of these trees; `rollout/edges_dropped`: with nothing to say;
                `rollout/edges_merged`: whose continuations are those of an equal edge;
                `rollout/edges_replayed`: rows that earlier steps sampled;
                `rollout/edges_waiting`: edges that later steps may use;
                `rollout/edges_expired`: edges that no step will use any more;
                `rollout/edges_missing`: rows fewer than `edges_per_step`;
                `rollout/leaves`; `rollout/tree_depth`: mean segments from the prompt to a leaf;
                `reward/mean`: mean over prompts of V, the expected reward of a response;
                `rollout/distinct_tokens`: of the tokens of all rows, prompts included, those that
                are left when what rows of a tree share from the beginning on counts once;
                `response_length/*`: of all leaves, chosen as rows or not.

        Raises:
            ValueError: the engine returned another number of responses, stop strings without
                `decode`, or with replay a prompt that cannot be saved.
        """
        roots = [self._root(prompt) for prompt in prompts.take(self.prompts_per_step)]
        cost = self._grow(engine, roots, seed)
        ends = [leaf for root in roots for leaf in leaves(root)]
        for leaf, row in zip(ends, score([leaf.row for leaf in ends]), strict=True):
            assert row.reward is not None, "a scorer sets rewards"
            leaf.row, leaf.value = row, row.reward
        grown = [edge for root in roots for edge in edges(root, how=self.edge_advantage)]
        kept = self._kept(grown)
        drawn = self._buffer.draw(
            kept,
            count=self._share(sum_across),
            per_prompt=self.edges_per_prompt,
            seed=seed,
        )
        if not kept:
            self._warn_of_silence(ends)
        rows = self._in_order(drawn.rows or [_without_own(grown[0])], seed)
        return rows, self._metrics(roots, cost, grown, kept, drawn, rows)

    def state(self) -> dict[str, Any]:
        """The edges that wait, and how many trees were grown; nothing if none waits."""
        if not len(self._buffer):
            return {}
        return {"buffer": self._buffer.state(), "trees": self._trees}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._buffer.restore(state["buffer"])
        self._trees = state["trees"]

    def _root(self, prompt: Prompt) -> Node:
        if self.replay_steps:
            refuse_what_cannot_be_saved(prompt, kept="an edge that waits")
        row = Trajectory(
            prompt=prompt,
            response_ids=(),
            action_mask=(),
            sampler_logprobs=(),
            finish=Finish.PAUSED,
            group=self._trees,
        )
        self._trees += 1
        return Node(row)

    def _grow(self, engine: RolloutEngine, roots: Sequence[Node], seed: int) -> _Sampling:
        """Level by level over all trees."""
        if len(self.branching) > 1:
            refuse_blind_stops(self.sampling, self.decode, part="segment")
        cost, growing, asked = _Sampling(), list(roots), 0
        for level, number in enumerate(self.branching):
            requests = [
                self._request(node.row, level, request_seed(seed, asked + index * number))
                for index, node in enumerate(growing)
            ]
            # The engine derives the seeds of siblings from that of their request.
            asked += number * len(requests)
            answers = ask(engine, requests)
            for node, request, completions in zip(growing, requests, answers, strict=True):
                node.children = [
                    Node(
                        continued(
                            node.row,
                            completion,
                            asked=request.params.max_new_tokens,
                            sampling=self.sampling,
                            decode=self.decode,
                        )
                    )
                    for completion in completions
                ]
                cost.tokens += sum(len(completion.token_ids) for completion in completions)
                cost.read_again += len(request.prompt_ids) if level else 0
                if self.merge_duplicates:
                    node.children = merged(node.children)
                    cost.merged += number - len(node.children)
            growing = [
                child
                for node in growing
                for child in node.children
                if child.row.finish is Finish.PAUSED
            ]
        self._warn_of_reading_again(engine, cost)
        return cost

    def _request(self, row: Trajectory, level: int, seed: int) -> Request:
        room = self.length_limit - len(row.response_ids)
        last = level == len(self.branching) - 1
        return Request(
            prompt_ids=(*row.prompt.token_ids, *row.response_ids),
            params=dataclasses.replace(
                self.sampling,
                n=self.branching[level],
                max_new_tokens=room if last else min(self.segment_tokens, room),
                seed=seed,
            ),
        )

    def _share(self, sum_across: AllSum) -> int:
        """Most rows of this rank. Collective."""
        ranks = int(sum_across(torch.tensor(1)))
        if self.edges_per_step is None:
            return EDGES_PER_PROMPT * self.prompts_per_step
        return -(-self.edges_per_step // ranks)

    def _kept(self, grown: Sequence[Trajectory]) -> list[Trajectory]:
        """Edges with something to say."""
        if self.keep == "all":
            return list(grown)
        spans = torch.tensor([edge.value_span for edge in grown], dtype=torch.float64)
        speaks = informative(spans[:, 0], spans[:, 1])
        return [edge for edge, kept in zip(grown, speaks, strict=True) if kept]

    def _in_order(self, rows: Sequence[Trajectory], seed: int) -> list[Trajectory]:
        """Trees together and numbered from 0; if some are replayed, these are not all at the end."""
        trees = sorted({row.group for row in rows})
        if any(row.age for row in rows):
            random.Random(f"trees-{seed}").shuffle(trees)
        number = {tree: place for place, tree in enumerate(trees)}
        return sorted(
            (dataclasses.replace(row, group=number[row.group]) for row in rows),
            key=lambda row: row.group,
        )

    def _metrics(
        self,
        roots: Sequence[Node],
        cost: _Sampling,
        grown: Sequence[Trajectory],
        kept: Sequence[Trajectory],
        drawn: Drawn,
        rows: Sequence[Trajectory],
    ) -> dict[str, Measure]:
        deep = [depth for root in roots for depth in depths(root)]
        ends = [leaf.row for root in roots for leaf in leaves(root)]
        lengths, count = [len(row.response_ids) for row in ends], float(len(ends))
        cut = sum(row.finish is Finish.LENGTH for row in ends)
        # The number of the tree before its first token: trees share nothing.
        paths = [(row.group, *row.prompt.token_ids, *row.response_ids) for row in rows]
        return {
            "rollout/sampled_tokens": Sum(float(cost.tokens)),
            "rollout/edges": Sum(float(len(grown))),
            "rollout/edges_dropped": Sum(float(len(grown) - len(kept))),
            "rollout/edges_merged": Sum(float(cost.merged)),
            "rollout/edges_replayed": Sum(float(sum(row.age > 0 for row in rows))),
            "rollout/edges_waiting": Sum(float(len(self._buffer))),
            "rollout/edges_expired": Sum(float(drawn.expired)),
            "rollout/edges_missing": Sum(float(drawn.missing)),
            "rollout/leaves": Sum(count),
            "rollout/tree_depth": Mean(float(sum(deep)), count),
            "response_length/mean": Mean(float(sum(lengths)), count),
            "response_length/max": Max(float(max(lengths))),
            "response_length/clip_ratio": Mean(float(cut), count),
            "reward/mean": Mean(sum(root.value for root in roots), float(len(roots))),
            "rollout/distinct_tokens": Mean(
                float(distinct_tokens(paths) - len({row.group for row in rows})),
                float(sum(len(path) - 1 for path in paths)),
            ),
        }

    def _warn_of_silence(self, ends: Sequence[Node]) -> None:
        if self._silent:
            return
        self._silent = True
        rewards = sorted({leaf.value for leaf in ends})
        logger.warning(
            "no edge of this step's trees is worth more at one end than at the other (%d leaves, rewards %s), so that "
            "nothing is learned from them. Said once; rollout/edges_dropped counts them. If it lasts: is the task out "
            "of reach, or solved? do levels branch? look at reward/* and the sampled completions",
            len(ends),
            ", ".join(f"{reward:g}" for reward in rewards[:5]),
        )

    def _warn_of_reading_again(self, engine: RolloutEngine, cost: _Sampling) -> None:
        # An optional part of what an engine says of itself: one that does not, is not trusted with it.
        reuses = getattr(engine, "reuses_prefixes", False)
        if reuses or self._warned or not cost.read_again:
            return
        self._warned = True
        logger.warning(
            "%s reads prompt and response anew at every branch: %d tokens read again to sample %d "
            "(%.1f for each) in this step; a tree is cheap on an engine that reuses prefixes",
            type(engine).__name__,
            cost.read_again,
            cost.tokens,
            cost.read_again / max(cost.tokens, 1),
        )


def _without_own(row: Trajectory) -> Trajectory:
    """The same row with nothing to train on."""
    return dataclasses.replace(row, fresh_from=len(row.response_ids))
