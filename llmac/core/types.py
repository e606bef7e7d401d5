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
    """Truncated in this row only: the plan goes on with it, in the next step (windows) or in other rows of this one
    (edges of a tree). It may have no reward."""


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
    """Siblings answer the same prompt; a group is never split over ranks."""
    reward: float | None = None
    """Outcome reward; None until scored."""
    reward_parts: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    """What each reward function said, before weights; None = does not apply."""
    response_text: str = ""
    """Decoded once, when scored."""
    fresh_from: int = 0
    """Response tokens before this index are trained on elsewhere: in an earlier step, or in another row of this one
    (edges of a tree)."""
    policy_version: int = 0
    """Number of weight updates the engine had seen when it sampled this."""
    value_span: tuple[float, float] | None = None
    """(V(start), V(end)) when the plan already knows them: edges of a tree, from `fresh_from` to the end. None: nobody
    knows yet."""
    sibling_std: float | None = None
    """Population standard deviation of V(end) over the edges of the same parent; None: not an edge of a tree."""
    baseline_reward: float | None = None
    """Reward of a greedy response to the same prompt, which is no row of its own; None: nobody asked for one."""
    age: int = 0
    """Steps since it was sampled. Above 0 it is replayed, and π_old is what the sampler said then."""


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
    """π_old: the trainer's policy at collection; in replayed rows, the sampler's. 0 where `action_mask` is False."""
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
        """Rows that go on elsewhere; they have no outcome of their own."""
        return torch.tensor([t.finish is Finish.PAUSED for t in self.trajectories])

    @property
    def fresh(self) -> Bool[Tensor, "B T"]:
        """Tokens that are this row's to train on; those before are trained on elsewhere."""
        first = torch.tensor([t.fresh_from for t in self.trajectories])
        return torch.arange(self.response_ids.shape[1]) >= first[:, None]

    @property
    def replayed(self) -> Bool[Tensor, "B"]:
        """Rows that were sampled in an earlier step, by an earlier policy."""
        return torch.tensor([t.age > 0 for t in self.trajectories])

    def rows(self, index: Int[Tensor, "R"]) -> "Rollouts":
        """The given rows, cut to the longest response among them."""
        width = max((len(self.trajectories[int(i)].response_ids) for i in index), default=0)
        cut = _select(self, index, width)
        return dataclasses.replace(
            cut, trajectories=tuple(self.trajectories[int(i)] for i in index)
        )

    def joined(self, others: "Rollouts") -> "Rollouts":
        """These rows and behind them the others, padded to the longest."""
        both = self.trajectories + others.trajectories
        return dataclasses.replace(_join(self, others), trajectories=both)


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What a critic says about the states asked for."""

    at: Float[Tensor, "B T"]
    """V(s_t) where `starts` is True; anything elsewhere."""
    starts: Bool[Tensor, "B T"]
    """Where a value is known: each True begins a segment."""
    bootstrap: Float[Tensor, "B"]
    """V(s_T) of truncated rows; 0 for terminated ones."""
    outcome_chances: Float[Tensor, "B T"] | None = None
    """Chance of the outcome that the response had, as it is seen after a_t: it knows action and outcome, V knows
    neither. None: the critic has no classes of outcomes."""

    def joined(self, others: "Values") -> "Values":
        """Those of `Rollouts.joined`."""
        return _join(self, others)


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

    def counting_nothing(self) -> "CriticTargets":
        """The same rows, none of which is a lesson: what a rank without rows takes part with."""
        return dataclasses.replace(self, value_mask=torch.zeros_like(self.value_mask))


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
    kl_scale: Float[Tensor, "B T"] | None = None
    """What the card's own KL term (kl_coef) of each token weighs against the policy term; None = 1 everywhere."""
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

    def counting_nothing(self) -> "Credit":
        """The same rows, none of which counts: what a rank without rows takes part with."""
        return dataclasses.replace(self, policy_mask=torch.zeros_like(self.policy_mask))


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


def _join(rows: Rows, others: Rows) -> Rows:
    """`dataclasses.replace` with [B, ...] tensors one behind the other, [B, T] ones padded with 0 to the wider."""
    changes: dict[str, Tensor] = {}
    for entry in dataclasses.fields(rows):  # type: ignore[arg-type]
        parts = getattr(rows, entry.name), getattr(others, entry.name)
        if not isinstance(parts[0], Tensor):
            continue
        if parts[0].dim() == 2:
            width = max(part.shape[1] for part in parts)
            parts = tuple(
                torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts
            )
        changes[entry.name] = torch.cat(parts)
    return dataclasses.replace(rows, **changes)  # type: ignore[type-var]
