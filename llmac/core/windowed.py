"""Long responses in windows: a step adds some tokens to each, and the unfinished go on in the next.

Nobody waits for the longest response of a step. T-PPO's rollouts, arXiv:2506.15050.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmac.core.growing import continued, refuse_blind_stops
from llmac.core.measures import Mean, Measure, Sum
from llmac.core.plain_trajectory import from_plain, plain, refuse_what_cannot_be_saved
from llmac.core.plans import ask, request_seed
from llmac.core.protocols import (
    PromptSource,
    Request,
    RolloutEngine,
    SamplingParams,
    Scorer,
)
from llmac.core.types import AllSum, Finish, Trajectory, identity


@dataclass(kw_only=True)
class Windowed:
    """At most `window_tokens` new tokens for each of a constant number of responses a step.

    Successive batching: a response that ended is scored, and the next prompt takes its place in the
    next step. One that did not is returned as `Finish.PAUSED`, without a reward, and goes on in the
    next step from prompt + response so far, with the weights of that step. Every token is new in
    exactly one step: `fresh_from` of a trajectory is the number of tokens that were returned before.
    Sampler log-probs of earlier windows are kept; `policy_version` is that of the fresh tokens.

    With a window that holds the longest response nothing is ever paused, and this is `Flat` with
    the groups numbered on from step to step; with `group_size` 1 down to the seeds.

    What is unfinished is remembered from step to step (`core.protocols.Stateful`).
    """

    window_tokens: int
    """Most new tokens a response and step."""
    responses_per_step: int
    """Responses this rank contributes to a step, finished or not."""
    sampling: SamplingParams
    """How to sample; `max_new_tokens` is the length limit of a whole response. `n` and `seed` are
    set by the plan."""
    group_size: int = 1
    """Responses to each prompt. Siblings begin together where there is room and end when they end;
    those in the same step have the same group number, and no other response has it."""
    decode: Callable[[Sequence[int]], str] | None = field(default=None, compare=False)
    """Text of token ids, special tokens included. Needed for stop strings: an engine is asked only
    to continue, and cannot see one that begins in an earlier window."""
    _unfinished: list[Trajectory] = field(default_factory=list[Trajectory], init=False, repr=False)
    """Oldest first. At the end those of drawn prompts that have no tokens yet."""
    _groups: int = field(default=0, init=False, repr=False)
    """Prompts drawn so far: the number of the next group."""

    def __post_init__(self) -> None:
        """Refuse plans that can sample nothing."""
        for name in ("window_tokens", "responses_per_step", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1; found {getattr(self, name)}")

    @property
    def length_limit(self) -> int:
        """Length of a whole response, tokens, at which sampling is cut."""
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
        """Go on with what is unfinished, fill up with new prompts, score what ended.

        All ranks draw as many prompts as the one that lacks most, so that their prompt cursors stay
        in step; what a rank has no place for yet, it keeps for its next steps.

        Args:
            engine: samples.
            prompts: this rank's share of the prompts.
            score: sets the rewards of the finished.
            seed: of this step and rank; same seed, state, weights and prompts: same responses.
            sum_across: sums over ranks; used once.

        Returns:
            trajectories: `responses_per_step` of them, oldest first.
            metrics:
                `rollout/finished`, `rollout/paused`: responses that ended, and that go on;
                `rollout/windows`: mean number of steps a finished response took.

        Raises:
            ValueError: the engine returned another number of responses, stop strings without
                `decode`, or a prompt that cannot be saved with an unfinished response.
        """
        self._fill(prompts, sum_across)
        count = self.responses_per_step
        begun, waiting = self._unfinished[:count], self._unfinished[count:]
        grown = self._continue(engine, begun, seed)
        scored = iter(score([t for t in grown if t.finish is not Finish.PAUSED]))
        step = [t if t.finish is Finish.PAUSED else next(scored) for t in grown]
        paused = [t for t in step if t.finish is Finish.PAUSED]
        ended = [t for t in step if t.finish is not Finish.PAUSED]
        self._unfinished = paused + waiting
        return step, {
            "rollout/finished": Sum(float(len(ended))),
            "rollout/paused": Sum(float(len(paused))),
            "rollout/windows": Mean(
                float(sum(self._windows(len(t.response_ids)) for t in ended)), float(len(ended))
            ),
        }

    def state(self) -> dict[str, Any]:
        """The unfinished responses with their prompts, as plain data."""
        return {"unfinished": [plain(t) for t in self._unfinished], "groups": self._groups}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._unfinished = [from_plain(entry) for entry in state["unfinished"]]
        self._groups = state["groups"]

    def _fill(self, prompts: PromptSource, sum_across: AllSum) -> None:
        missing = max(0, self.responses_per_step - len(self._unfinished))
        lacking = -(-missing // self.group_size)
        for prompt in prompts.take(_largest(lacking, self.responses_per_step, sum_across)):
            refuse_what_cannot_be_saved(prompt, kept="an unfinished response")
            empty = Trajectory(
                prompt=prompt,
                response_ids=(),
                action_mask=(),
                sampler_logprobs=(),
                finish=Finish.PAUSED,
                group=self._groups,
            )
            self._unfinished += [empty] * self.group_size
            self._groups += 1

    def _continue(
        self, engine: RolloutEngine, begun: Sequence[Trajectory], seed: int
    ) -> list[Trajectory]:
        if self.window_tokens < self.length_limit:
            refuse_blind_stops(self.sampling, self.decode, part="window")
        requests = [
            Request(
                prompt_ids=(*t.prompt.token_ids, *t.response_ids),
                params=dataclasses.replace(
                    self.sampling,
                    n=1,
                    max_new_tokens=min(self.window_tokens, self.length_limit - len(t.response_ids)),
                    seed=request_seed(seed, number),
                ),
            )
            for number, t in enumerate(begun)
        ]
        return [
            continued(
                t,
                completion,
                asked=request.params.max_new_tokens,
                sampling=self.sampling,
                decode=self.decode,
            )
            for t, request, (completion,) in zip(
                begun, requests, ask(engine, requests), strict=True
            )
        ]

    def _windows(self, length: int) -> int:
        return max(1, math.ceil(length / self.window_tokens))


def _largest(count: int, most: int, sum_across: AllSum) -> int:
    """The largest count of any rank, 0 ... `most`, found with sums."""
    said = torch.zeros(most + 1, dtype=torch.int64)
    said[count] = 1
    return int(sum_across(said).nonzero().max())
