"""Re-rank and distil: a critic chooses among the policy's own responses, which it then imitates.

The discrete half of PA-RL, policy-agnostic RL (Mark et al. 2024, arXiv:2412.06685): candidates by
the policy, weights by the critic, a supervised loss. With rewards in the critic's place it is RAFT
(Dong et al. 2023, arXiv:2304.06767): the best of n, imitated. Needs: a critic.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llmac.core.diagnostics import explained_variance
from llmac.core.masking import Aggregation
from llmac.core.measures import Last, Mean, Measure
from llmac.core.reranking import candidate_weights
from llmac.core.returns import reward_to_go
from llmac.core.types import AllSum, Credit, CriticTargets, Rollouts, Values, identity

from .base import mean_over
from .likelihood import LikelihoodPolicy


@dataclass(frozen=True, kw_only=True)
class RerankDistill(LikelihoodPolicy):
    """Re-rank and distil: the responses the critic likes best are the next policy's examples.

        Q_i = V(state before the last token of response i)
        w = softmax(Q / temperature) over the top_k of each prompt's responses
        loss = mean over prompts of Σ_i w_i · -log π_θ(response i)

    The critic learns the sum of the rewards from every token on, of all responses. A response is an
    action, and its log-probability a sum over tokens; the mean is over prompts where all have
    equally many candidates, else over candidates. Because V reads all but the last token, a good
    critic knows the outcome as far as the text shows it: what is distilled is its judgement, which
    also ranks responses whose rewards are equal. A prompt that no response solves still has a best.

    From the paper: n candidates, top k, softmax or argmax, supervised loss. Not: candidates moved
    along the critic's gradient, because tokens are discrete; its offline critic (Cal-QL, IQL), in
    whose place a critic of this policy learns from outcomes; one target drawn from the weights,
    where we take all.
    """

    default_critic: ClassVar[str | None] = "value_head"

    group_size: int = 32
    """Candidates sampled for each prompt. 32 in the paper."""
    top_k: int = 10
    """Most of them that are imitated. 10 in the paper."""
    temperature: float = 1.0
    """How much worse a candidate may be for 1/e of the weight, unit of reward; 0: only the best
    counts. 1 in the paper, whose returns span 100; with rewards in [0, 1] that is nearly even."""
    score_by: Literal["critic", "reward"] = "critic"
    """Who ranks. reward: the rewards do, no critic is asked or taught, and it is RAFT."""
    aggregation: Aggregation = "sequence_mean_token_sum"
    """How token losses are averaged over the minibatch. The sum over the tokens of a response is
    the likelihood of the whole."""

    def __post_init__(self) -> None:
        """Refuse a choice among one, and a softness nothing would read."""
        super().__post_init__()
        self._require("group_size", self.group_size >= 2, "at least 2: there must be a choice")
        self._require("top_k", self.top_k >= 1, "at least 1")
        self._require("temperature", 0 <= self.temperature < math.inf, "finite and at least 0")
        self._without_effect("temperature", self.top_k == 1, "set top_k above 1")

    @property
    def wanted_critic(self) -> str | None:
        """None where rewards rank."""
        return self.default_critic if self.uses_values else None

    @property
    def uses_values(self) -> bool:
        """Whether the critic ranks."""
        return self.score_by == "critic"

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """The weight of each candidate, at its tokens, and the critic's targets.

        Raises:
            ValueError: values are missing, not known before a last token, or given and not asked.
        """
        rewards = self.shaped_rewards(rollouts)
        targets: CriticTargets | None = None
        metrics: dict[str, Measure] = {}
        if self.uses_values:
            values = self._known(values)
            scores = self._judged(rollouts, values)
            targets = self._targets(rollouts, values, rewards)
            known = explained_variance(
                targets.old_values, targets.returns, targets.value_mask, sum_across=sum_across
            )
            metrics = {
                "critic/values/mean": mean_over(targets.old_values, targets.value_mask),
                "critic/returns/mean": mean_over(targets.returns, targets.value_mask),
                "critic/vf_explained_var": Last(known),
            }
        else:
            self._refuse_values(values)
            scores = rewards.sum(-1)
        mask = self.policy_mask(rollouts)
        weights = candidate_weights(
            scores,
            rollouts.group,
            mask.any(-1),
            top_k=self.top_k,
            temperature=self.temperature,
        )
        chosen = weights > 0
        credit = self.make_credit(
            rollouts,
            torch.zeros_like(rewards),
            sum_across=sum_across,
            critic_targets=targets,
            metrics={
                **metrics,
                "actor/distilled_reward": Mean(
                    (weights * rollouts.rewards.sum(-1)).sum(), weights.sum()
                ),
            },
        )
        # The learner divides by the number of chosen rows, which would divide a group's weights by
        # how many they are.
        number = (rollouts.group[:, None] == rollouts.group[chosen]).sum(-1)
        return self.imitated(
            credit, (weights * number)[:, None].expand_as(rewards), mask & chosen[:, None]
        )

    def _known(self, values: Values | None) -> Values:
        if values is None:
            raise ValueError(
                "RerankDistill ranks by the values of a critic and got none; set critic: {name: "
                "value_head}, or score_by: reward"
            )
        return values

    def _judged(self, rollouts: Rollouts, values: Values) -> Float[Tensor, "B"]:
        mask = rollouts.action_mask
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(-1, keepdim=True)
        unknown = mask.any(-1) & ~values.starts.gather(1, last).squeeze(1)
        if unknown.any():
            row = int(unknown.nonzero()[0])
            raise ValueError(
                "RerankDistill needs a value before the last token of each response, and of a "
                f"response to prompt {rollouts.trajectories[row].prompt.id!r} there is none; "
                "choose a critic of states, for example value_head"
            )
        return values.at.gather(1, last).squeeze(1)

    def _targets(
        self, rollouts: Rollouts, values: Values, rewards: Float[Tensor, "B T"]
    ) -> CriticTargets:
        mask = values.starts & self.policy_mask(rollouts)
        return CriticTargets(
            returns=reward_to_go(rewards).masked_fill(~mask, 0.0),
            value_mask=mask,
            old_values=values.at.masked_fill(~mask, 0.0),
            bootstraps=torch.zeros_like(rollouts.truncated),
        )
