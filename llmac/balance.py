"""Whole groups go from ranks with much to do to ranks with little."""

import dataclasses
from collections.abc import Sequence

from llmac.core.balance import destinations, imbalance, rank_loads
from llmac.core.measures import Last, Metrics
from llmac.core.prefixes import distinct_tokens
from llmac.core.protocols import RolloutPlan, Uneven
from llmac.core.types import Trajectory
from llmac.runtime.links import Ranks

Group = list[Trajectory]


def balanced(
    trajectories: Sequence[Trajectory], plan: RolloutPlan, ranks: Ranks
) -> tuple[list[Trajectory], Metrics]:
    """The rows this rank learns from. Collective; in one process they are those it sampled.

    A rank's load is its number of distinct tokens: what the siblings of a group share from the
    beginning on counts once. Where the plan is `Uneven`, groups move until loads are as even as
    whole groups allow (`core.balance.destinations`). Only what moves is sent: a pickle of about 14
    bytes a token of each moving row, which every rank receives and all but one drop.

    Args:
        trajectories: what this rank sampled.
        plan: what sampled them.
        ranks: the process group.

    Returns:
        trajectories: those that stay, in their order, then those that came, their groups numbered on.
        metrics: none in one process; else
            `rollout/token_imbalance`: largest load of a rank over the mean;
            `rollout/token_imbalance_sampled`: the same before groups moved, if the plan is uneven.
    """
    if ranks.world_size == 1:
        return list(trajectories), {}
    groups = _groups(trajectories)
    loads = ranks.gather([distinct_tokens(_tokens(group)) for group in groups])
    sampled = imbalance([sum(own) for own in loads])
    if not (isinstance(plan, Uneven) and plan.uneven):
        return list(trajectories), {"rollout/token_imbalance": Last(sampled)}
    to = destinations(loads)
    metrics = {
        "rollout/token_imbalance": Last(imbalance(rank_loads(loads, to))),
        "rollout/token_imbalance_sampled": Last(sampled),
    }
    if all(set(targets) <= {rank} for rank, targets in enumerate(to)):
        return list(trajectories), metrics
    return _exchanged(trajectories, groups, to[ranks.rank], ranks), metrics


def _exchanged(
    trajectories: Sequence[Trajectory], groups: Sequence[Group], to: Sequence[int], ranks: Ranks
) -> list[Trajectory]:
    """This rank's rows when its groups are where `to` says."""
    leaving = [(rank, group) for rank, group in zip(to, groups, strict=True) if rank != ranks.rank]
    gone = {group[0].group for _, group in leaving}
    stay = [t for t in trajectories if t.group not in gone]
    came = [group for sent in ranks.gather(leaving) for rank, group in sent if rank == ranks.rank]
    first = 1 + max((t.group for t in trajectories), default=-1)
    return stay + [
        dataclasses.replace(t, group=number)
        for number, group in enumerate(came, start=first)
        for t in group
    ]


def _groups(trajectories: Sequence[Trajectory]) -> list[Group]:
    """In the order in which they begin; their rows need not be adjacent."""
    groups: dict[int, Group] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group, []).append(trajectory)
    return list(groups.values())


def _tokens(group: Group) -> list[tuple[int, ...]]:
    return [t.prompt.token_ids + t.response_ids for t in group]
