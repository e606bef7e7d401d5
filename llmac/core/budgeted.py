"""Groups of different sizes: the responses of a step go to the prompts where they are worth most."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from llmac.core.budget import UTILITIES, Utility, allocate
from llmac.core.measures import Max, Mean, Measure, Sum
from llmac.core.plans import Flat
from llmac.core.protocols import PromptSource, RolloutEngine, Scorer
from llmac.core.types import AllSum, Prompt, Trajectory, identity

_ROUNDING = 1e-4
"""How far from 0 and 1 a chance is not yet worth counting."""


@dataclass(kw_only=True)
class Budgeted:
    """As many responses as `flat` samples, divided by what a critic thinks of the prompts.

    A group never leaves its rank, and every rank divides its own share: all have the same number of
    responses. See `core.budget.allocate`.
    """

    flat: Flat
    """How to sample; its `group_size` is the mean number of responses a prompt."""
    utility: Utility
    """What a response is worth."""
    min_responses: int
    """Each prompt gets at least as many responses."""
    max_responses: int
    """And at most as many."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Outcome of a failure and of a success, the critic's: what makes the value of a prompt a
    chance. Set when the run is built (`AsksPromptValues`)."""
    prompt_values: Callable[[Sequence[Prompt]], Float[Tensor, "N"]] | None = field(
        default=None, compare=False
    )
    """What prompts are worth, in reward units; set when the run is built (`AsksPromptValues`)."""

    def __post_init__(self) -> None:
        """Refuse bounds between which there is no allocation."""
        low, size, high = self.min_responses, self.flat.group_size, self.max_responses
        if not 1 <= low <= size <= high:
            raise ValueError(
                f"min_responses, group_size and max_responses must be rising, from 1 on; found "
                f"{low}, {size} and {high}"
            )
        if self.flat.informative_only:
            raise ValueError(
                "informative_only draws other prompts for those that teach nothing, and a budget "
                "gives them few responses; choose one of the two"
            )

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
        """Sample and score one group a prompt on this rank, sized by the prompt's value.

        Args:
            engine: samples.
            prompts: this rank's share of the prompts.
            score: sets the rewards.
            seed: of this step and rank.
            sum_across: not needed: no rank looks at another's prompts.

        Returns:
            trajectories: siblings adjacent, groups numbered in the order of the prompts.
            metrics:
                `rollout/group_size_max`: responses in the largest group;
                `rollout/budget_gain`: expected utility of the step, as a multiple of that of equal
                groups;
                `rollout/prompt_values_clipped`: prompts whose value is outside `reward_range`, and
                counts as its nearer end.

        Raises:
            ValueError: nobody says what prompts are worth, or a value is NaN.
        """
        taken = prompts.take(self.flat.prompts_per_step)
        chance, clipped = self._chances(taken)
        sizes = allocate(
            chance,
            self.flat.group_size * len(taken),
            minimum=self.min_responses,
            maximum=self.max_responses,
            utility=self.utility,
        )
        groups = self.flat.sample(
            engine, taken, score, seed=seed, first_group=0, sizes=[int(size) for size in sizes]
        )
        of, equal = UTILITIES[self.utility], torch.full_like(chance, self.flat.group_size)
        return [trajectory for group in groups for trajectory in group], {
            "rollout/group_size_max": Max(float(sizes.max())),
            "rollout/budget_gain": Mean(of(sizes.double(), chance).sum(), of(equal, chance).sum()),
            "rollout/prompt_values_clipped": Sum(clipped),
        }

    def _chances(self, prompts: Sequence[Prompt]) -> tuple[Float[Tensor, "N"], float]:
        """Of success, each in [0, 1], and how many of them had to be brought there."""
        if self.prompt_values is None:
            raise ValueError(
                "the responses of a step are divided by what prompts are worth, and the run has no "
                "critic that says so; set critic: {name: prompt_value}, or allocation: equal"
            )
        low, high = self.reward_range
        values = self.prompt_values(prompts).double()
        chance = (values - low) / (high - low)
        if chance.isnan().any():
            worst = int(chance.isnan().nonzero()[0])
            raise ValueError(
                f"the value of a prompt must be a number, and that of prompt {prompts[worst].id} is "
                "NaN; the critic has diverged, or was taught a reward that is: look at critic/* and "
                "reward/* of the steps before"
            )
        outside = (chance < -_ROUNDING) | (chance > 1 + _ROUNDING)
        return chance.clamp(0.0, 1.0), float(outside.sum())
