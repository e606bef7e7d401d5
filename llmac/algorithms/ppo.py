"""PPO: proximal policy optimization with a learned value model.

Schulman et al. 2017, arXiv:1707.06347. Every token is an action, V(s_t) is asked before each, GAE
(Schulman et al. 2016, arXiv:1506.02438) turns rewards and values into advantages, and the policy
takes clipped steps. For language models: Ziegler et al. 2019, arXiv:1909.08593. Needs: a critic.
`lam` and `critic_lam` apart is decoupled GAE (VC-PPO, arXiv:2503.01491).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llmac.core.diagnostics import explained_variance
from llmac.core.masking import whiten
from llmac.core.measures import Last
from llmac.core.returns import segment_gae
from llmac.core.types import AllSum, Credit, CriticTargets, Rollouts, Values, identity

from .base import ClippedPolicy, mean_over


@dataclass(frozen=True, kw_only=True)
class PPO(ClippedPolicy):
    """PPO: advantages from a learned critic by GAE, clipped policy steps.

        δ_t = r_t + γ V(s_{t+1}) - V(s_t)
        Â_t = δ_t + γ λ Â_{t+1}
        G_t = Â_t(critic_lam) + V(s_t)

    V(s_T) is 0 after a response that ended, and `on_truncation` says what it is after one that was
    cut. The critic learns G from raw advantages; whitening comes after.
    """

    default_critic: ClassVar[str | None] = "value_head"

    group_size: int = 1
    """Responses sampled for each prompt. 1 in the paper's setting; the critic, not siblings, is the
    baseline."""
    gamma: float = 1.0
    """Discount of each token. 1 in verl, TRL and OpenRLHF: a longer answer is not a worse one."""
    lam: float = 1.0
    """GAE's λ for the policy. 1.0 in verl and OpenRLHF; .95 in the paper and TRL, where a reward on
    the last token is down to .95^200 = 3.5e-5 two hundred tokens earlier."""
    critic_lam: float | None = None
    """GAE's λ for the critic's targets; None: `lam`. 1.0 in VC-PPO (arXiv:2503.01491) and VAPO
    (arXiv:2504.05118)."""
    whiten_advantages: bool = True
    """Whether advantages get mean 0 and variance 1 over the tokens of the whole step. On in verl,
    TRL and OpenRLHF."""
    on_truncation: Literal["terminal", "bootstrap"] = "terminal"
    """V(s_T) of a response cut at the length limit. terminal: 0, the limit is part of the task
    (verl, TRL, OpenRLHF); bootstrap: the critic's, the response would have gone on (T-PPO,
    arXiv:2506.15050)."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k1"
    """Per-token estimate of the KL. k1 in arXiv:1909.08593, TRL and OpenRLHF."""
    kl_placement: Literal["loss", "reward"] = "reward"
    """reward: subtracted from the reward of each token, before GAE (arXiv:1909.08593); loss:
    differentiated."""

    def __post_init__(self) -> None:
        """Refuse discounts outside [0, 1] and a bootstrap nothing would read."""
        super().__post_init__()
        self._require("gamma", 0 <= self.gamma <= 1, "in [0, 1]")
        self._require("lam", 0 <= self.lam <= 1, "in [0, 1]")
        self._require(
            "critic_lam", self.critic_lam is None or 0 <= self.critic_lam <= 1, "None, or in [0, 1]"
        )
        self._without_effect("on_truncation", self.mask_truncated, "set mask_truncated to false")

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """GAE between the states whose value is known, and the critic's targets there."""
        if values is None:
            raise ValueError(
                "PPO needs the values of a critic and got none; set critic: {name: value_head}, or "
                "choose an algorithm without one, for example grpo"
            )
        rewards = self.shaped_rewards(rollouts)
        at = values.at.masked_fill(~values.starts, 0.0)
        bootstrap = values.bootstrap
        if self.on_truncation == "terminal":
            bootstrap = torch.zeros_like(bootstrap)

        def gae(lam: float) -> torch.Tensor:
            return segment_gae(
                rewards,
                at,
                values.starts,
                bootstrap,
                gamma=self.gamma,
                lam=lam,
                action_mask=rollouts.action_mask,
            )

        advantages = gae(self.lam)
        # Before whitening: targets are in the unit of the rewards, whitened advantages are not.
        returns = (advantages if self.critic_lam is None else gae(self.critic_lam)) + at
        mask = self.policy_mask(rollouts)
        value_mask = values.starts & mask
        targets = CriticTargets(
            returns=returns.masked_fill(~value_mask, 0.0), value_mask=value_mask, old_values=at
        )
        if self.whiten_advantages:
            advantages = whiten(advantages, mask, sum_across=sum_across)
        explained = explained_variance(at, targets.returns, value_mask, sum_across=sum_across)
        return self.make_credit(
            rollouts,
            advantages,
            sum_across=sum_across,
            critic_targets=targets,
            metrics={
                "critic/values/mean": mean_over(at, value_mask),
                "critic/returns/mean": mean_over(returns, value_mask),
                "critic/vf_explained_var": Last(explained),
            },
        )
