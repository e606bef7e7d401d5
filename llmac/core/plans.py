"""Which responses are sampled for which prompts. A plan asks an engine; it never imports one."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmac.core.measures import Last, Measure, Sum
from llmac.core.protocols import (
    Completion,
    PromptSource,
    Request,
    RolloutEngine,
    SamplingParams,
    Scorer,
)
from llmac.core.types import AllSum, Prompt, Trajectory, identity

SEED_STRIDE = 1_000_003
"""Distance between the seeds of two steps; a prime above the number of responses of a step."""

Group = list[Trajectory]


@dataclass(frozen=True, kw_only=True)
class Flat:
    """`group_size` independent responses to each prompt: PPO, GRPO, RLOO and most others.

    With `informative_only` this is DAPO's dynamic sampling (Yu et al. 2025, arXiv:2503.14476,
    section 3.2): groups whose rewards are all equal have no advantage and are dropped, and more are
    drawn until every rank is full.
    """

    group_size: int
    """G: responses a prompt."""
    prompts_per_step: int
    """Groups this rank contributes to a step."""
    sampling: SamplingParams
    """How to sample; `n` and `seed` are set by the plan."""
    informative_only: bool = False
    """Drop groups with all-equal rewards and draw others in their place."""
    max_rounds: int = 10
    """After this many rounds, fill up with uninformative groups. 10 in DAPO's recipe."""

    def __post_init__(self) -> None:
        """Refuse plans that can sample nothing or keep nothing."""
        counts = {
            "group_size": self.group_size,
            "prompts_per_step": self.prompts_per_step,
            "max_rounds": self.max_rounds,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is at least 1; found {count}")
        if self.informative_only and self.group_size < 2:
            raise ValueError(
                "informative_only compares siblings; it needs group_size >= 2, found 1"
            )

    @property
    def length_limit(self) -> int:
        """Response length, tokens, at which sampling is cut."""
        return self.sampling.max_new_tokens

    def rollout(
        self,
        engine: RolloutEngine,
        prompts: PromptSource,
        score: Scorer,
        *,
        seed: int,
        sum_across: AllSum = identity,
    ) -> tuple[list[Trajectory], dict[str, Measure]]:
        """Sample and score `prompts_per_step` groups on this rank.

        Ranks go through the rounds in step, each drawing as many prompts as all ranks together
        still miss (at most its share), so that their prompt cursors stay in step and no rank waits
        for one that has stopped.

        Args:
            engine: samples.
            prompts: this rank's share of the prompts.
            score: sets the rewards.
            seed: of this step and rank; same seed, weights and prompts: same responses.
            sum_across: sums over ranks; used with `informative_only`.

        Returns:
            trajectories: siblings adjacent, groups numbered in the order they were sampled.
            metrics: none, or with `informative_only`:
                `rollout/rounds`: draws until every rank was full;
                `rollout/groups_dropped`: all-equal groups not returned;
                `rollout/groups_surplus`: other groups beyond the share, not returned;
                `rollout/groups_filled`: all-equal groups returned for want of better ones;
                `rollout/sampled_tokens`: tokens of all groups, also of those not returned.
        """
        if not self.informative_only:
            groups = self.sample(
                engine, prompts.take(self.prompts_per_step), score, seed=seed, first_group=0
            )
            return _flatten(groups), {}

        informative: list[Group] = []
        uninformative: list[Group] = []
        missing, rounds = self.prompts_per_step, 0
        while missing and rounds < self.max_rounds:
            drawn = len(informative) + len(uninformative)
            for group in self.sample(
                engine, prompts.take(missing), score, seed=seed, first_group=drawn
            ):
                (informative if len({t.reward for t in group}) > 1 else uninformative).append(group)
            rounds += 1
            missing = int(
                sum_across(torch.tensor(max(0, self.prompts_per_step - len(informative))))
            )
            missing = min(missing, self.prompts_per_step)

        kept = informative[: self.prompts_per_step]
        filled = uninformative[: self.prompts_per_step - len(kept)]
        return _flatten(kept + filled), {
            "rollout/rounds": Last(float(rounds)),
            "rollout/groups_dropped": Sum(float(len(uninformative) - len(filled))),
            "rollout/groups_surplus": Sum(float(len(informative) - len(kept))),
            "rollout/groups_filled": Sum(float(len(filled))),
            "rollout/sampled_tokens": Sum(
                float(sum(len(t.response_ids) for t in _flatten(informative + uninformative)))
            ),
        }

    def sample(
        self,
        engine: RolloutEngine,
        prompts: Sequence[Prompt],
        score: Scorer,
        *,
        seed: int,
        first_group: int,
        sizes: Sequence[int] | None = None,
    ) -> list[Group]:
        """Scored responses to each of the prompts.

        Args:
            engine: samples.
            prompts: any number.
            score: sets the rewards.
            seed: of this step and rank.
            first_group: number of the first prompt's group; the step has that many already.
            sizes: responses to each prompt; None: `group_size` to all.

        Raises:
            ValueError: the engine returned fewer or more than it was asked for.
        """
        sizes = [self.group_size] * len(prompts) if sizes is None else sizes
        starts = [0, *itertools.accumulate(sizes)]
        # Every group has a seed of its own; the engine derives those of the siblings from it.
        requests = [
            Request(
                prompt_ids=prompt.token_ids,
                params=dataclasses.replace(
                    self.sampling,
                    n=size,
                    seed=request_seed(seed, first_group * self.group_size + start),
                ),
            )
            for prompt, size, start in zip(prompts, sizes, starts[:-1], strict=True)
        ]
        trajectories = [
            Trajectory(
                prompt=prompt,
                response_ids=completion.token_ids,
                action_mask=(True,) * len(completion.token_ids),
                sampler_logprobs=completion.logprobs,
                finish=completion.finish,
                group=first_group + index,
                policy_version=completion.policy_version,
            )
            for index, (prompt, completions) in enumerate(
                zip(prompts, ask(engine, requests), strict=True)
            )
            for completion in completions
        ]
        scored = score(trajectories)
        return [scored[start:end] for start, end in itertools.pairwise(starts)]


def request_seed(seed: int, number: int) -> int:
    """The seed of one response of a step; below 2^31, the range of every engine.

        (seed · SEED_STRIDE + number) mod 2^31

    Args:
        seed: of the step and rank.
        number: of the response within the step.

    >>> request_seed(1, 5)
    1000008
    """
    return (seed * SEED_STRIDE + number) % 2**31


def ask(engine: RolloutEngine, requests: Sequence[Request]) -> list[list[Completion]]:
    """What the engine answers, after a look at whether that is everything.

    Args:
        engine: samples.
        requests: each for `params.n` completions.

    Raises:
        ValueError: the engine returned fewer or more than it was asked for.
    """
    answers = engine.generate(requests)
    wanted, found = [request.params.n for request in requests], [len(some) for some in answers]
    if found != wanted:
        raise ValueError(
            f"the engine was asked for responses to {len(wanted)} prompts, {sum(wanted)} in all, "
            f"and returned {sum(found)} to {len(found)}"
        )
    return answers


def _flatten(groups: Sequence[Group]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group]
