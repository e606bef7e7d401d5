"""Trajectories to model inputs, and micro-batches that respect a token budget: padded, side by side, or as a trie."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from llmac.core.prefixes import distinct_tokens
from llmac.core.types import Rollouts, Trajectory
from llmac.models import trie
from llmac.models.tree_attention import Paths, arguments, follow_paths, logger, name_of, why_not
from llmac.models.trie import Trie

Kind = Literal["auto", "trie", "varlen", "padded"]

WORTH_SHARING = 0.8
"""`auto` makes a trie of rows if it has at most this part of their padded tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Prompt + response rows as a model reads them.

    Padded: one row after the other, padded on the right. With causal attention a real token never looks at padding
    that comes after it, so no attention mask is needed and the fast causal kernels apply.

    Along paths: one sequence of nodes, through which rows run; several rows may have a state in common.
    """

    input_ids: Tensor
    """[b, L], or [1, N] nodes."""
    states: Tensor
    """[b, T+1] where the hidden vector of s_t sits in the flattened `input_ids`; the last state of the row beyond
    T_i."""
    response_ids: Tensor
    """[b, T]"""
    action_mask: Tensor
    """[b, T] tokens the policy sampled."""
    lengths: Tensor
    """[b] response tokens T_i."""
    paths: Paths | None = None
    """Who looks at whom; None: padded rows."""

    def inputs(self) -> dict[str, Any]:
        """What to call a transformers model with."""
        along = {} if self.paths is None else arguments(self.paths)
        return {"input_ids": self.input_ids, "use_cache": False, **along}

    def to(self, device: torch.device) -> "PackedRows":
        """The same rows on another device."""
        return PackedRows(
            input_ids=self.input_ids.to(device),
            states=self.states.to(device),
            response_ids=self.response_ids.to(device),
            action_mask=self.action_mask.to(device),
            lengths=self.lengths.to(device),
            paths=None if self.paths is None else self.paths.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How rows become model inputs. Changes speed and memory, never what is said of a row or learned from it."""

    kind: Kind = "padded"
    """`trie`: each distinct (prefix, token) once; `varlen`: rows side by side without padding; `padded`; `auto`: a trie
    where that saves a fifth of the padded tokens, and always padded on CUDA, where that was never measured, and with
    models that turn out not to see what rows share."""
    max_tokens: int
    """Bound on the tokens of a micro-batch: distinct ones in a trie, else rows x longest row or their sum. A longer row
    stands alone. Rows of a trie may look at `trie.REACH` times as many."""
    pad_id: int
    """Any token id; padding is never looked at."""

    def fitting(self, *models: nn.Module, device: torch.device | str = "cpu") -> "Packing":
        """This packing if all models can read it, else a padded one; only if all can is their attention made ready.

        A model that cannot is named in the log. What only a forward pass shows, `path_probe.settled` finds out.

        Args:
            models: all that will read the same rows.
            device: where they will be.
        """
        if self.kind == "padded":
            return self
        if self.kind == "auto" and torch.device(device).type == "cuda":
            logger.info(
                "rows are padded: tries are not measured on CUDA yet; try actor.packing: trie"
            )
            return replace(self, kind="padded")
        for model in models:
            reason = why_not(model)
            if reason is not None:
                logger.info(
                    "%s reads padded rows, prefixes are not shared: %s", name_of(model), reason
                )
                return replace(self, kind="padded")
        for model in models:
            follow_paths(model)
        return self

    def micro_batches(self, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        """Row indices of micro-batches within the budget. Every row is in exactly one."""
        kind = self.kind
        if kind == "auto":
            batches = micro_batches(trajectories, max_tokens=self.max_tokens)
            padded = sum(_padded([trajectories[i] for i in batch.tolist()]) for batch in batches)
            if distinct_tokens(_ids(trajectories)) > WORTH_SHARING * padded:
                return batches
            kind = "trie"
        if kind == "padded":
            return micro_batches(trajectories, max_tokens=self.max_tokens)
        if kind == "varlen":
            return _side_by_side(trajectories, max_tokens=self.max_tokens)
        begins = [len(t.prompt.token_ids) for t in trajectories]
        found = trie.bins(_ids(trajectories), begins, max_tokens=self.max_tokens)
        return [torch.tensor(rows) for rows in found]

    def pack(self, trajectories: Sequence[Trajectory]) -> PackedRows:
        """The given trajectories, one of `micro_batches`; results come in their order."""
        kind = self.kind
        if kind == "auto":
            padded = _padded(trajectories)
            worth = distinct_tokens(_ids(trajectories)) <= WORTH_SHARING * padded
            too_wide = padded > self.max_tokens and len(trajectories) > 1
            kind = "trie" if worth or too_wide else "padded"
        if kind == "padded":
            return pack(trajectories, pad_id=self.pad_id)
        return pack_along_paths(trajectories, pad_id=self.pad_id, share=kind == "trie")

    def packed(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[Tensor, PackedRows]]:
        """Each micro-batch: which rows it holds, and the rows packed."""
        for index in self.micro_batches(trajectories):
            yield index, self.pack([trajectories[int(row)] for row in index])


def row_tokens(trajectory: Trajectory) -> int:
    """Prompt plus response tokens of one row."""
    return len(trajectory.prompt.token_ids) + len(trajectory.response_ids)


def pack(trajectories: Sequence[Trajectory], *, pad_id: int) -> PackedRows:
    """Padded rows of the given trajectories, in their order.

    The hidden vector of s_t (prompt + response[:t]) is that of its last token: position P - 1 + t of the row.
    """
    rows = nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids in _ids(trajectories)], batch_first=True, padding_value=pad_id
    )
    return _asked(trajectories, rows, torch.arange(rows.numel()).view_as(rows), pad_id=pad_id)


