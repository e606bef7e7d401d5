"""Fresh continuations of states, judged as the whole responses that they complete."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from llmac.core.continuations import State
from llmac.core.measures import Metrics
from llmac.core.protocols import Completion, Request, RolloutEngine, SamplingParams, Scorer
from llmac.core.types import Trajectory
from llmac.errors import EngineError, RewardError


@runtime_checkable
class CountingScorer(Scorer, Protocol):
    """A scorer whose counts are reported as those of the step's responses: continuations need one apart."""

    step: int
    """Training step that reward functions are told."""

    def for_evaluation(self) -> "CountingScorer":
        """The same with counts of its own."""
        ...

    def metrics(self) -> Metrics:
        """What was counted since the last call."""
        ...


def continue_states(
    engine: RolloutEngine,
    states: Sequence[State],
    score: Scorer,
    *,
    sampling: SamplingParams,
    counts: Sequence[int],
    tokens: Sequence[int],
    seeds: Sequence[int],
) -> list[list[Trajectory]]:
    """Continue each state some times, asking the engine once for all of them.

    A stop string that begins in the state and ends in its continuation is not seen.

    Args:
        engine: holds the policy.
        states: in the order in which the engine is asked.
        score: judges whole responses; it sees no others than these.
        sampling: as in training; `n`, `max_new_tokens` and `seed` do not matter.
        counts: continuations of each state; 0: it is left out.
        tokens: after which a continuation of each state is cut.
        seeds: of each state.

    Returns:
        For each state its continuations, each behind what came before the state, with the reward of the whole. They
        have the `group` of the response in which the state stands, and log-probs of the sampler all along.

    Raises:
        EngineError: the engine returned another number of continuations.
        RewardError: a response got no reward.
    """
    asked = [index for index, count in enumerate(counts) if count]
    requests = [
        Request(
            prompt_ids=states[index].token_ids,
            params=replace(
                sampling, n=counts[index], max_new_tokens=tokens[index], seed=seeds[index]
            ),
        )
        for index in asked
    ]
    answers = engine.generate(requests)
    for index, completions in zip(asked, answers, strict=True):
        if len(completions) != counts[index]:
            raise EngineError(
                f"the engine was asked for {counts[index]} continuations of a state and returned {len(completions)}"
            )
    judged = iter(
        score(
            [
                _whole(states[index], completion)
                for index, completions in zip(asked, answers, strict=True)
                for completion in completions
            ]
        )
    )
    return [[_rewarded(next(judged)) for _ in range(count)] for count in counts]


def _whole(state: State, completion: Completion) -> Trajectory:
    before = slice(state.position)
    return Trajectory(
        prompt=state.origin.prompt,
        response_ids=(*state.origin.response_ids[before], *completion.token_ids),
        action_mask=(*state.origin.action_mask[before], *[True] * len(completion.token_ids)),
        sampler_logprobs=(*state.origin.sampler_logprobs[before], *completion.logprobs),
        finish=completion.finish,
        group=state.origin.group,
        policy_version=completion.policy_version,
    )


def _rewarded(trajectory: Trajectory) -> Trajectory:
    if trajectory.reward is None:
        raise RewardError(
            f"the scorer gave the response to prompt {trajectory.prompt.id} no reward; a true value needs one"
        )
    return trajectory
