"""Rows that share prefixes as a step's rows do: groups, a tree, continuations from cut points. Tokens are random."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmac.core.prefixes import distinct_tokens
from llmac.core.types import Finish, Prompt, Trajectory

VOCABULARY = 2048

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One step's rows."""

    title: str
    rows: tuple[Trajectory, ...]

    @property
    def row_tokens(self) -> int:
        """Of all rows, what they share counted for each."""
        return sum(map(len, map(ids, self.rows)))

    @property
    def distinct(self) -> int:
        """Nodes of the trie of all rows."""
        return distinct_tokens([ids(row) for row in self.rows])

    @property
    def asked(self) -> int:
        """Those of them whose log-probability is asked for."""
        return self.distinct - distinct_tokens([row.prompt.token_ids for row in self.rows])


def ids(row: Trajectory) -> Ids:
    """Prompt and response."""
    return row.prompt.token_ids + row.response_ids


def groups(
    *, prompts: int = 4, siblings: int = 8, prompt: int = 256, response: int = 64
) -> Workload:
    """GRPO: independent responses to each prompt."""
    draw = random.Random(0)
    rows: list[Trajectory] = []
    for group in range(prompts):
        question = _prompt(group, prompt, draw)
        rows += [_row(question, own) for own in _apart(siblings, response, draw)]
    return Workload(
        title=f"{prompts} groups of {siblings} x ({prompt} + {response})", rows=tuple(rows)
    )


def tree(*, branching: Sequence[int] = (6, 6, 6), segment: int = 30, prompt: int = 100) -> Workload:
    """SPO-tree: each edge is a row, its prefix repeated, and trained on from where it begins."""
    draw = random.Random(1)
    question = _prompt(0, prompt, draw)
    level: list[Ids] = [()]
    rows: list[Trajectory] = []
    for depth, children in enumerate(branching, start=1):
        level = [prefix + own for prefix in level for own in _apart(children, segment, draw)]
        rows += [_row(question, whole, fresh_from=(depth - 1) * segment) for whole in level]
    name = "-".join(map(str, branching))
    return Workload(
        title=f"tree {name}, {segment} tokens a segment, prompt {prompt}", rows=tuple(rows)
    )


def chain(
    *,
    responses: int = 2,
    cuts: int = 5,
    continuations: int = 9,
    prompt: int = 100,
    response: int = 120,
) -> Workload:
    """SPO-chain with its continuations as training rows: some from each cut point of each response.

    A continuation brings the response to between three quarters and five quarters of its length.
    """
    draw = random.Random(2)
    question = _prompt(0, prompt, draw)
    rows: list[Trajectory] = []
    for whole in _apart(responses, response, draw):
        rows.append(_row(question, whole))
        for cut in range(1, cuts + 1):
            at = cut * response // (cuts + 1)
            for first in draw.sample(
                [t for t in range(VOCABULARY) if t != whole[at]], continuations
            ):
                length = max(at + 2, draw.randint(3 * response // 4, 5 * response // 4))
                own = (first, *draw.choices(range(VOCABULARY), k=length - at - 1))
                rows.append(_row(question, whole[:at] + own, fresh_from=at))
    return Workload(
        title=f"chain K={continuations}: {responses} x {response} with {cuts} cuts, prompt {prompt}",
        rows=tuple(rows),
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {"groups": groups, "tree": tree, "chain": chain}


def unshared(workload: Workload) -> tuple[Trajectory, ...]:
    """As much as there is to compute in a workload, of rows that share nothing.

    Rows of its lengths, at random, until their tokens are its distinct tokens (the last row is cut); of each row as
    large a part is asked for as of the distinct tokens.
    """
    draw = random.Random(3)
    left, part = workload.distinct, workload.asked / workload.distinct
    lengths = [len(ids(row)) for row in workload.rows]
    rows: list[Trajectory] = []
    while left:
        length = min(left, draw.choice(lengths))
        # A log-probability needs a token before it.
        response = min(length - 1, round(part * length))
        question = _prompt(len(rows), length - response, draw)
        rows.append(_row(question, tuple(draw.choices(range(VOCABULARY), k=response))))
        left -= length
    return tuple(rows)


def _prompt(number: int, length: int, draw: random.Random) -> Prompt:
    tokens = tuple(draw.choices(range(VOCABULARY), k=length))
    return Prompt(id=f"p{number}", token_ids=tokens, source="")


def _apart(count: int, length: int, draw: random.Random) -> list[Ids]:
    """Siblings: their first tokens differ, so that they share nothing by chance."""
    firsts = draw.sample(range(VOCABULARY), count)
    return [(first, *draw.choices(range(VOCABULARY), k=length - 1)) for first in firsts]


def _row(question: Prompt, response: Ids, *, fresh_from: int = 0) -> Trajectory:
    return Trajectory(
        prompt=question,
        response_ids=response,
        action_mask=tuple(itertools.repeat(True, len(response))),
        sampler_logprobs=tuple(itertools.repeat(0.0, len(response))),
        finish=Finish.STOP,
        group=0,
        reward=0.0,
        fresh_from=fresh_from,
    )
