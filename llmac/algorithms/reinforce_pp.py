"""REINFORCE++ and REINFORCE++-baseline (Hu et al. 2025, arXiv:2501.03262).

PPO without a critic: rewards to go, KL in the reward of each token, and the whole step's mean and
standard deviation as baseline and unit. The -baseline variant samples several responses a prompt
and removes the group's mean first.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmac.core.baselines import group_relative
from llmac.core.masking import whiten
from llmac.core.returns import segment_gae
from llmac.core.types import AllSum, Credit, Rollouts, Values, identity

from .base import ClippedPolicy, GroupCredit


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(ClippedPolicy):
    """REINFORCE++: whitened rewards to go, no critic and no siblings.

        G_t = r_t + γ G_{t+1}        Â_t = (G_t - mean(G)) / std(G)

    Mean and standard deviation are taken over all tokens of the step.
    """

    group_size: int = 1
    """The paper's: one response a prompt, more prompts."""
    gamma: float = 1.0
    """Discount of each sampled token; the paper's."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k1"
    """The paper's (kl_coef .01 in OpenRLHF)."""
    kl_placement: Literal["loss", "reward"] = "reward"
    """The paper's: each token's reward carries its own KL."""

    def __post_init__(self) -> None:
        """Refuse a discount outside [0, 1]."""
        super().__post_init__()
        self._require("gamma", 0 <= self.gamma <= 1, "in [0, 1]")

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """Rewards to go, whitened over the step."""
        self._refuse_values(values)
        rewards = self.shaped_rewards(rollouts)
        # GAE with V = 0 and λ = 1 is the reward to go; unlike `reward_to_go` it does not discount
        # injected tokens.
        returns = segment_gae(
            rewards,
            torch.zeros_like(rewards),
            self.segments(rollouts),
            torch.zeros_like(rewards[:, 0]),
            gamma=self.gamma,
            lam=1.0,
            action_mask=rollouts.action_mask,
        )
        advantages = whiten(returns, self.policy_mask(rollouts), sum_across=sum_across)
        return self.make_credit(rollouts, advantages, sum_across=sum_across)


@dataclass(frozen=True, kw_only=True)
class ReinforcePPBaseline(GroupCredit, ClippedPolicy):
    """REINFORCE++-baseline: siblings' mean removed, then whitened over the step.

        Â_it = whiten(s_i - mean_g)

    Longer responses weigh more in the step's mean, so a group of equal rewards may end off zero by
    that mean: the one group card for which this holds, as in verl and OpenRLHF.
    """

    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k2"
    """Per-token estimate of the KL. k2: as a loss, its gradient is that of the KL."""

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """The group-centred outcome at every token, whitened over the step."""
        self._refuse_values(values)
        outcome = self.outcome_advantages(
            self.scores(rollouts), rollouts.group, sum_across=sum_across
        )
        per_token = outcome[:, None].expand_as(rollouts.rewards)
        advantages = whiten(per_token, self.policy_mask(rollouts), sum_across=sum_across)
        return self.make_credit(rollouts, advantages, sum_across=sum_across)

    def outcome_advantages(
        self, scores: Float[Tensor, "B"], group: Int[Tensor, "B"], *, sum_across: AllSum = identity
    ) -> Float[Tensor, "B"]:
        """Distance from the group's mean, in the unit of the rewards."""
        return group_relative(scores, group, scale="none")
