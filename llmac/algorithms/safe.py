"""SAFE: stable alignment fine-tuning with entropy-aware control (arXiv:2602.04651).

PPO with a pessimistic critic (the soft minimum of two heads) and a KL penalty that opens only
above a threshold, weighs more where the policy has little entropy left, and whose threshold a PID
controller and the phase of training move. Needs: a reference policy and a critic, best
`critic: {name: value_head, heads: 2, combine: soft_min}`.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.controllers import (
    PIDState,
    ThresholdState,
    entropy_gate,
    move_threshold,
    plain_gate,
)
from llmac.core.diagnostics import explained_variance
from llmac.core.kl import kl_estimate
from llmac.core.masking import masked_mean, masked_var
from llmac.core.measures import Last, Measure
from llmac.core.moments import Moments
from llmac.core.returns import segment_gae
from llmac.core.segments import every_token, response_start
from llmac.core.types import AllSum, Credit, CriticTargets, Rollouts, Values, identity

from .base import ClippedPolicy, mean_over

EPS = 1e-8
"""Added to variances that divide."""


@dataclass(kw_only=True)
class SafeMemory:
    """What SAFE remembers from step to step; it moves once a step, in `credit`."""

    threshold: ThresholdState = field(default_factory=ThresholdState)
    """Smoothed KL, PID controller, latest rewards."""
    rewards: Moments = field(default_factory=Moments)
    """Of all rewards of the run, unscaled."""

    def state(self) -> dict[str, Any]:
        """Plain numbers, in dictionaries as the fields are nested."""
        return dataclasses.asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        moved = state["threshold"]
        self.threshold = ThresholdState(
            kl=moved["kl"], pid=PIDState(**moved["pid"]), rewards=tuple(moved["rewards"])
        )
        self.rewards = Moments(**state["rewards"])


@dataclass(frozen=True, kw_only=True)
class SAFE(ClippedPolicy):
    """SAFE: outcome minus the value of the prompt, clipped steps, and a KL gate with a gradient.

        Â = whiten(R - V(s_0))
        ks <- decay · ks + (1 - decay) · KL                     once a step
        P(ks) = coef · max(0, ks - threshold)² · max(.5, 2 / (H + .1))
        loss = PPO(Â) + w · Σ kl_t,     w = dP/dks · dks/dKL = P'(ks) · (1 - decay)

    so the loss has the gradient that P has through the KL of this step, with threshold and entropy
    held constant; KL and entropy H are estimated from the sampled tokens at collection, the
    gradient of kl_t is that of KL(π || π_ref) (k3+). Below the threshold w is 0 and this is PPO
    with γ = λ = 1.

    Deviations from the released code:

    - V is read at the start of the response; there at its end, where it knows the actions (a biased
      baseline), and at a padding position in rows shorter than the longest.
    - The penalty has a gradient; there it is a constant added to the loss, which moves nothing.
    - KL by k3, never negative, and once a step; there by k1, and once an inner epoch.
    - H is the entropy of sampled tokens; there a mean over all positions, padding and prompt too.
    - Values are in reward units, and the advantage is scaled; there rewards are normalised by
      running moments and the critic learns what is normalised differently each step.
    - No second, averaged critic: there it is updated and never read. No KL preview, no momentum
      term: there not called, or only in the asymmetric variant.
    - The critic has its own optimizer and loss, so the value loss has no coefficient here. Its
      Huber loss, averaged with the clipped one, is a setting of the critic.
    """

    default_critic: ClassVar[str | None] = "value_head"

    group_size: int = 1
    """Responses sampled for each prompt; one in the released code."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus, in nats per token; of the released code."""
    values_at: Literal["response_start", "every_token"] = "response_start"
    """Where V is asked. every_token: the advantage of a token is return minus V before it."""
    advantage_scale: Literal["batch", "running", "none"] = "batch"
    """batch: mean 0 and variance 1 over the step's values asked, so over responses (released code);
    running: divided by the standard deviation of all rewards of the run; none: reward units."""
    gate: Literal["entropy", "asymmetric"] = "entropy"
    """entropy: as above; asymmetric: of this step's KL, with a fixed threshold and no entropy, after
    a variant in the released code."""
    gate_coef: float = 0.1
    """Weight of the penalty; of the released code. Through the smoothing a tenth of it acts."""
    gate_threshold: float = 0.3
    """KL, nats a token, above which the gate opens, before control and phase; released code."""
    gate_bounds: tuple[float, float] = (0.1, 0.6)
    """Smallest and largest threshold, nats a token; of the released code."""
    gate_decay: float = 0.9
    """Of the smoothed KL, a step; of the released code."""
    pid_gains: tuple[float, float, float] = (0.3, 0.01, 0.05)
    """k_p, k_i, k_d of the controller that raises the threshold while rewards rise; released
    code."""
    phase_window: int = 50
    """Steps whose rewards tell the phase of training; of the released code."""
    converged_at: float = 0.7
    """Mean reward above which a steady run counts as converged; of the released code, whose reward
    model answers in [0, 1]."""

    def __post_init__(self) -> None:
        """Refuse gates that cannot open or close."""
        super().__post_init__()
        low, high = self.gate_bounds
        self._require("gate_coef", 0 < self.gate_coef < math.inf, "finite and above 0")
        self._require("gate_threshold", 0 < self.gate_threshold < math.inf, "finite and above 0")
        self._require("gate_bounds", 0 <= low < high < math.inf, "(smallest, largest), from 0 on")
        self._require("gate_decay", 0 <= self.gate_decay < 1, "in [0, 1)")
        self._require("pid_gains", all(map(math.isfinite, self.pid_gains)), "three finite numbers")
        self._require("phase_window", self.phase_window >= 1, "at least 1")
        self._require("converged_at", math.isfinite(self.converged_at), "finite")
        for name in ("gate_bounds", "gate_decay", "pid_gains", "phase_window", "converged_at"):
            self._without_effect(name, self.gate == "asymmetric", "set gate to entropy")

    @property
    def uses_reference(self) -> bool:
        """Always: the gate measures the KL to the reference."""
        return True

    def memory(self) -> SafeMemory:
        """Smoothed KL, controller, rewards so far."""
        return SafeMemory()

    def segments(self, rollouts: Rollouts) -> Bool[Tensor, "B T"]:
        """Before the response, or before every sampled token."""
        asked = response_start if self.values_at == "response_start" else every_token
        return asked(rollouts.action_mask)

    def credit(
        self,
        rollouts: Rollouts,
        values: Values | None,
        *,
        sum_across: AllSum = identity,
        memory: SafeMemory | None = None,
    ) -> Credit:
        """Return minus value, and the weight of the KL after this step moved the gate.

        Args:
            rollouts: of the step.
            values: where `segments` asked.
            sum_across: sums over ranks.
            memory: is moved on by one step; None: that of a run's beginning.

        Raises:
            ValueError: values or reference log-probabilities are missing.
        """
        if values is None:
            raise ValueError(
                "SAFE needs the values of a critic and got none; set critic: {name: value_head, "
                "heads: 2, combine: soft_min}, or choose an algorithm without one, for example grpo"
            )
        remembered = SafeMemory() if memory is None else memory
        weight, gate = self._move(remembered, rollouts, sum_across=sum_across)
        at = values.at.masked_fill(~values.starts, 0.0)
        advantages = segment_gae(
            self.shaped_rewards(rollouts),
            at,
            values.starts,
            torch.zeros_like(values.bootstrap),
            gamma=1.0,
            lam=1.0,
            action_mask=rollouts.action_mask,
        )
        value_mask = values.starts & self.policy_mask(rollouts)
        returns = (advantages + at).masked_fill(~value_mask, 0.0)
        credit = self.make_credit(
            rollouts,
            self._scaled(advantages, value_mask, remembered, sum_across=sum_across),
            sum_across=sum_across,
            critic_targets=CriticTargets(
                returns=returns,
                value_mask=value_mask,
                old_values=at,
                bootstraps=torch.zeros_like(rollouts.truncated),
            ),
            metrics={
                "critic/values/mean": mean_over(at, value_mask),
                "critic/returns/mean": mean_over(returns, value_mask),
                "critic/vf_explained_var": Last(
                    explained_variance(at, returns, value_mask, sum_across=sum_across)
                ),
                **gate,
            },
        )
        if weight == 0.0:
            return credit
        return dataclasses.replace(credit, kl_weight=torch.full_like(credit.advantages, weight))

    def _move(
        self, memory: SafeMemory, rollouts: Rollouts, *, sum_across: AllSum
    ) -> tuple[float, dict[str, Measure]]:
        """Take the step's KL and rewards into the memory; the weight of the KL, and metrics."""
        if rollouts.ref_logprobs is None:
            raise ValueError(
                "SAFE measures the KL to a reference, and the rollouts carry no ref_logprobs; "
                "annotate them with a reference policy"
            )
        mask, old = rollouts.action_mask, rollouts.old_logprobs
        outcomes = rollouts.rewards.sum(-1)
        every = torch.ones_like(outcomes, dtype=torch.bool)
        estimate = kl_estimate(old, rollouts.ref_logprobs, "k3")
        kl = float(masked_mean(estimate, mask, sum_across=sum_across))
        entropy = float(masked_mean(-old, mask, sum_across=sum_across))
        reward = float(masked_mean(outcomes, every, sum_across=sum_across))

        memory.rewards = memory.rewards.after(outcomes, every, sum_across=sum_across)
        memory.threshold, threshold = move_threshold(
            memory.threshold,
            kl=kl,
            reward=reward,
            base=self.gate_threshold,
            bounds=self.gate_bounds,
            decay=self.gate_decay,
            gains=self.pid_gains,
            window=self.phase_window,
            high=self.converged_at,
        )
        if self.gate == "entropy":
            price = entropy_gate(
                memory.threshold.kl,
                threshold=threshold.value,
                entropy=entropy,
                coef=self.gate_coef,
            )
            weight = price.slope * (1 - self.gate_decay)
            metrics: dict[str, Measure] = {
                "actor/gate_kl": Last(memory.threshold.kl),
                "actor/gate_threshold": Last(threshold.value),
                "actor/gate_tolerance": Last(threshold.phase.tolerance),
            }
        else:
            price = plain_gate(kl, threshold=self.gate_threshold, coef=self.gate_coef)
            weight, metrics = price.slope, {}
        metrics |= {
            "actor/gate_penalty": Last(price.penalty),
            "actor/gate_weight": Last(weight),
        }
        if not self.kl_coef:
            metrics["actor/ref_kl"] = mean_over(estimate, mask)
        return weight, metrics

    def _scaled(
        self,
        advantages: Float[Tensor, "B T"],
        asked: Bool[Tensor, "B T"],
        memory: SafeMemory,
        *,
        sum_across: AllSum,
    ) -> Float[Tensor, "B T"]:
        if self.advantage_scale == "none":
            return advantages
        if self.advantage_scale == "running":
            return advantages / (memory.rewards.variance + EPS) ** 0.5
        mean = masked_mean(advantages, asked, sum_across=sum_across)
        variance = masked_var(advantages, asked, sum_across=sum_across)
        return (advantages - mean) * torch.rsqrt(variance + EPS)
