"""CodeRL: a critic of outcomes weighs the tokens (Le et al. 2022, arXiv:2207.01780).

Made for programs, whose outcome is one of four: does not compile, crashes, fails a test, passes.
REINFORCE against a greedy response, each token weighted by how clearly it shows what came of the
whole. Needs: a critic with classes of outcomes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.greedy_baseline import GreedyBaseline
from llmac.core.masking import Aggregation
from llmac.core.measures import Measure
from llmac.core.plans import Flat
from llmac.core.protocols import RolloutPlan, SamplingParams
from llmac.core.types import AllSum, Credit, CriticTargets, Rollouts, Values, identity

from .base import mean_over
from .score_function import ScoreFunctionPolicy


@dataclass(frozen=True, kw_only=True)
class CodeRL(ScoreFunctionPolicy):
    """CodeRL: token weights of an outcome classifier, times what was gained over a greedy response.

        q_t = softmax(e_t)_u                    u: the outcome the response had
        Â_t = q_t · (r(response) - r(greedy))   (relative_returns: false: q_t · r(response))
        l_t = -Â_t · log π_θ(a_t|s_t),          averaged over the tokens of a response

    e_t are the critic's outputs after it has read token t, and u is known when credit is given: q is
    like a Q, not a V. It multiplies gains and losses alike, so that a failure is punished where it
    shows. The critic learns at the last token of each response, which outcome it had; with
    `code_outcomes` that is the classifier of the paper.

    Where we deviate: the paper samples and classifies once, before training, with a critic that
    then stays as it is (`teach_critic: false` and `critic.init`), and every other step learns a
    given program; here responses are the policy's own of each step. No ratio corrects a policy that
    has moved on: leave `actor.epochs` and `actor.minibatches` at 1.
    """

    default_critic: ClassVar[str | None] = "code_outcomes"
    uses_outcome_chances: ClassVar[bool] = True
    """Whether the critic must have classes of outcomes."""

    group_size: int = 4
    """Responses sampled for each prompt, the greedy one not counted. Our choice; the paper trains
    on a stored set of about 20."""
    relative_returns: bool = True
    """Whether the reward of a greedy response to the same prompt, sampled beside the others, is
    subtracted. On in the paper."""
    teach_critic: bool = True
    """Whether the critic learns along. False in the paper: then give `critic.init` a trained one."""
    aggregation: Aggregation = "sequence_mean_token_mean"
    """How token losses are averaged over the minibatch. The mean over the tokens of a program: the
    paper's."""

    @property
    def teaches_critic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - a constant of most cards
        """Whether the critic learns along: `teach_critic`."""
        return self.teach_critic

    def plan(self, *, prompts_per_step: int, sampling: SamplingParams) -> RolloutPlan:
        """`group_size` samples for each of this rank's prompts, and a greedy one to compare with."""
        flat = Flat(
            group_size=self.group_size, prompts_per_step=prompts_per_step, sampling=sampling
        )
        return GreedyBaseline(flat=flat) if self.relative_returns else flat

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """What the response gained, at each token as far as it shows there.

        Raises:
            ValueError: the critic says no chances of outcomes, or there is no greedy response.
        """
        if values is None or values.outcome_chances is None:
            raise ValueError(
                "CodeRL needs to know how likely each outcome was after each token, and got "
                f"{'no values' if values is None else 'values alone'}; set critic: code_outcomes"
            )
        gained = self.shaped_rewards(rollouts).sum(-1)
        if self.relative_returns:
            gained = gained - self._baselines(rollouts).to(gained)
        mask, starts = self.policy_mask(rollouts), values.starts & rollouts.action_mask
        last = _last_of(starts) & mask
        targets = CriticTargets(
            returns=rollouts.rewards.sum(-1, keepdim=True) * last,
            value_mask=last,
            old_values=values.at.masked_fill(~starts, 0.0),
            bootstraps=torch.zeros_like(rollouts.truncated),
        )
        metrics: dict[str, Measure] = {
            "critic/outcome_chance": mean_over(values.outcome_chances, mask),
        }
        return self.make_credit(
            rollouts,
            values.outcome_chances.to(gained) * gained[:, None],
            sum_across=sum_across,
            critic_targets=targets if self.teaches_critic else None,
            metrics=metrics,
        )

    def _baselines(self, rollouts: Rollouts) -> Float[Tensor, "B"]:
        rewards = [trajectory.baseline_reward for trajectory in rollouts.trajectories]
        for trajectory, reward in zip(rollouts.trajectories, rewards, strict=True):
            if reward is None:
                raise ValueError(
                    "CodeRL compares with a greedy response, and a response to prompt "
                    f"{trajectory.prompt.id!r} has none beside it; set relative_returns to false"
                )
        return torch.tensor(rewards)


def _last_of(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    behind = mask.flip(1).cumsum(1).flip(1)  # counted tokens from here on
    return mask & (behind == 1)
