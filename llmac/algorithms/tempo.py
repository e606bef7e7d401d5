"""TEMPO: GRPO with the credit of the prefix tree its responses already are (arXiv:2509.18314).

Siblings that begin with the same tokens say what a state is worth; where they part, that value
changes, and the token gets the change on top of what GRPO gives to the whole response. Needs:
group_size >= 2, one outcome reward per response.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmac.core.baselines import group_std
from llmac.core.diagnostics import explained_variance
from llmac.core.masking import Aggregation, masked_var
from llmac.core.measures import Last
from llmac.core.returns import segment_gae
from llmac.core.types import AllSum, Credit, Rollouts, Values, identity

from .base import mean_over
from .grpo import GRPO


@dataclass(frozen=True, kw_only=True)
class TEMPO(GRPO):
    """TEMPO: GRPO's advantage plus the TD error of each token, both in the unit of the group.

        δ_it = r_it + V(s_{t+1}) - V(s_t)                             V = 0 behind the last token
        Â_it = (s_i - mean_g + δ_it) / (std_g + scale_eps)

    V is the mean outcome of the siblings that share the prefix (critic `prefix_tree`; another
    critic of states may take its place). Where nothing branches δ is 0 and the token has GRPO's
    advantage. The δ of a response add up to r_i - mean_g.

    Ours: a group whose scores are all equal has advantages of 0, a lone response included; identical
    responses with different rewards are each compared with their own at the last token; a KL in the
    reward enters s_i and not δ.
    """

    default_critic: ClassVar[str | None] = "prefix_tree"
    teaches_critic: ClassVar[bool] = False

    group_size: int = 7
    """The paper's recipe."""
    aggregation: Aggregation = "token_mean"
    """The paper's recipe."""
    clip_high: float = 0.28
    """The paper's recipe: clip-higher, clip_low stays .2."""

    def __post_init__(self) -> None:
        """Refuse what would need the critic for prompts and not for states."""
        super().__post_init__()
        self._require(
            "allocation",
            self.allocation == "equal",
            "equal: dividing the responses takes a critic of prompts, and this card needs one of "
            "states",
        )

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """GRPO's advantage of the response, and at each token what it changed.

        Raises:
            ValueError: values are missing.
        """
        if values is None:
            raise ValueError(
                "TEMPO needs the values of a critic and got none; set critic: {name: prefix_tree}, "
                "or choose grpo, which needs none"
            )
        changes = self._changes(rollouts, values)
        scores = self.scores(rollouts)
        of_response = self.outcome_advantages(scores, rollouts.group, sum_across=sum_across)
        per_unit = self._per_unit(scores, rollouts.group, sum_across)
        mask = self.policy_mask(rollouts)
        asked, at = values.starts & mask, values.at.masked_fill(~values.starts, 0.0)
        to_come = rollouts.rewards.flip(1).cumsum(1).flip(1)
        explained = explained_variance(at, to_come, asked, sum_across=sum_across)
        return self.make_credit(
            rollouts,
            of_response[:, None] + changes * per_unit[:, None],
            sum_across=sum_across,
            metrics={
                "critic/values/mean": mean_over(at, asked),
                "critic/vf_explained_var": Last(explained),
                "critic/branches": mean_over(changes.abs() > 1e-6, mask),
            },
        )

    def _changes(self, rollouts: Rollouts, values: Values) -> Float[Tensor, "B T"]:
        """δ: the limit is part of the task, so that a truncated response ends as it was rewarded."""
        return segment_gae(
            rollouts.rewards,
            values.at,
            values.starts,
            torch.zeros_like(values.bootstrap),
            gamma=1.0,
            lam=0.0,
            action_mask=rollouts.action_mask,
        )

    def _per_unit(
        self, scores: Float[Tensor, "B"], group: Int[Tensor, "B"], sum_across: AllSum
    ) -> Float[Tensor, "B"]:
        """One over the unit of `outcome_advantages`; 0 where the group has no spread to measure by."""
        if self.scale == "none":
            return torch.ones_like(scores)
        if self.scale == "group":
            std = group_std(scores, group)
        else:
            everyone = torch.ones_like(scores, dtype=torch.bool)
            std = masked_var(scores, everyone, sum_across=sum_across).sqrt().expand_as(scores)
        return (1 / (std + self.scale_eps)).where(std > 0, 0.0)
