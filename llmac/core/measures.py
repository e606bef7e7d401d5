"""Numbers that know how to be combined over micro-batches, minibatches and ranks.

A mean of means is wrong whenever the parts differ in size, so a metric is carried as what adds up.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Number = int | float | Tensor


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean, carried as `total / weight`; combining adds both.

    >>> (Mean(6.0, 2.0) + Mean(0.0, 1.0)).value
    2.0
    """

    total: Number
    weight: Number = 1.0

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        """The mean; 0 when nothing was weighed."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else 0.0


@dataclass(frozen=True, slots=True)
class Sum:
    """A count or an amount; combining adds.

    >>> (Sum(2.0) + Sum(3.0)).value
    5.0
    """

    total: Number

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.total + other.total)

    @property
    def value(self) -> float:
        """The amount."""
        return float(self.total)


@dataclass(frozen=True, slots=True)
class Max:
    """The largest seen; combining takes the larger, and NaN over any number.

    >>> (Max(2.0) + Max(3.0)).value
    3.0
    """

    largest: Number

    def __add__(self, other: "Max") -> "Max":
        mine, theirs = float(self.largest), float(other.largest)
        # max(1.0, nan) is 1.0 and max(nan, 1.0) is nan: a NaN must not depend on the order of ranks.
        return Max(mine if math.isnan(mine) or mine >= theirs else theirs)

    @property
    def value(self) -> float:
        """The largest."""
        return float(self.largest)


@dataclass(frozen=True, slots=True)
class Last:
    """A state or an already global number; combining keeps the later one.

    >>> (Last(2.0) + Last(3.0)).value
    3.0
    """

    latest: Number

    def __add__(self, other: "Last") -> "Last":
        return other

    @property
    def value(self) -> float:
        """The latest."""
        return float(self.latest)


Measure = Mean | Sum | Max | Last
Metrics = Mapping[str, Measure]


def combine(*parts: Metrics) -> dict[str, Measure]:
    """Combine metrics of the same names in the way each one reduces; later parts are later in time.

    >>> combine({"a": Sum(1.0)}, {"a": Sum(2.0), "b": Last(5.0)})["a"].value
    3.0
    """
    combined: dict[str, Measure] = {}
    for part in parts:
        for name, measure in part.items():
            before = combined.get(name)
            if before is not None and type(before) is not type(measure):
                raise TypeError(
                    f"metric {name} was a {type(before).__name__} and is now a {type(measure).__name__}; "
                    "one name has one reduction"
                )
            combined[name] = measure if before is None else before + measure  # type: ignore[operator]
    return combined
