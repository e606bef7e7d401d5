"""What the rooms hand to each other: prompts, trajectories, batches, values, credit and losses."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmac.core.measures import Measure, Metrics

AllSum = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks. Pure functions that need a global statistic take one; default: `identity`."""


def identity(x: Tensor) -> Tensor:
    """The `AllSum` of a single process.

    >>> from torch import ones
    >>> identity(ones(2))
    tensor([1., 1.])
    """
    return x


class Finish(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    """Terminated: the policy ended it (end-of-sequence or stop string). V(s_T) = 0."""
    LENGTH = "length"
    """Truncated: we stopped looking. The story goes on, and V(s_T) may be asked."""
    PAUSED = "paused"
    """Truncated for this step only: the plan goes on with it in the next. It may have no reward yet."""


Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, tokenized once."""

    id: str
    """Stable name of the row it came from; every error about a response names it."""
    token_ids: tuple[int, ...]
    """What the engine continues."""
    source: str | Messages
    """What reward functions see as the prompt: a string, or chat messages if the dataset had messages."""
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """All other dataset columns of the row, handed to reward functions by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One sampled response. Token ids are the only truth; text is derived from them, never the reverse."""

    prompt: Prompt
    response_ids: tuple[int, ...]
    """[T], the stop token included when there is one."""
    action_mask: tuple[bool, ...]
    """[T], True = sampled by the policy, False = injected (tool output)."""
    sampler_logprobs: tuple[float, ...]
    """[T], log μ(a_t|s_t) as the engine reports it; 0.0 where injected."""
    finish: Finish
    group: int
    """Siblings answer the same prompt; a group never leaves its rank."""
    reward: float | None = None
    """Outcome reward; None until scored."""
    reward_parts: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    """What each reward function said, before weights; None = does not apply."""
    response_text: str = ""
    """Decoded once, when scored."""
    fresh_from: int = 0
    """Response tokens before this index were trained on in an earlier step."""
    policy_version: int = 0
    """Number of weight updates the engine had seen when it sampled this."""
    value_span: tuple[float, float] | None = None
    """(V(start), V(end)) when the plan already knows them: tree edges. None: nobody knows yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Scored trajectories as tensors, before any model has looked at them. Rows keep the order of `trajectories`."""

    response_ids: Int[Tensor, "B T"]
    action_mask: Bool[Tensor, "B T"]
    rewards: Float[Tensor, "B T"]
    """Outcome reward on the last action token; process rewards anywhere."""
    truncated: Bool[Tensor, "B"]
    """Not ended by the policy: cut at the length limit, or paused."""
    group: Int[Tensor, "B"]
    sampler_logprobs: Float[Tensor, "B T"]
    length_limit: int
    """Response length, tokens, at which sampling was cut: the horizon of Dr.GRPO and of overlong shaping."""
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """A `Batch` plus what the trained policy and the reference say about it. Never mutated."""

    response_ids: Int[Tensor, "B T"]
    action_mask: Bool[Tensor, "B T"]
    rewards: Float[Tensor, "B T"]
    truncated: Bool[Tensor, "B"]
    group: Int[Tensor, "B"]
    sampler_logprobs: Float[Tensor, "B T"]
    old_logprobs: Float[Tensor, "B T"]
    """π_old: the trainer's policy at collection. 0 where `action_mask` is False."""
    ref_logprobs: Float[Tensor, "B T"] | None
    """π_ref; None iff the algorithm has `uses_reference` = False."""
    length_limit: int
    trajectories: tuple[Trajectory, ...]

    @classmethod
    def of(
        cls,
        batch: Batch,
        *,
        old_logprobs: Float[Tensor, "B T"],
        ref_logprobs: Float[Tensor, "B T"] | None = None,
    ) -> "Rollouts":
        """The batch, with what policy and reference say about it."""
        same = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return cls(**same, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)

    @property
    def paused(self) -> Bool[Tensor, "B"]:
        """Rows that go on in the next step; their outcome is not known yet."""
        return torch.tensor([t.finish is Finish.PAUSED for t in self.trajectories])

    @property
    def fresh(self) -> Bool[Tensor, "B T"]:
        """Tokens sampled in this step; those before were trained on in an earlier one."""
        first = torch.tensor([t.fresh_from for t in self.trajectories])
        return torch.arange(self.response_ids.shape[1]) >= first[:, None]

    def rows(self, index: Int[Tensor, "R"]) -> "Rollouts":
        """The given rows, cut to the longest response among them."""
        width = max((len(self.trajectories[int(i)].response_ids) for i in index), default=0)
        cut = _select(self, index, width)
        return dataclasses.replace(
            cut, trajectories=tuple(self.trajectories[int(i)] for i in index)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What a critic says about the states asked for."""

    at: Float[Tensor, "B T"]
    """V(s_t) where `starts` is True; anything elsewhere."""
    starts: Bool[Tensor, "B T"]
    """Where a value is known: each True begins a segment."""
    bootstrap: Float[Tensor, "B"]
    """V(s_T) of truncated rows; 0 for terminated ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticTargets:
    """What the critic should have said."""

    returns: Float[Tensor, "B T"]
    value_mask: Bool[Tensor, "B T"]
    old_values: Float[Tensor, "B T"]
    """What it said at collection: the centre of value clipping."""
    gamma: float = 1.0
    """Discount from one asked state to the next, as it is in the returns."""
    bootstraps: Bool[Tensor, "B"] | None = None
    """Rows whose returns contain the critic's value behind the last token; None: the truncated ones."""

    def rows(self, index: Int[Tensor, "R"], width: int) -> "CriticTargets":
        """The given rows, cut to `width` tokens."""
        return _select(self, index, width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Who deserves what. Constant during the update."""

    advantages: Float[Tensor, "B T"]
    policy_mask: Bool[Tensor, "B T"]
    """Tokens that enter the policy loss; a subset of `action_mask`."""
    importance: Float[Tensor, "B T"] | None = None
    """Detached sampler-vs-trainer weights on the policy term; None = 1 everywhere."""
    likelihood: Float[Tensor, "B T"] | None = None
    """Weight of -log π added to the loss of each token; None = 0 everywhere."""
    kl_weight: Float[Tensor, "B T"] | None = None
    """Weight of the KL to the reference, as k3+, added to the loss of each token; None = 0."""
    critic_targets: CriticTargets | None = None
    """None: the critic learns nothing from this step."""
    metrics: Metrics = field(default_factory=dict[str, Measure])

    def rows(self, index: Int[Tensor, "R"], width: int) -> "Credit":
        """The given rows, cut to `width` tokens; critic targets go with them."""
        cut = _select(self, index, width)
        targets = self.critic_targets
        return dataclasses.replace(
            cut, critic_targets=targets.rows(index, width) if targets else None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """An undivided sum. The learner divides once, by the weight of the whole global minibatch."""

    total: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    metrics: Metrics = field(default_factory=dict[str, Measure])


Rows = TypeVar("Rows")


def _select(rows: Rows, index: Tensor, width: int) -> Rows:
    """`dataclasses.replace` with every [B, ...] tensor indexed, and every [B, T] tensor cut to `width`."""
    changes: dict[str, Tensor] = {}
    for entry in dataclasses.fields(rows):  # type: ignore[arg-type]
        value = getattr(rows, entry.name)  # the fields of a dataclass are named only at run time
        if isinstance(value, Tensor):
            changes[entry.name] = value[index, :width] if value.dim() == 2 else value[index]
    return dataclasses.replace(rows, **changes)  # type: ignore[type-var]
