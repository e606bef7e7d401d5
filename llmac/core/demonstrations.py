"""A plan that samples nothing: every prompt comes with a completion that somebody wrote."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmac.core.measures import Measure, Sum
from llmac.core.protocols import Demonstration, PromptSource, RolloutEngine, Scorer
from llmac.core.types import AllSum, Finish, Prompt, Trajectory, identity


@dataclass(kw_only=True)
class Demonstrations:
    """Supervised learning: a step's responses are the completions of its prompts.

    A demonstration ended (`Finish.STOP`), has the reward 0 that nobody gave it, and no sampler:
    its `sampler_logprobs` are 0, and mean nothing. Where a run stands is where its prompts stand.
    """

    column: str
    """Of the data, with the completions."""
    append_end: bool
    """Whether a completion gets the end-of-sequence token it lacks."""
    prompts_per_step: int
    """Demonstrations this rank learns from in a step."""
    length_limit: int
    """Longest completion to expect, tokens: the horizon of the losses."""
    completions: Mapping[str, Demonstration] | None = field(default=None, compare=False)
    """Of each prompt, by its id; `build` reads and sets them."""

    def __post_init__(self) -> None:
        """Refuse a plan that would learn from nothing."""
        if self.prompts_per_step < 1:
            raise ValueError(f"prompts_per_step is at least 1; found {self.prompts_per_step}")

    def rollout(
        self,
        engine: RolloutEngine,
        prompts: PromptSource,
        score: Scorer,
        *,
        seed: int,
        sum_across: AllSum = identity,
    ) -> tuple[list[Trajectory], dict[str, Measure]]:
        """The completions of this rank's next prompts. Nothing is sampled and nothing scored.

        Args:
            engine: not asked for anything but its version.
            prompts: this rank's share of the prompts.
            score: not asked.
            seed: without effect.
            sum_across: not used.

        Returns:
            trajectories: one to each prompt, groups numbered from 0.
            metrics: `rollout/sampled_tokens`: 0.

        Raises:
            ValueError: no completions were handed over, or none to one of the prompts.
        """
        drawn = prompts.take(self.prompts_per_step)
        trajectories = [
            _trajectory(prompt, self._completion_of(prompt), group, engine.policy_version)
            for group, prompt in enumerate(drawn)
        ]
        return trajectories, {"rollout/sampled_tokens": Sum(0.0)}

    def _completion_of(self, prompt: Prompt) -> Demonstration:
        if self.completions is None or prompt.id not in self.completions:
            raise ValueError(
                f"no completion of prompt {prompt.id} was handed over; set `completions` to those of "
                "all prompts before the first step"
            )
        return self.completions[prompt.id]


def _trajectory(prompt: Prompt, shown: Demonstration, group: int, version: int) -> Trajectory:
    count = len(shown.token_ids)
    return Trajectory(
        prompt=prompt,
        response_ids=shown.token_ids,
        action_mask=(True,) * count,
        sampler_logprobs=(0.0,) * count,
        finish=Finish.STOP,
        group=group,
        reward=0.0,
        response_text=shown.text,
        policy_version=version,
    )
