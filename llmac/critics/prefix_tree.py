"""A critic without parameters that sees the siblings of a response as a tree: TEMPO's (P2T), arXiv:2509.18314."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from llmac.core.measures import Measure
from llmac.core.prefix_tree import prefix_means
from llmac.core.types import CriticTargets, Rollouts, Values
from llmac.critics.bench import CriticBench
from llmac.critics.outcomes import outcomes


@dataclass(frozen=True, kw_only=True)
class PrefixTreeConfig:
    """The mean outcome of the siblings that begin with the same tokens, the judged response included."""

    least_group_size: ClassVar[int] = 2
    """Responses to a prompt that it needs: one alone would be compared with itself."""

    def build(self, bench: CriticBench) -> "PrefixTree":
        """The live critic."""
        return PrefixTree()


class PrefixTree:
    """V(s_t) = mean outcome of the siblings that went through s_t. At s_0 it is `group_mean`.

    It contains the response's own outcome, and is nothing but that where no sibling has the same beginning: a baseline
    for the difference of two neighbouring states, which is 0 there, and none for λ above 0.
    """

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """What is still to come if the response earns what those of its siblings do that began like it."""
        total, known = outcomes(rollouts)
        lengths = torch.tensor([len(t.response_ids) for t in rollouts.trajectories])
        expected = prefix_means(total, rollouts.group, rollouts.response_ids, lengths, known)
        earned = rollouts.rewards.cumsum(1)
        return Values(
            at=(expected[:, :-1] - (earned - rollouts.rewards)) * starts,
            starts=starts,
            bootstrap=(expected[:, -1] - rollouts.rewards.sum(1)) * rollouts.truncated,
        )

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        """Nothing learns."""
        return {}
