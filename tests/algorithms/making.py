"""Small rollouts, values and cards made by hand."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmac.algorithms import ALGORITHMS
from llmac.algorithms.base import Algorithm
from llmac.core.collate import collate
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory, Values

LABELS = {"pacs"}
"""Cards that take rewards of 0 and 1 only."""


def card_class(name: str) -> type[Algorithm]:
    module, cls = ALGORITHMS[name].split(":")
    return getattr(importlib.import_module(module), cls)


def card(name: str, **fields: Any) -> Algorithm:
    return card_class(name)(**fields)


def make_rollouts(
    *,
    rewards: Sequence[float],
    lengths: Sequence[int],
    group: Sequence[int],
    truncated: Sequence[int] = (),
    injected: Sequence[tuple[int, int]] = (),
    length_limit: int = 8,
    reference: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Rollouts:
    """Rows with the given rewards and lengths, and random log-probabilities of all four kinds."""
    random = torch.Generator().manual_seed(seed)
    trajectories = []
    for row, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        mask = tuple((row, t) not in injected for t in range(length))
        sampled = (-3 * torch.rand(length, generator=random)).tolist()
        trajectories.append(
            Trajectory(
                prompt=Prompt(id=f"p{group[row]}", token_ids=(1,), source="?"),
                response_ids=tuple(range(length)),
                action_mask=mask,
                sampler_logprobs=tuple(
                    x if counts else 0.0 for x, counts in zip(sampled, mask, strict=True)
                ),
                finish=Finish.LENGTH if row in truncated else Finish.STOP,
                group=group[row],
                reward=float(reward),
                baseline_reward=0.25,
            )
        )
    batch = collate(trajectories, length_limit=length_limit)

    def near(x: Tensor, spread: float) -> Tensor:
        noise = spread * torch.randn(x.shape, generator=random, dtype=torch.float64)
        return torch.where(batch.action_mask, x.to(dtype) + noise.to(dtype), 0.0)

    old = near(batch.sampler_logprobs, 0.2)
    return Rollouts(
        response_ids=batch.response_ids,
        action_mask=batch.action_mask,
        rewards=batch.rewards.to(dtype),
        truncated=batch.truncated,
        group=batch.group,
        sampler_logprobs=batch.sampler_logprobs.to(dtype),
        old_logprobs=old,
        ref_logprobs=near(old, 0.5) if reference else None,
        length_limit=length_limit,
        trajectories=batch.trajectories,
    )


def ragged(*, dtype: torch.dtype = torch.float64, reference: bool = True) -> Rollouts:
    """Three groups of four: unequal lengths, a truncated row, an injected token, an empty
    response."""
    return make_rollouts(
        rewards=[1, 0, 0, 1, 0.5, 0.25, 0, 0, 1, 0, 1, 1],
        lengths=[3, 8, 2, 5, 8, 1, 4, 6, 2, 7, 0, 4],
        group=[0, 0, 0, 0, 4, 4, 4, 4, 9, 9, 9, 9],
        truncated=[1, 4],
        injected=[(3, 2), (9, 1)],
        dtype=dtype,
        reference=reference,
    )


def labelled(rollouts: Rollouts) -> Rollouts:
    """The same rows, right or wrong and nothing between: for cards that take rewards as labels."""
    return with_rewards(rollouts, [float((t.reward or 0) > 0.3) for t in rollouts.trajectories])


def ragged_for(name: str, *, dtype: torch.dtype = torch.float64) -> Rollouts:
    """`ragged`, with rewards that the card takes."""
    rollouts = ragged(dtype=dtype)
    return labelled(rollouts) if name in LABELS else rollouts


def make_values(rollouts: Rollouts, *, seed: int = 1) -> Values:
    """Random values at every action token; a bootstrap where a row was cut."""
    random = torch.Generator().manual_seed(seed)
    dtype = rollouts.rewards.dtype
    at = torch.rand(rollouts.rewards.shape, generator=random, dtype=torch.float64).to(dtype)
    bootstrap = torch.rand(len(at), generator=random, dtype=torch.float64).to(dtype)
    return Values(
        at=at,
        starts=rollouts.action_mask.clone(),
        bootstrap=torch.where(rollouts.truncated, bootstrap, 0.0),
        outcome_chances=torch.rand(at.shape, generator=random, dtype=torch.float64).to(dtype),
    )


def values_for(algorithm: Algorithm, rollouts: Rollouts) -> Values | None:
    return make_values(rollouts) if algorithm.uses_values else None


def lines(ids: Sequence[int]) -> str:
    """Every token is a sentence of its own; a third of them ends a line, too."""
    return "".join(f"{i}\n" if i % 3 == 2 else f"{i}. " for i in ids)


def segments_of(algorithm: Algorithm, rollouts: Rollouts) -> Tensor:
    """As the loop asks for them."""
    readable = {"decode": lines} if algorithm.reads_text else {}
    return algorithm.segments(rollouts, **readable)


def moved(rollouts: Rollouts, *, spread: float = 0.4, seed: int = 2) -> Tensor:
    """Log-probabilities of a policy that has moved away from the one at collection."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(rollouts.old_logprobs.shape, generator=random, dtype=torch.float64)
    new = rollouts.old_logprobs + spread * noise.to(rollouts.old_logprobs.dtype)
    return new.detach().requires_grad_()


def entropy_of(logprobs: Tensor) -> Tensor:
    """Stands in for an entropy: any positive function of the policy."""
    return 0.5 + logprobs.square()


def with_rewards(rollouts: Rollouts, outcomes: Sequence[float]) -> Rollouts:
    """The same rows with other outcome rewards."""
    changed = [
        dataclasses.replace(t, reward=float(r))
        for t, r in zip(rollouts.trajectories, outcomes, strict=True)
    ]
    batch = collate(changed, length_limit=rollouts.length_limit)
    return dataclasses.replace(
        rollouts, rewards=batch.rewards.to(rollouts.rewards.dtype), trajectories=tuple(changed)
    )


def known(
    *,
    old: Sequence[Sequence[float]],
    rewards: Sequence[float],
    ref: Sequence[Sequence[float]] | None = None,
    sampler: Sequence[Sequence[float]] | None = None,
    injected: Sequence[tuple[int, int]] = (),
    truncated: Sequence[int] = (),
    length_limit: int = 8,
) -> Rollouts:
    """Rows of one group with the given log-probabilities; lists may be ragged."""
    rollouts = make_rollouts(
        rewards=rewards,
        lengths=[len(row) for row in old],
        group=[0] * len(old),
        injected=injected,
        truncated=truncated,
        length_limit=length_limit,
    )
    return dataclasses.replace(
        rollouts,
        old_logprobs=padded(old),
        ref_logprobs=padded(ref if ref is not None else old),
        sampler_logprobs=padded(sampler if sampler is not None else old),
    )


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)
