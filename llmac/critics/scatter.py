"""What a model said of packed rows, at its place in the batch."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

from llmac.core.types import Rollouts, Values
from llmac.models.packing import PackedRows


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
