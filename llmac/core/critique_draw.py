"""Which answers of a step are criticised: half of them right, and as many as were asked for."""

import random
from collections.abc import Sequence


def evenly(right: Sequence[bool], count: int, *, seed: int) -> list[int]:
    """Which answers to take, half of them right and half wrong as far as there are so many.

    Args:
        right: of each answer whether it is.
        count: answers to take, at most all.
        seed: who of the right and who of the wrong ones is drawn from it.

    Returns:
        Places, ascending.

    >>> evenly([True, False, True], 2, seed=0) in ([0, 1], [1, 2])
    True
    """
    order = list(range(len(right)))
    random.Random(f"evenly-{seed}").shuffle(order)
    good, bad = [i for i in order if right[i]], [i for i in order if not right[i]]
    from_good = min(len(good), max(count // 2, count - len(bad)))
    return sorted([*good[:from_good], *bad[: count - from_good]])


def filled_up(places: Sequence[int], count: int) -> list[int]:
    """The first ones again where there are too few: ranks learn from equally many.

    Args:
        places: at least one.
        count: how many there are to be.

    >>> filled_up([3, 7], 5)
    [3, 7, 3, 7, 3]
    """
    return [places[i % len(places)] for i in range(count)]
