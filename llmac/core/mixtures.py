"""Sets of rows that weigh what they should in a mean over tokens, however many tokens each has."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmac.core.types import AllSum, identity


def set_weights(
    member: Int[Tensor, "B"],
    mask: Bool[Tensor, "B T"],
    shares: Sequence[float],
    *,
    sum_across: AllSum = identity,
) -> Float[Tensor, "B T"]:
    """Token weights by which the mean over all tokens is a weighted sum of the means over sets.

        w_it = share_k · N / N_k        (1/N) Σ_it w_it x_it = Σ_k share_k · mean_{set k}(x)

    CGI's loss, arXiv:2503.16024, has β for right answers and for refined ones, and 1 - β for
    general data.

    Args:
        member: k, the set of each row.
        mask: tokens that count; N of them, N_k in set k.
        shares: of each set; of one that has no tokens nothing is left over for the others.
        sum_across: sums over ranks.

    Returns:
        Weights, 0 where `mask` is False.

    >>> w = set_weights(torch.tensor([0, 1]), torch.tensor([[True, False], [True, True]]), (0.8, 0.2))
    >>> w
    tensor([[2.4000, 0.0000],
            [0.3000, 0.3000]])
    """
    counts = torch.zeros(len(shares), dtype=torch.float64)
    counts.index_add_(0, member, mask.sum(1).double())
    counts = sum_across(counts)
    each = torch.tensor(shares, dtype=torch.float64) * counts.sum() / counts.clamp(min=1)
    return torch.where(mask, each[member][:, None], 0.0).to(torch.float32)
