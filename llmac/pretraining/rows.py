"""Which stored responses a critic learns from, in which order, on which rank, and what it should have said there."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmac.core.collate import collate
from llmac.core.returns import segment_gae
from llmac.core.segments import every_token
from llmac.core.types import CriticTargets, Rollouts, Trajectory, Values
from llmac.errors import DataError
from llmac.rollout_store import StoredRollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One response a critic can learn from."""

    trajectory: Trajectory
    monte_carlo: tuple[float | None, ...] | None
    """Better estimates of V(s_t) than this response's own outcome, one a token, where there are any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's rows of a chunk."""

    rows: tuple[int, ...]
    counts: tuple[bool, ...]
    """False: stands in so that all ranks have equally many; nothing is learned from it."""


def examples_of(stored: StoredRollouts, path: Path, *, skip_truncated: bool) -> list[Example]:
    """The responses of a file from which values can be learned: judged, and with a token of the policy.

    Args:
        stored: what the file says.
        path: its name, for messages.
        skip_truncated: leave out responses that did not end by themselves, as `algorithm.mask_truncated` does.

    Raises:
        DataError: a response without a reward, or nothing is left.
    """
    unjudged = [t.prompt.id for t in stored.trajectories if t.reward is None]
    if unjudged:
        raise DataError(
            f"{path}: {len(unjudged)} responses have no reward, the first to prompt {unjudged[0]}; a critic learns "
            "from outcomes. Have them scored before they are written, as `llmac rollouts` does"
        )
    estimates = stored.monte_carlo or [None] * len(stored.trajectories)
    examples = [
        Example(trajectory=t, monte_carlo=values)
        for t, values in zip(stored.trajectories, estimates, strict=True)
        if any(t.action_mask) and not (skip_truncated and t.finish != "stop")
    ]
    if not examples:
        raise DataError(
            f"{path}: none of its {len(stored.trajectories)} responses can be learned from: they have no tokens"
            + (", or were cut and algorithm.mask_truncated is set" if skip_truncated else "")
        )
    return examples


def split_by_prompt(
    examples: Sequence[Example], fraction: float, *, seed: int
) -> tuple[list[Example], list[Example]]:
    """(to learn from, held out): all responses to a prompt are on the same side.

    A critic that has seen a prompt's other responses knows how hard the prompt is; on siblings it would look better
    than it is. Prompts are the same if their tokens are, whatever rows of a dataset they come from.

    Args:
        examples: of a file.
        fraction: of the prompts to hold out, rounded; at least one.
        seed: of the choice.

    Raises:
        DataError: there is one prompt only.
    """
    prompts = sorted({e.trajectory.prompt.token_ids for e in examples})
    if len(prompts) < 2:
        raise DataError(
            f"all {len(examples)} responses answer one prompt; whole prompts are held out, so there must be two or more"
        )
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held = set(random.Random(seed).sample(prompts, count))
    learn = [e for e in examples if e.trajectory.prompt.token_ids not in held]
    return learn, [e for e in examples if e.trajectory.prompt.token_ids in held]


def chunks(rows: int, largest: int, *, seed: int, epoch: int) -> list[list[int]]:
    """All row numbers in the order of an epoch, cut into near-equal parts of at most `largest`.

    >>> [len(part) for part in chunks(10, 4, seed=0, epoch=1)]
    [4, 3, 3]
    """
    order = list(range(rows))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    parts = torch.tensor(order).tensor_split(math.ceil(rows / largest))
    return [part.tolist() for part in parts]


def share_of(rows: Sequence[int], *, minibatches: int, rank: int, world_size: int) -> Share:
    """A rank's part of a chunk, such that minibatch m of all ranks together is minibatch m of one process.

    A critic cuts what it is given into `minibatches` contiguous parts of equal size; so each part is made here, dealt
    to the ranks in turn, and filled up with rows that do not count.

    >>> share_of([7, 8, 9, 5, 6], minibatches=2, rank=1, world_size=2)
    Share(rows=(8, 7, 6, 5), counts=(True, False, True, False))
    """
    parts = [part.tolist() for part in torch.tensor(rows).tensor_split(minibatches)]
    width = math.ceil(len(parts[0]) / world_size) * world_size
    dealt: list[tuple[int, bool]] = []
    for part in parts:
        filled = [(row, True) for row in part]
        filled += [(part[0] if part else rows[0], False)] * (width - len(part))
        dealt += filled[rank::world_size]
    return Share(rows=tuple(r for r, _ in dealt), counts=tuple(c for _, c in dealt))


def rollouts_of(examples: Sequence[Example], *, length_limit: int) -> Rollouts:
    """The examples as tensors; the sampler's log-probabilities stand for the policy's, which nobody has asked.

    Args:
        examples: the rows.
        length_limit: of the whole file and not of these rows: critics may look at the share of it that is used up.
    """
    batch = collate([e.trajectory for e in examples], length_limit=length_limit)
    return Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)


def returns_of(
    examples: Sequence[Example],
    rollouts: Rollouts,
    *,
    gamma: float,
    lam: float = 1.0,
    values: Values | None = None,
) -> Tensor:
    """What V(s_t) should have been, [B, T]; a response that was cut counts as ended there.

        G_t = Â_t(λ) + V(s_t),        with λ = 1: G_t = r_t + γ G_{t+1}, whatever V says

    λ = 1 is the target of value pre-training in VC-PPO (arXiv:2503.01491). Where an example has an estimate from
    sampled continuations, it takes the return's place: it is as unbiased, and less noisy.

    Args:
        examples: the rows.
        rollouts: the same as tensors.
        gamma: discount a sampled token.
        lam: trace decay a sampled token.
        values: of the critic as it is; None: λ is 1.
    """
    starts = every_token(rollouts.action_mask)
    # At λ = 1 values cancel, but for rounding.
    at = torch.zeros_like(rollouts.rewards)
    if values is not None and lam < 1:
        at = values.at.where(starts, 0.0)
    ended = torch.zeros(len(examples))
    advantages = segment_gae(
        rollouts.rewards,
        at,
        starts,
        ended,
        gamma=gamma,
        lam=lam,
        action_mask=rollouts.action_mask,
    )
    returns = advantages + at
    for row, example in enumerate(examples):
        for t, estimate in enumerate(example.monte_carlo or ()):
            if estimate is not None:
                returns[row, t] = estimate
    return returns


def targets_of(
    returns: Tensor, values: Values, counts: Sequence[bool], *, gamma: float = 1.0
) -> CriticTargets:
    """The returns at every sampled token of the rows that count; responses cut at the limit end there."""
    mask = values.starts & torch.tensor(counts)[:, None]
    return CriticTargets(
        returns=returns.where(mask, 0.0),
        value_mask=mask,
        old_values=values.at.where(values.starts, 0.0),
        gamma=gamma,
        bootstraps=torch.zeros(len(counts), dtype=torch.bool),
    )
