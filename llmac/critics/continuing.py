"""Fresh continuations of states, judged as the whole responses that they complete."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from llmac.core.continuations import State
from llmac.core.growing import continued, refuse_blind_stops
from llmac.core.measures import Metrics
from llmac.core.protocols import Decode, Request, RolloutEngine, SamplingParams, Scorer
from llmac.core.types import Finish, Trajectory
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
    decode: Decode | None,
    counts: Sequence[int],
    tokens: Sequence[int],
    seeds: Sequence[int],
) -> tuple[list[list[Trajectory]], int]:
    """Continue each state some times, asking the engine once for all of them.

    They end where a response would have ended that was sampled in one go, as windows and trees do
    (`core.growing.continued`): also at a stop string that begins in the state.

    Args:
        engine: holds the policy.
        states: in the order in which the engine is asked.
        score: judges whole responses; it sees no others than these.
        sampling: as in training; `n`, `max_new_tokens` and `seed` do not matter.
        decode: text of token ids; needed for stop strings, not called without them.
        counts: continuations of each state; 0: it is left out.
        tokens: after which a continuation of each state is cut.
        seeds: of each state.

    Returns:
        wholes: for each state its continuations, each behind what came before the state, with the reward of the whole.
            They have the `group` of the response in which the state stands, are fresh from the state on, and have
            log-probs of the sampler all along.
        sampled_tokens: what the engine sampled, with what was cut off behind stop strings.

    Raises:
        EngineError: the engine returned another number of continuations.
        RewardError: a response got no reward.
        ValueError: stop strings without `decode`.
    """
    refuse_blind_stops(sampling, decode, part="part of a response")
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
    wholes = [
        continued(
            _begun(states[index]),
            completion,
            asked=tokens[index],
            # What is cut there is judged as it is: nothing goes on later.
            sampling=replace(sampling, max_new_tokens=states[index].position + tokens[index]),
            decode=decode,
        )
        for index, completions in zip(asked, answers, strict=True)
        for completion in completions
    ]
    sampled = sum(
        len(completion.token_ids) for completions in answers for completion in completions
    )
    judged = iter(score(wholes))
    return [[_rewarded(next(judged)) for _ in range(count)] for count in counts], sampled


def _begun(state: State) -> Trajectory:
    """The response up to the state, nobody knowing how it went on."""
    before = slice(state.position)
    return Trajectory(
        prompt=state.origin.prompt,
        response_ids=state.origin.response_ids[before],
        action_mask=state.origin.action_mask[before],
        sampler_logprobs=state.origin.sampler_logprobs[before],
        finish=Finish.PAUSED,
        group=state.origin.group,
    )


def _rewarded(trajectory: Trajectory) -> Trajectory:
    if trajectory.reward is None:
        raise RewardError(
            f"the scorer gave the response to prompt {trajectory.prompt.id} no reward; a true value needs one"
        )
    return trajectory
