"""What a model said of packed rows, at its place in the batch."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmac.core.types import Rollouts, Values
from llmac.models.packing import PackedRows


def chances_of(
    micro: Iterable[tuple[Tensor, PackedRows]],
    seen: Iterable[Tensor],
    outcomes: Int[Tensor, "B"],
    width: int,
) -> Float[Tensor, "B T"]:
    """Chance of the outcome that each response had, after each of its tokens.

    Args:
        micro: rows of the batch, together all of them, and the same packed.
        seen: chances of all classes at s_0 .. s_T of each of them, [b, T+1, K], on the CPU.
        outcomes: class that each row of the batch turned out to be of.
        width: T of the batch.
    """
    chances = torch.zeros(len(outcomes), width)
    for (index, _), said in zip(micro, seen, strict=True):
        of_outcome = outcomes[index][:, None, None].expand(-1, said.shape[1], 1)
        chances[index, : said.shape[1] - 1] = said.gather(2, of_outcome)[:, 1:, 0]
    return chances


def values_of(
    micro: Iterable[tuple[Tensor, PackedRows]],
    seen: Iterable[Tensor],
    rollouts: Rollouts,
    starts: Bool[Tensor, "B T"],
) -> Values:
    """V(s_t) where `starts`, and V(s_T) for truncated rows.

    Args:
        micro: rows of the batch, together all of them, and the same packed.
        seen: V(s_0) .. V(s_T) of each of them, on the CPU.
        rollouts: the batch.
        starts: where V is asked.
    """
    rows, width = rollouts.response_ids.shape
    at, bootstrap = torch.zeros(rows, width), torch.zeros(rows)
    for (index, packed), values in zip(micro, seen, strict=True):
        at[index, : values.shape[1] - 1] = values[:, :-1]
        bootstrap[index] = values.gather(1, packed.lengths[:, None]).squeeze(1)
    return Values(at=at * starts, starts=starts, bootstrap=bootstrap * rollouts.truncated)
