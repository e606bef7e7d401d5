"""The half of a card that takes a learned critic at its word: rewards and values become credit.

GAE (Schulman et al. 2016, arXiv:1506.02438), with λ that may differ between policy and critic
(VC-PPO, arXiv:2503.01491), depend on the response (VAPO, arXiv:2504.05118; SAE, arXiv:2601.07320),
and with V-trace (IMPALA, arXiv:1802.01561) where another policy sampled.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.diagnostics import explained_variance
from llmac.core.masking import whiten
from llmac.core.measures import Last, Measure
from llmac.core.returns import segment_gae
from llmac.core.traces import doubt_lam, length_lam
from llmac.core.types import AllSum, Credit, CriticTargets, Rollouts, Values, identity
from llmac.core.vtrace import segment_ratios, vtrace

from .base import mean_over, newly_sampled
from .segmented import Segmented, segment_metrics


@dataclass(frozen=True, kw_only=True)
class CriticCredit(Segmented):
    """The half that asks a critic: GAE between the states whose value is known.

        δ_t = r_t + γ V(s_{t+1}) - V(s_t)
        Â_t = δ_t + γ λ_t Â_{t+1}
        G_t = Â_t(critic_lam) + V(s_t)

    V(s_T) is 0 after a response that ended, and `on_truncation` says what it is after one that was
    cut. The critic learns G from raw advantages; clipping and whitening come after.
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
    lam_rule: Literal["fixed", "length", "doubt"] = "fixed"
    """Where the policy's λ comes from. fixed: `lam` everywhere; length: 1 - 1/(lam_alpha · tokens
    of the response) (VAPO, arXiv:2504.05118); doubt: `lam` before a token sampled with a
    probability below `doubt_below`, 1 elsewhere (SAE, arXiv:2601.07320)."""
    lam_alpha: float = 0.05
    """Share of the response that the length rule's trace covers; λ is 0 up to 1/lam_alpha tokens.
    .05 in open-instruct and accounts of VAPO, made for thousands of tokens."""
    doubt_below: float = 0.2
    """Probability below which a token was in doubt. .2 in open-instruct."""
    critic_lam: float | None = None
    """GAE's λ for the critic's targets; None: the policy's. 1.0 in VC-PPO (arXiv:2503.01491) and
    VAPO (arXiv:2504.05118)."""
    off_policy: Literal["none", "vtrace"] = "none"
    """vtrace: advantages and targets are those of the trained policy although another, or an older
    one, sampled (IMPALA, arXiv:1802.01561): ratios π_old/μ weigh each step and cut the traces."""
    rho_max: float = 1.0
    """V-trace: largest weight of a TD error and of an advantage. 1 is usual."""
    c_max: float = 1.0
    """V-trace: largest weight of what a trace passes on, at most rho_max. 1 is usual."""
    advantage_clip: float | None = None
    """Largest |Â| before whitening, unit of reward; the critic's targets are not clipped. None: no
    bound. The idea is AC-Flow's (arXiv:2510.18072), this form ours."""
    whiten_advantages: bool = True
    """Whether advantages get mean 0 and variance 1 over the tokens of the whole step. On in verl,
    TRL and OpenRLHF."""
    on_truncation: Literal["terminal", "bootstrap"] = "terminal"
    """V(s_T) of a response cut at the length limit. terminal: 0, the limit is part of the task
    (verl, TRL, OpenRLHF); bootstrap: the critic's, the response would have gone on."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k1"
    """Per-token estimate of the KL. k1 in arXiv:1909.08593, TRL and OpenRLHF."""
    kl_placement: Literal["loss", "reward"] = "reward"
    """reward: subtracted from the reward of each token, before GAE (arXiv:1909.08593); loss:
    differentiated."""

    def __post_init__(self) -> None:
        """Refuse rates out of range, one correction applied twice, and keys nothing would read."""
        super().__post_init__()
        self._require("gamma", 0 <= self.gamma <= 1, "in [0, 1]")
        self._require("lam", 0 <= self.lam <= 1, "in [0, 1]")
        self._require(
            "critic_lam", self.critic_lam is None or 0 <= self.critic_lam <= 1, "None, or in [0, 1]"
        )
        self._require("lam_alpha", 0 < self.lam_alpha < math.inf, "finite and above 0")
        self._require("doubt_below", 0 < self.doubt_below < 1, "between 0 and 1")
        self._require(
            "lam",
            self.lam_rule != "doubt" or self.lam < 1,
            "below 1 when lam_rule is doubt: it is the decay at doubtful tokens, 1 elsewhere",
        )
        self._without_effect("lam", self.lam_rule == "length", "set lam_rule to fixed or doubt")
        self._without_effect("lam_alpha", self.lam_rule != "length", "set lam_rule to length")
        self._without_effect("doubt_below", self.lam_rule != "doubt", "set lam_rule to doubt")
        self._require("rho_max", self.rho_max > 0, "above 0; .inf bounds nothing")
        self._require(
            "c_max",
            self.off_policy == "none" or 0 < self.c_max <= self.rho_max,
            f"above 0 and at most rho_max, {self.rho_max}",
        )
        for name in ("rho_max", "c_max"):
            self._without_effect(name, self.off_policy == "none", "set off_policy to vtrace")
        self._require(
            "off_policy",
            self.off_policy == "none" or self.mismatch == "off",
            f"none while mismatch is {self.mismatch}, since both weigh the policy term by π_old/μ "
            "(or set mismatch to off)",
        )
        clip = self.advantage_clip
        self._require(
            "advantage_clip",
            clip is None or 0 < clip < math.inf,
            "None, or finite and above 0, in the unit of the rewards",
        )
        self._without_effect("on_truncation", self.mask_truncated, "set mask_truncated to false")

    @property
    def takes_offered_rows(self) -> bool:
        """True: GAE looks at one row at a time."""
        return True

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """Advantages between the states whose value is known, and the critic's targets there."""
        if values is None:
            raise ValueError(
                f"{type(self).__name__} needs the values of a critic and got none; set critic: "
                "{name: value_head}, or choose an algorithm without one, for example grpo"
            )
        starts = values.starts & rollouts.action_mask
        at = values.at.masked_fill(~starts, 0.0)
        mask = self.policy_mask(rollouts)
        advantages, returns, metrics = self.estimate(rollouts, values)

        # Before clipping and whitening: targets are in the unit of the rewards.
        value_mask = starts & self.taught(rollouts)
        targets = CriticTargets(
            returns=returns.masked_fill(~value_mask, 0.0),
            value_mask=value_mask,
            old_values=at,
            gamma=self.gamma,
            bootstraps=self.bootstraps(rollouts),
        )
        if self.advantage_clip is not None:
            outside = advantages.abs() > self.advantage_clip
            metrics["critic/advantages/clipfrac"] = mean_over(outside, mask)
            advantages = advantages.clamp(-self.advantage_clip, self.advantage_clip)
        advantages = self.scaled(advantages, mask, sum_across=sum_across)
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
                **segment_metrics(rollouts, starts),
                **metrics,
            },
        )

    def estimate(
        self, rollouts: Rollouts, values: Values
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], dict[str, Measure]]:
        """Raw advantages, the critic's targets (right where a value is known), and metrics."""
        starts = values.starts & rollouts.action_mask
        at = values.at.masked_fill(~starts, 0.0)
        rewards, bootstrap = self.shaped_rewards(rollouts), self.bootstrap(rollouts, values)
        metrics: dict[str, Measure] = {}
        ratios = None
        if self.off_policy == "vtrace":
            ratios = segment_ratios(
                rollouts.old_logprobs, rollouts.sampler_logprobs, starts, rollouts.action_mask
            )
            weights = ratios.clamp(max=self.rho_max)
            metrics["actor/vtrace_weight"] = mean_over(weights, newly_sampled(rollouts))

        def with_lam(lam: float | Tensor) -> tuple[Tensor, Tensor]:
            if ratios is None:
                advantages = segment_gae(
                    rewards,
                    at,
                    starts,
                    bootstrap,
                    gamma=self.gamma,
                    lam=lam,
                    action_mask=rollouts.action_mask,
                )
                return advantages, advantages + at
            return vtrace(
                rewards,
                at,
                ratios,
                starts,
                bootstrap,
                gamma=self.gamma,
                lam=lam,
                rho_max=self.rho_max,
                c_max=self.c_max,
                action_mask=rollouts.action_mask,
            )

        advantages, returns = with_lam(self.policy_lam(rollouts, starts))
        if self.critic_lam is not None:
            returns = with_lam(self.critic_lam)[1]
        return advantages, returns, metrics

    def scaled(
        self, advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, sum_across: AllSum
    ) -> Float[Tensor, "B T"]:
        """Advantages as the policy gets them: whitened over the tokens of the step, or as they are."""
        if not self.whiten_advantages:
            return advantages
        return whiten(advantages, mask, sum_across=sum_across)

    def taught(self, rollouts: Rollouts) -> Bool[Tensor, "B T"]:
        """Tokens before which the critic has a target, if it was asked there."""
        return self.policy_mask(rollouts)

    def bootstrap(self, rollouts: Rollouts, values: Values) -> Float[Tensor, "B"]:
        """V(s_T) as the card takes it."""
        return values.bootstrap.where(self.bootstraps(rollouts), 0.0)

    def bootstraps(self, rollouts: Rollouts) -> Bool[Tensor, "B"]:
        """Rows behind whose last token the critic's value stands."""
        if self.on_truncation == "terminal":
            return torch.zeros_like(rollouts.truncated)
        return rollouts.truncated

    def policy_lam(
        self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]
    ) -> float | Float[Tensor, "B T"]:
        """λ of the policy's advantages, as `lam_rule` has it."""
        if self.lam_rule == "length":
            return length_lam(starts, alpha=self.lam_alpha)
        if self.lam_rule == "doubt":
            return doubt_lam(
                rollouts.old_logprobs, starts, lam=self.lam, threshold=self.doubt_below
            )
        return self.lam
