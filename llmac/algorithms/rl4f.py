"""RL4F: PPO on a critic that writes, for the sake of a frozen model's repaired answers.

Akyürek et al. 2023, arXiv:2305.08844. The frozen actor (`partner_model`) answers; the policy writes
feedback; the actor, greedy, repairs its answer; the feedback's reward is the task's metric of the
repair. Needs: a critic for values, and a `reward` that is the metric.
"""

from dataclasses import dataclass

from llmac.core.refinement import Judge, RepairMode, RepairReward

from .critiquing import CriticLearns
from .ppo import PPO


@dataclass(frozen=True, kw_only=True)
class RL4F(PPO, CriticLearns):
    """RL4F: PPO whose responses are feedback, and whose reward comes from the repaired answer.

        R = S(y')       or S(y') - S(y)       or that, and 1 for an exact repair

    S is the sum of the recipe's reward functions. Advantages, targets and loss are PPO's.

    Deviations: the weight of the KL is fixed, where the authors' adapts it to a target; λ is 1, as
    in `ppo`.
    """

    answer_temperature: float = 0.0
    """Of the actor's first answers. Greedy: our choice, so that a frozen actor is asked once."""
    repair: RepairMode = "abs"
    """abs: S(y'), the paper's for planning and summaries; diff: d = S(y') - S(y); diff_or_exact:
    the larger of d and 1[S(y') >= solved_at] where d >= 0, else d, the paper's for sorting words."""
    kl_coef: float = 0.001
    """The authors' initial weight for sorting words, .01 for their other tasks; theirs adapts."""

    def reward_of_critiques(self) -> Judge:
        """Of the repaired answer."""
        return RepairReward(mode=self.repair)
