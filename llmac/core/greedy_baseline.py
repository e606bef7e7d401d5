"""Responses with a greedy one beside them: what the policy says when it takes no chances."""

import dataclasses
from dataclasses import dataclass

from llmac.core.measures import Mean, Measure, Sum
from llmac.core.plans import Flat
from llmac.core.protocols import PromptSource, RolloutEngine, Scorer
from llmac.core.types import AllSum, Trajectory, identity


@dataclass(frozen=True, kw_only=True)
class GreedyBaseline:
    """The responses of `flat`, each with the reward of a greedy response to its prompt.

    One more response a prompt is sampled and scored, and is not among the rows. Self-critical
    baselines: Rennie et al. 2017, arXiv:1612.00563.
    """

    flat: Flat
    """Samples the rows."""

    @property
    def length_limit(self) -> int:
        """Response length, tokens, at which sampling is cut."""
        return self.flat.length_limit

    def rollout(
        self,
        engine: RolloutEngine,
        prompts: PromptSource,
        score: Scorer,
        *,
        seed: int,
        sum_across: AllSum = identity,
    ) -> tuple[list[Trajectory], dict[str, Measure]]:
        """Sample and score a step's groups on this rank, and a greedy response to each prompt.

        Args:
            engine: samples.
            prompts: this rank's share of the prompts.
            score: sets the rewards, of greedy responses too.
            seed: of this step and rank.
            sum_across: sums over ranks.

        Returns:
            trajectories: as `Flat` has them, with `baseline_reward`.
            metrics: `rollout/greedy_reward` and `rollout/sampled_tokens`, greedy ones included.

        Raises:
            ValueError: the reward functions had nothing to say of a greedy response.
        """
        drawn = prompts.take(self.flat.prompts_per_step)
        greedy = dataclasses.replace(
            self.flat,
            group_size=1,
            sampling=dataclasses.replace(self.flat.sampling, temperature=0.0),
        )
        alone = greedy.sample(engine, drawn, score, seed=seed, first_group=0)
        groups = self.flat.sample(engine, drawn, score, seed=seed, first_group=0)
        baselines = [_reward(group[0]) for group in alone]
        rows = [
            dataclasses.replace(row, baseline_reward=baseline)
            for group, baseline in zip(groups, baselines, strict=True)
            for row in group
        ]
        sampled = [row for group in (*alone, *groups) for row in group]
        return rows, {
            "rollout/greedy_reward": Mean(sum(baselines), len(baselines)),
            "rollout/sampled_tokens": Sum(float(sum(len(row.response_ids) for row in sampled))),
        }


def _reward(row: Trajectory) -> float:
    if row.reward is None:
        raise ValueError(
            f"the greedy response to prompt {row.prompt.id!r} has no reward to be a baseline; let "
            "a reward function judge every response, or switch the baseline off"
        )
    return row.reward
