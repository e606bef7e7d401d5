"""Nodes of a tree of responses: its leaves, and its edges as rows with the values of both ends."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from llmac.core.edges import EdgeAdvantage, baselines, mean_and_std
from llmac.core.types import Finish, Trajectory


@dataclass(slots=True)
class Node:
    """The end of a segment, and what was sampled from there."""

    row: Trajectory
    """The response up to here; `fresh_from` is where the segment begins."""
    copies: int = 1
    """How many of its parent's segments are this one."""
    children: list["Node"] = field(default_factory=list["Node"])
    """None: a leaf."""
    value: float = math.nan
    """V: of a leaf, its reward; of others, the mean of their children's, set by `edges`."""


def merged(children: Sequence[Node]) -> list[Node]:
    """Equal segments that go on, once each with the number of its copies; others as they are."""
    first: dict[tuple[int, ...], Node] = {}
    distinct: list[Node] = []
    for child in children:
        tokens, goes_on = child.row.response_ids, child.row.finish is Finish.PAUSED
        if goes_on and tokens in first:
            first[tokens].copies += 1
            continue
        if goes_on:
            first[tokens] = child
        distinct.append(child)
    return distinct


def leaves(root: Node) -> Iterator[Node]:
    """Those below a node, from left to right."""
    for child in root.children:
        yield from leaves(child) if child.children else (child,)


def depths(root: Node, *, above: int = 0) -> Iterator[int]:
    """Segments from the root to each of `leaves`.

    Args:
        root: where counting begins.
        above: segments that lie before it.
    """
    for child in root.children:
        yield from depths(child, above=above + 1) if child.children else (above + 1,)


def edges(root: Node, *, how: EdgeAdvantage) -> list[Trajectory]:
    """The segments below a node as rows, depth first, a segment that has copies as often.

    Sets the values of the node and of all below it that are not leaves.

    Args:
        root: whose leaves have their values.
        how: what V(start) of an edge is.

    Returns:
        Rows with `value_span` and `sibling_std`.
    """
    below = [edges(child, how=how) if child.children else [] for child in root.children]
    values = torch.tensor([child.value for child in root.children], dtype=torch.float64)
    copies = torch.tensor([child.copies for child in root.children])
    mean, std = mean_and_std(values, copies)
    root.value = mean.item()
    rows: list[Trajectory] = []
    starts = baselines(values, copies, how=how)
    for child, start, later in zip(root.children, starts, below, strict=True):
        span = (start.item(), child.value)
        row = dataclasses.replace(child.row, value_span=span, sibling_std=std.item())
        rows += [row] * child.copies + later
    return rows
