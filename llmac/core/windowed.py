"""Long responses in windows: a step adds some tokens to each, and the unfinished go on in the next.

Nobody waits for the longest response of a step. T-PPO's rollouts, arXiv:2506.15050.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from llmac.core.measures import Mean, Measure, Sum
from llmac.core.plans import ask, request_seed
from llmac.core.protocols import (
    Completion,
    PromptSource,
    Request,
    RolloutEngine,
    SamplingParams,
    Scorer,
)
from llmac.core.types import AllSum, Finish, Prompt, Trajectory, identity


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
                `rollout/fresh_tokens`: tokens sampled in this step;
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
            "rollout/fresh_tokens": Sum(
                float(sum(len(t.response_ids) - t.fresh_from for t in step))
            ),
            "rollout/windows": Mean(
                float(sum(self._windows(len(t.response_ids)) for t in ended)), float(len(ended))
            ),
        }

    def state(self) -> dict[str, Any]:
        """The unfinished responses with their prompts, as plain data."""
        return {"unfinished": [_plain(t) for t in self._unfinished], "groups": self._groups}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._unfinished = [_from_plain(entry) for entry in state["unfinished"]]
        self._groups = state["groups"]

    def _fill(self, prompts: PromptSource, sum_across: AllSum) -> None:
        missing = max(0, self.responses_per_step - len(self._unfinished))
        lacking = -(-missing // self.group_size)
        for prompt in prompts.take(_largest(lacking, self.responses_per_step, sum_across)):
            _refuse_what_cannot_be_saved(prompt)
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
        if self.sampling.stop and self.decode is None and self.window_tokens < self.length_limit:
            raise ValueError(
                f"stop strings {list(self.sampling.stop)} may begin in one window and end in the "
                "next, which only text shows; set `decode` of the plan, or stop at token ids"
            )
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
            self._grown(t, completion, asked=request.params.max_new_tokens)
            for t, request, (completion,) in zip(
                begun, requests, ask(engine, requests), strict=True
            )
        ]

    def _grown(self, before: Trajectory, completion: Completion, *, asked: int) -> Trajectory:
        fresh_from = len(before.response_ids)
        tokens = (*before.response_ids, *completion.token_ids)
        finish, length = completion.finish, self._stop_place(tokens, fresh_from)
        if length is not None:
            finish = Finish.STOP
        elif finish is Finish.LENGTH and fresh_from + asked < self.length_limit:
            # An engine that stopped short of what it was asked for has no room to go on.
            finish = Finish.PAUSED if len(completion.token_ids) == asked else Finish.LENGTH
        return dataclasses.replace(
            before,
            response_ids=tokens[:length],
            action_mask=(True,) * len(tokens[:length]),
            sampler_logprobs=(*before.sampler_logprobs, *completion.logprobs)[:length],
            finish=finish,
            fresh_from=fresh_from,
            policy_version=completion.policy_version,
        )

    def _stop_place(self, tokens: tuple[int, ...], fresh_from: int) -> int | None:
        """Length at which a stop string is complete that the engine could not see; None: there is none."""
        decode = self.decode
        if decode is None or not self.sampling.stop or fresh_from == 0:
            return None

        def has_stop(length: int) -> bool:
            text = decode(tokens[:length])
            return any(stop in text for stop in self.sampling.stop)

        if not has_stop(len(tokens)):
            return None
        return next(n for n in range(fresh_from + 1, len(tokens) + 1) if has_stop(n))

    def _windows(self, length: int) -> int:
        return max(1, math.ceil(length / self.window_tokens))


def _largest(count: int, most: int, sum_across: AllSum) -> int:
    """The largest count of any rank, 0 ... `most`, found with sums."""
    said = torch.zeros(most + 1, dtype=torch.int64)
    said[count] = 1
    return int(sum_across(said).nonzero().max())


def _plain(trajectory: Trajectory) -> dict[str, Any]:
    prompt = trajectory.prompt
    return {
        "prompt": prompt.id,
        "prompt_ids": torch.tensor(prompt.token_ids, dtype=torch.int64),
        "source": prompt.source,
        "columns": dict(prompt.columns),
        "response_ids": torch.tensor(trajectory.response_ids, dtype=torch.int64),
        "sampler_logprobs": torch.tensor(trajectory.sampler_logprobs, dtype=torch.float64),
        "group": trajectory.group,
    }


def _from_plain(entry: Mapping[str, Any]) -> Trajectory:
    return Trajectory(
        prompt=Prompt(
            id=entry["prompt"],
            token_ids=tuple(entry["prompt_ids"].tolist()),
            source=entry["source"],
            columns=entry["columns"],
        ),
        response_ids=tuple(entry["response_ids"].tolist()),
        action_mask=(True,) * len(entry["response_ids"]),
        sampler_logprobs=tuple(entry["sampler_logprobs"].tolist()),
        finish=Finish.PAUSED,
        group=entry["group"],
    )


def _refuse_what_cannot_be_saved(prompt: Prompt) -> None:
    for name, value in {"prompt": prompt.source, **prompt.columns}.items():
        if not _is_plain(value):
            raise ValueError(
                f"column {name} of prompt {prompt.id} holds a {type(value).__name__}; an unfinished "
                "response is saved with the columns of its prompt, which may be numbers, text, and "
                "lists and dictionaries of these; turn it into text"
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        pairs = cast("dict[object, object]", value).items()
        return all(_is_plain(x) for pair in pairs for x in pair)
    if isinstance(value, list | tuple):
        return all(_is_plain(x) for x in cast("Sequence[object]", value))
    # By type, not isinstance: numpy's float64 is a float, and is saved as something else.
    return value is None or type(value) in (bool, int, float, str, bytes, Tensor)
