"""Even loads: which rank learns from which groups, when what was sampled differs from rank to rank."""

from collections.abc import Sequence

SLACK = 0.01
"""Evener by less than this fraction of the largest load is not worth sending more groups for."""

Place = tuple[int, int]
"""(rank, position among the groups of that rank)"""


def imbalance(loads: Sequence[int]) -> float:
    """Largest load over the mean one: ranks wait for the slowest, so a step takes that much longer than it could.

    Args:
        loads: of each rank.

    >>> imbalance([30, 10])
    1.5
    """
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def destinations(loads: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rank that each group goes to so that ranks are loaded evenly; most groups stay where that is as good.

    Of three divisions, the first whose largest load is within `SLACK` of the best of them:

    1. as sampled;
    2. groups stay, largest first, while their rank is below the mean load, the others are dealt;
    3. all are dealt.

    Dealt is, largest first, each to the rank with the least so far: longest processing time first. Of
    R ranks none then has more than 4/3 - 1/(3R) times the least possible (Graham 1969, SIAM Journal
    on Applied Mathematics 17(2)). The largest load never grows; a rank that had a group has one after.

    Args:
        loads: of each group (at least 1) of each rank, in the order of ranks.

    Returns:
        Ranks in the shape of `loads`: the same on all ranks, if their arguments are.

    >>> destinations([[50, 40, 5], [15]])
    [[0, 1, 0], [1]]
    """
    mean = sum(map(sum, loads)) / len(loads)
    divisions = [_as_sampled(loads), _dealt(loads, stay_below=mean), _dealt(loads, stay_below=None)]
    worst = [max(rank_loads(loads, division)) for division in divisions]
    good = (1 + SLACK) * min(worst)
    return next(d for d, largest in zip(divisions, worst, strict=True) if largest <= good)


def rank_loads(loads: Sequence[Sequence[int]], to: Sequence[Sequence[int]]) -> list[int]:
    """What each rank has to do when its groups have gone where they go.

    Args:
        loads: of each group of each rank.
        to: its destination.

    >>> rank_loads([[5, 4], [1]], [[0, 1], [1]])
    [5, 5]
    """
    held = [0] * len(loads)
    for own, targets in zip(loads, to, strict=True):
        for load, rank in zip(own, targets, strict=True):
            held[rank] += load
    return held


def _as_sampled(loads: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[rank] * len(own) for rank, own in enumerate(loads)]


def _dealt(loads: Sequence[Sequence[int]], *, stay_below: float | None) -> list[list[int]]:
    to = _as_sampled(loads)
    held = [0] * len(loads)
    dealt: list[Place] = []
    places = [(rank, at) for rank, own in enumerate(loads) for at in range(len(own))]
    for rank, at in sorted(places, key=lambda place: -loads[place[0]][place[1]]):
        # The largest of a rank stays, however large: moving it only moves the problem.
        if stay_below is not None and (
            not held[rank] or held[rank] + loads[rank][at] <= stay_below
        ):
            held[rank] += loads[rank][at]
        else:
            dealt.append((rank, at))
    for rank, at in dealt:
        least = min(range(len(held)), key=lambda r: (held[r], r != rank))
        to[rank][at] = least
        held[least] += loads[rank][at]
    return to