def pack_along_paths(
    trajectories: Sequence[Trajectory], *, pad_id: int, share: bool = True
) -> PackedRows:
    """The given trajectories as a trie, or side by side without sharing anything."""
    grown = Trie.of(_ids(trajectories), share=share)
    rows = _asked(trajectories, grown.tokens[None], grown.paths, pad_id=pad_id)
    return replace(rows, paths=Paths.of(grown))


def _asked(
    trajectories: Sequence[Trajectory], input_ids: Tensor, places: Tensor, *, pad_id: int
) -> PackedRows:
    """Rows whose token j is at `places[row, j]` of the flattened input."""
    width = max(len(t.response_ids) for t in trajectories)
    response_ids = torch.full((len(trajectories), width), pad_id, dtype=torch.long)
    action_mask = torch.zeros((len(trajectories), width), dtype=torch.bool)
    for row, trajectory in enumerate(trajectories):
        length = len(trajectory.response_ids)
        response_ids[row, :length] = torch.tensor(trajectory.response_ids, dtype=torch.long)
        action_mask[row, :length] = torch.tensor(trajectory.action_mask, dtype=torch.bool)
    prompt_tokens = torch.tensor([len(t.prompt.token_ids) for t in trajectories])
    lengths = torch.tensor([len(t.response_ids) for t in trajectories])
    steps = torch.minimum(torch.arange(width + 1)[None], lengths[:, None])
    return PackedRows(
        input_ids=input_ids,
        states=places.gather(1, prompt_tokens[:, None] - 1 + steps),
        response_ids=response_ids,
        action_mask=action_mask,
        lengths=lengths,
    )


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


def _side_by_side(trajectories: Sequence[Trajectory], *, max_tokens: int) -> list[Tensor]:
    """Micro-batches whose tokens together stay within the budget, rows of similar length together."""
    sizes = [row_tokens(t) for t in trajectories]
    batches: list[list[int]] = []
    used = 0
    for row in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)):
        used += sizes[row]
        if not batches or used > max_tokens:
            batches.append([])
            used = sizes[row]
        batches[-1].append(row)
    return [torch.tensor(batch) for batch in batches]


def _ids(trajectories: Sequence[Trajectory]) -> list[tuple[int, ...]]:
    return [(*t.prompt.token_ids, *t.response_ids) for t in trajectories]


def _padded(trajectories: Sequence[Trajectory]) -> int:
    return len(trajectories) * max(map(row_tokens, trajectories))


class OfRows(Protocol):
    """What is known of rows besides the rows: `Credit`, `CriticTargets`."""

    def rows(self, index: Tensor, width: int) -> Self:
        """Of the given rows, cut to `width` tokens."""
        ...

    def counting_nothing(self) -> Self:
        """Of rows that are only looked at."""
        ...


Known = TypeVar("Known", bound=OfRows)


def minibatches(
    rollouts: Rollouts, known: Known, count: int, *, whole_groups: bool = False
) -> Iterator[tuple[Rollouts, Known]]:
    """Contiguous, near-equal parts of a rank's rows; prompts are already in random order.

    With prompts dealt to ranks in turn, part m of every rank together is part m of one process: the sharding law
    holds for minibatches too. Every rank has `count` parts: where it has fewer rows, its first row, which then counts
    nothing, takes part in those of others.

    Args:
        rollouts: at least one row.
        known: what is learned of them.
        count: optimizer steps a pass.
        whole_groups: siblings, which are neighbours, stay in one part: near-equal in groups, not in rows.
    """
    units = rollouts.group.unique_consecutive(return_inverse=True)[1]
    if not whole_groups:
        units = torch.arange(len(rollouts.trajectories))
    for part_units in torch.arange(int(units.max()) + 1).tensor_split(count):
        index = torch.isin(units, part_units).nonzero()[:, 0]
        taken = index if len(index) else torch.tensor([0])
        part = rollouts.rows(taken)
        of_part = known.rows(taken, part.response_ids.shape[1])
        yield part, of_part if len(index) else of_part.counting_nothing()
