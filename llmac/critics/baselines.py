"""Critics without parameters: what the siblings earned, and what the prompt earned in earlier steps.

With PPO at λ = γ = 1 and without whitening, `group_mean` is GRPO without the spread and `leave_one_out` is RLOO: the
baselines of those algorithms, as critics.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core import baselines
from llmac.core.measures import Measure, Metrics
from llmac.core.types import CriticTargets, Prompt, Rollouts, Values
from llmac.critics.bench import CriticBench
from llmac.critics.outcomes import (
    PromptOutcome,
    foresight,
    outcomes,
    outside_range,
    prompt_outcomes,
    remaining,
)
from llmac.critics.refusals import refuse_range
from llmac.runtime.context import Runtime

_FILE = "running_mean.json"


@dataclass(frozen=True, kw_only=True)
class GroupMeanConfig:
    """The mean outcome of all responses to the prompt, the one that is judged included."""

    least_group_size: ClassVar[int] = 2
    """Responses to a prompt that it needs: one alone would be compared with itself."""

    def build(self, bench: CriticBench) -> "GroupMean":
        """The live critic."""
        return GroupMean()


@dataclass(frozen=True, kw_only=True)
class LeaveOneOutConfig:
    """The mean outcome of the other responses to the prompt."""

    least_group_size: ClassVar[int] = 2
    """Responses to a prompt that it needs."""

    def build(self, bench: CriticBench) -> "LeaveOneOut":
        """The live critic."""
        return LeaveOneOut()


@dataclass(frozen=True, kw_only=True)
class RunningMeanConfig:
    """An exponential average of what the prompt earned in earlier steps."""

    says_prompt_values: ClassVar[bool] = True
    """A plan may ask it what prompts are worth."""

    rate: float = 0.5
    """Weight of the newest step in a prompt's average: 1 keeps nothing older. Our choice."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest outcome: what a plan is told lies between, and `critic/vf_target_clipfrac` counts outcomes
    beyond. As a baseline averages are what they are."""

    def __post_init__(self) -> None:
        """Refuse an average that never moves, or beyond what it sees."""
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, found {self.rate}")
        refuse_range("reward_range", self.reward_range, "smallest, largest")

    def build(self, bench: CriticBench) -> "RunningMean":
        """The live critic."""
        return RunningMean(self, bench.runtime)


class GroupMean:
    """V(s_0) = mean outcome of the group. Contains the response's own outcome: (G-1)/G of an unbiased advantage."""

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """What is still to come if the response earns what its group does."""
        total, known = outcomes(rollouts)
        return remaining(_sibling_means(total, known, rollouts.group), rollouts, starts)

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        """Nothing learns."""
        return {}


class LeaveOneOut:
    """V(s_0) = mean outcome of the other responses of the group."""

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """What is still to come if the response earns what its siblings do.

        Raises:
            ValueError: a response has no sibling.
        """
        total, known = outcomes(rollouts)
        mean = _sibling_means(total, known, rollouts.group)
        others = mean.clone()
        others[known] = total[known] - baselines.leave_one_out(total[known], rollouts.group[known])
        return remaining(others, rollouts, starts)

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        """Nothing learns."""
        return {}


class RunningMean:
    """V(s_0) = average outcome of the prompt in earlier steps; never of this one.

        m_x ← m_x + rate · (mean outcome of the step - m_x)

    A prompt that was never seen is worth what the *other* prompts of the step earned; before anything is sampled,
    what the last step earned.
    """

    def __init__(self, config: RunningMeanConfig, runtime: Runtime) -> None:
        """Know nothing.

        Args:
            config: settings.
            runtime: the ranks, whose outcomes are all seen by all.
        """
        self._config = config
        self._runtime = runtime
        self._means: dict[str, float] = {}
        low, high = config.reward_range
        self._latest = min(max(0.0, low), high)

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """What is still to come if the response earns what its prompt used to. Collective."""
        found = prompt_outcomes(rollouts, self._runtime)
        known = self._others(found) | self._means
        names = [trajectory.prompt.id for trajectory in rollouts.trajectories]
        expected = [known.get(name, self._latest) for name in names]
        return remaining(rollouts.rewards.new_tensor(expected), rollouts, starts)

    @property
    def reward_range(self) -> tuple[float, float]:
        """Outcome of a failure and of a success."""
        return self._config.reward_range

    def prompt_values(self, prompts: Sequence[Prompt]) -> Float[Tensor, "N"]:
        """The averages inside of `reward_range`; of prompts never seen, what the last step earned."""
        averages = [self._means.get(prompt.id, self._latest) for prompt in prompts]
        return torch.tensor(averages).clamp(*self._config.reward_range)

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        """Targets are not needed: see `observe`."""
        return {}

    def observe(self, rollouts: Rollouts) -> Metrics:
        """Move the averages of the step's prompts. Collective."""
        found = prompt_outcomes(rollouts, self._runtime)
        if not found:
            return {}
        predicted = self.prompt_values([entry.prompt for entry in found])
        known = self._others(found) | self._means
        for entry in found:
            before = known[entry.prompt.id]
            self._means[entry.prompt.id] = before + self._config.rate * (entry.mean - before)
        self._latest = sum(e.mean * e.responses for e in found) / sum(e.responses for e in found)
        limits = self._config.reward_range
        return {**foresight(predicted, found, limits), **outside_range(found, limits)}

    def save(self, directory: Path) -> None:
        """Role `critic` of a checkpoint."""
        if self._runtime.is_main:
            content = {"means": self._means, "latest": self._latest}
            (directory / _FILE).write_text(json.dumps(content))

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint, on any number of ranks."""
        content = json.loads((directory / _FILE).read_text())
        self._means, self._latest = dict(content["means"]), float(content["latest"])

    def _others(self, found: Sequence[PromptOutcome]) -> dict[str, float]:
        """For each prompt of the step, what the others earned; what the last step did, if there is no other."""
        earned = sum(entry.mean * entry.responses for entry in found)
        responses = sum(entry.responses for entry in found)
        return {
            entry.prompt.id: (earned - entry.mean * entry.responses) / (responses - entry.responses)
            if responses > entry.responses
            else self._latest
            for entry in found
        }


def _sibling_means(total: Tensor, known: Tensor, group: Tensor) -> Tensor:
    """Mean known outcome of each row's group; 0 where none is known yet."""
    means = torch.zeros_like(total)
    means[known] = baselines.group_mean(total[known], group[known])[0]
    for row in (~known).nonzero().squeeze(1):
        siblings = known & (group == group[row])
        means[row] = means[siblings].mean() if siblings.any() else 0.0
    return means
