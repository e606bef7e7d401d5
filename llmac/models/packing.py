"""Trajectories to model inputs: right-padded rows, and micro-batches that respect a token budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from llmac.core.types import Rollouts, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Prompt + response rows, padded on the right.

    With causal attention a real token never looks at padding that comes after it, so no attention mask is needed and
    the fast causal kernels apply.
    """

    input_ids: Tensor
    """[b, L]"""
    states: Tensor
    """[b, T+1] where the hidden vector of s_t sits in the flattened [b * L]; the last state of the row beyond T_i."""
    response_ids: Tensor
    """[b, T]"""
    action_mask: Tensor
    """[b, T] tokens the policy sampled."""
    lengths: Tensor
    """[b] response tokens T_i."""

    def to(self, device: torch.device) -> "PackedRows":
        """The same rows on another device."""
        return PackedRows(
            input_ids=self.input_ids.to(device),
            states=self.states.to(device),
            response_ids=self.response_ids.to(device),
            action_mask=self.action_mask.to(device),
            lengths=self.lengths.to(device),
        )


def row_tokens(trajectory: Trajectory) -> int:
    """Prompt plus response tokens of one row."""
    return len(trajectory.prompt.token_ids) + len(trajectory.response_ids)


def pack(trajectories: Sequence[Trajectory], *, pad_id: int) -> PackedRows:
    """Padded rows of the given trajectories, in their order.

    The hidden vector of s_t (prompt + response[:t]) is that of its last token: position P - 1 + t of the row.
    """
    rows = len(trajectories)
    length = max(row_tokens(t) for t in trajectories)
    width = max(len(t.response_ids) for t in trajectories)
    input_ids = torch.full((rows, length), pad_id, dtype=torch.long)
    response_ids = torch.full((rows, width), pad_id, dtype=torch.long)
    action_mask = torch.zeros((rows, width), dtype=torch.bool)
    prompt_tokens = torch.tensor([len(t.prompt.token_ids) for t in trajectories])
    lengths = torch.tensor([len(t.response_ids) for t in trajectories])
    for row, trajectory in enumerate(trajectories):
        ids = torch.tensor(trajectory.prompt.token_ids + trajectory.response_ids)
        input_ids[row, : len(ids)] = ids
        response_ids[row, : lengths[row]] = ids[prompt_tokens[row] :]
        action_mask[row, : lengths[row]] = torch.tensor(trajectory.action_mask, dtype=torch.bool)
    steps = torch.minimum(torch.arange(width + 1)[None], lengths[:, None])
    states = torch.arange(rows)[:, None] * length + prompt_tokens[:, None] - 1 + steps
    return PackedRows(
        input_ids=input_ids,
        states=states,
        response_ids=response_ids,
        action_mask=action_mask,
        lengths=lengths,
    )


def packed_micro_batches(
    trajectories: Sequence[Trajectory], *, max_tokens: int, pad_id: int
) -> Iterator[tuple[Tensor, PackedRows]]:
    """Each micro-batch of `micro_batches`: which rows it holds, and the rows packed."""
    for index in micro_batches(trajectories, max_tokens=max_tokens):
        yield index, pack([trajectories[int(row)] for row in index], pad_id=pad_id)


def micro_batches(trajectories: Sequence[Trajectory], *, max_tokens: int) -> list[Tensor]:
    """Row indices of micro-batches whose padded size stays within a token budget.

    Rows are sorted by length first, so that little is padded; a row longer than the budget gets a micro-batch of its
    own. Every row is in exactly one micro-batch.

    Args:
        trajectories: the rows of one minibatch on this rank.
        max_tokens: bound on rows x longest row, padding included.

    Returns:
        Index tensors, shortest rows first.
    """
    sizes = [row_tokens(t) for t in trajectories]
    batches: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)):
        if batches and sizes[row] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [torch.tensor(batch) for batch in batches]


class OfRows(Protocol):
    """What is known of rows besides the rows: `Credit`, `CriticTargets`."""

    def rows(self, index: Tensor, width: int) -> Self:
        """Of the given rows, cut to `width` tokens."""
        ...

    def counting_nothing(self) -> Self:
        """Of rows that are only looked at."""
        ...


Known = TypeVar("Known", bound=OfRows)


def minibatches(rollouts: Rollouts, known: Known, count: int) -> Iterator[tuple[Rollouts, Known]]:
    """Contiguous, near-equal parts of a rank's rows; prompts are already in random order.

    With prompts dealt to ranks in turn, part m of every rank together is part m of one process: the sharding law
    holds for minibatches too. Every rank has `count` parts: where it has fewer rows, its first row, which then counts
    nothing, takes part in those of others.

    Args:
        rollouts: at least one row.
        known: what is learned of them.
        count: optimizer steps a pass.
    """
    for index in torch.arange(len(rollouts.trajectories)).tensor_split(count):
        taken = index if len(index) else torch.tensor([0])
        part = rollouts.rows(taken)
        of_part = known.rows(taken, part.response_ids.shape[1])
        yield part, of_part if len(index) else of_part.counting_nothing()
