"""The critic of trees: their plan knows what both ends of every segment are worth, and it is believed."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from llmac.core.measures import Measure
from llmac.core.spans import span_values
from llmac.core.types import CriticTargets, Rollouts, Values
from llmac.critics.bench import CriticBench


@dataclass(frozen=True, kw_only=True)
class TreeMeanConfig:
    """V of a state is the mean outcome of the responses that were sampled from there (`core.tree`)."""

    repeats_the_plan: ClassVar[bool] = True
    """It knows nothing but what a plan that samples trees has found out."""

    def build(self, bench: CriticBench) -> "TreeMean":
        """The live critic."""
        return TreeMean()


class TreeMean:
    """V(node) = mean of V over its children; of a leaf, its reward. Asked where segments of a tree begin.

    A node's mean contains what the edge that is judged led to, unless the plan left it out
    (`edge_advantage`).
    """

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """What the plan knows, where it knows it: `starts` adds nothing.

        Raises:
            ValueError: a row that a plan of another kind has sampled.
        """
        return span_values(rollouts)

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        """Nothing learns."""
        return {}
