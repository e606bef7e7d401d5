"""VAPO: value-model-based augmented PPO (Yue et al. 2025, arXiv:2504.05118).

PPO with a critic that is made trustworthy first: its targets are plain returns (critic_lam 1,
VC-PPO, arXiv:2503.01491), the policy's λ grows with the response, clips are unequal, every token
weighs the same, and what was answered right is also learned by likelihood. The paper trains the
critic before the policy moves: `run.critic_warmup_steps`, or `llmac value-pretrain` beforehand.
Made from the abstract and accounts of the paper: the numbers are theirs, or open-instruct's, as
each field says. Needs: a critic.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch

from llmac.core.masking import aggregation_weight
from llmac.core.types import AllSum, Credit, Rollouts, Values, identity

from .base import mean_over
from .ppo import PPO


@dataclass(frozen=True, kw_only=True)
class VAPO(PPO):
    """VAPO: PPO with decoupled, length-adaptive GAE and a likelihood term on right answers.

        λ_policy(l) = 1 - 1/(lam_alpha · l),   λ_critic = 1
        loss = PPO's  +  likelihood_coef · mean over right responses of -log π_θ(a_t|s_t)

    The mean is what `aggregation` means, taken over the right responses of the whole step, on all
    ranks: token_mean, over their tokens; sequence_mean_token_mean, over these responses of the mean
    of each; sequence_mean_token_sum, of the sum of each, and with _norm of that sum over the length
    limit. No split of the rows into micro-batches and ranks changes the gradient. Of several
    minibatches each has the share of the right responses it holds: one without only misses the
    term.
    """

    group_size: int = 16
    """Responses sampled for each prompt: several attempts find what one misses. 16 in accounts of
    the paper."""
    lam_rule: Literal["fixed", "length", "doubt"] = "length"
    """Where the policy's λ comes from. length: 1 - 1/(lam_alpha · tokens of the response), VAPO's;
    fixed: `lam`; doubt: `lam` before doubtful tokens, 1 elsewhere (SAE)."""
    critic_lam: float | None = 1.0
    """GAE's λ for the critic's targets. 1, VC-PPO's: the return itself, without bias from the
    critic's own mistakes."""
    clip_high: float = 0.28
    """A ratio above 1 + clip_high earns nothing more. DAPO's, and .28 in accounts of VAPO."""
    likelihood_coef: float = 0.1
    """Weight μ of the mean negative log-likelihood of right responses' tokens. .1 in accounts
    of the paper; 0: off."""
    correct_above: float = 0.5
    """A response is right if the sum of its rewards, before any KL, is above this."""

    def __post_init__(self) -> None:
        """Refuse a negative weight, and a threshold nothing would read."""
        super().__post_init__()
        self._require(
            "likelihood_coef", 0 <= self.likelihood_coef < math.inf, "finite and at least 0"
        )
        self._require("correct_above", math.isfinite(self.correct_above), "finite")
        self._without_effect(
            "correct_above", self.likelihood_coef == 0, "set likelihood_coef above 0"
        )

    @property
    def takes_offered_rows(self) -> bool:
        """Only without likelihood_coef: it is a mean over right responses."""
        return self.likelihood_coef == 0

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """PPO's credit, and the weight of each right token's likelihood."""
        credit = super().credit(rollouts, values, sum_across=sum_across)
        if self.likelihood_coef == 0:
            return credit
        right = credit.policy_mask & (rollouts.rewards.sum(-1) > self.correct_above)[:, None]
        everything, correct = sum_across(
            torch.stack(
                [
                    aggregation_weight(credit.policy_mask, self.aggregation),
                    aggregation_weight(right, self.aggregation),
                ]
            )
        )
        # The loss is divided by all tokens, or responses; this term by the right ones among them.
        weight = self.likelihood_coef * everything / correct.clamp(min=1)
        return dataclasses.replace(
            credit,
            likelihood=right.to(credit.advantages.dtype) * weight,
            metrics={
                **credit.metrics,
                "actor/correct_nll": mean_over(-rollouts.old_logprobs, right),
            },
        )
