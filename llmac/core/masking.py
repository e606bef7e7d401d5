"""Statistics of what counts: masked mean and variance, whitening, and four ways to average a loss.

Masks are bool and True means "counts". What does not count may hold anything, NaN included.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.types import AllSum, identity

Aggregation = Literal[
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_sum_norm",
]
"""How per-token losses become one number; `aggregate` has the formulas."""


def masked_mean(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    sum_across: AllSum = identity,
) -> Float[Tensor, ""]:
    """Mean of the elements that count, over all ranks.

        mean = Σ mask·x / Σ mask

    Equal elements have exactly their own value as mean, because sums run in float64: a float32 mean
    of equal 0.1s is off by an ulp, and whitening would blow that up into an advantage.

    Args:
        x: anything where `mask` is False, NaN included.
        mask: True = counts.
        sum_across: sums over ranks.

    Returns:
        The mean in the dtype of `x`; 0 if nothing counts.

    >>> masked_mean(torch.tensor([1., 3., 100.]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    return _mean(_wide(x), mask, sum_across).to(x.dtype)


def masked_var(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    unbiased: bool = True,
    sum_across: AllSum = identity,
) -> Float[Tensor, ""]:
    """Variance of the elements that count, over all ranks.

        var = Σ mask·(x - mean)² / (Σ mask - 1)        (unbiased; else / Σ mask)

    Two passes, so a large mean costs no precision.

    Args:
        x: anything where `mask` is False, NaN included.
        mask: True = counts.
        unbiased: divide by one less than the count (Bessel).
        sum_across: sums over ranks.

    Returns:
        The variance in the dtype of `x`, unit of `x` squared; 0 if fewer than two elements count.

    >>> masked_var(torch.tensor([1., 3., 100.]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    return _variance(_wide(x), mask, unbiased, sum_across)[1].to(x.dtype)


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    center: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    sum_across: AllSum = identity,
) -> Float[Tensor, "*shape"]:
    """Zero mean and unit variance over the elements that count, on all ranks together.

        y = (x - mean) / √(var + eps)        (center = False: the mean is added back)

    With `unbiased` and eps = 1e-8 this is verl's `masked_whiten`; OpenRLHF divides by the biased
    variance. Where we deviate: a single counted element gives 0 instead of an error, since its
    variance is taken as 0.

    Args:
        x: anything where `mask` is False, NaN included.
        mask: True = counts.
        center: False keeps the mean and scales only the spread around it, as done for rewards.
        unbiased: variance with Bessel's correction.
        eps: added to the variance, so in the unit of `x` squared.
        sum_across: sums over ranks.

    Returns:
        Whitened elements, unitless; 0 where `mask` is False.

    >>> whiten(torch.tensor([1., 3., 100.]), torch.tensor([True, True, False]))
    tensor([-0.7071,  0.7071,  0.0000])
    """
    wide = _wide(x)
    mean, variance = _variance(wide, mask, unbiased, sum_across)
    white = (wide - mean) * torch.rsqrt(variance + eps)
    if not center:
        white = white + mean
    return white.where(mask, 0.0).to(x.dtype)


def aggregate(
    per_token: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    how: Aggregation,
    *,
    horizon: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """One number from per-token losses, left undivided: `total / weight` is the aggregate.

    With l_it the losses, L_i the counted tokens of row i, N = Σ L_i, S = rows with L_i > 0, H =
    `horizon`:

        token_mean                     Σ_it l_it            / N     tokens weigh the same (DAPO)
        sequence_mean_token_mean       Σ_i (Σ_t l_it / L_i) / S     responses do (GRPO)
        sequence_mean_token_sum        Σ_it l_it            / S
        sequence_mean_token_sum_norm   Σ_it l_it / H        / S     Dr.GRPO, arXiv:2503.20783

    Totals and weights of parts add up to those of the whole, so dividing once by the summed weight
    gives the same gradient for any split of the rows into micro-batches and ranks. Dividing each
    part does not.

    Args:
        per_token: losses; anything where `mask` is False, NaN included.
        mask: True = counts.
        how: which of the four.
        horizon: H, tokens: a constant of the run (`Batch.length_limit`), never the padded width of
            a tensor.

    Returns:
        total: differentiable sum.
        weight: what to divide it by, once, summed over everything: N or S. Equal to
            `aggregation_weight`.

    >>> loss = torch.tensor([[2., 0., 0.], [1., 1., 1.]])
    >>> mask = torch.tensor([[True, False, False], [True, True, True]])
    >>> aggregate(loss, mask, "token_mean", horizon=3)
    (tensor(5.), tensor(4.))
    >>> aggregate(loss, mask, "sequence_mean_token_mean", horizon=3)
    (tensor(3.), tensor(2.))
    """
    counted = per_token.where(mask, 0.0)
    if how == "sequence_mean_token_mean":
        total = (counted.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()
    elif how == "sequence_mean_token_sum_norm":
        total = counted.sum() / horizon
    else:
        total = counted.sum()
    return total, aggregation_weight(mask, how).to(total.dtype)


def aggregation_weight(mask: Bool[Tensor, "B T"], how: Aggregation) -> Float[Tensor, ""]:
    """The additive weight of `aggregate`, known from the mask alone, so before any forward pass.

    Args:
        mask: True = counts.
        how: as for `aggregate`.

    Returns:
        Counted tokens for "token_mean", else rows with at least one counted token.

    >>> aggregation_weight(torch.tensor([[True, True], [False, False]]), "sequence_mean_token_sum")
    tensor(1.)
    """
    if how == "token_mean":
        return mask.sum().float()
    if how in (
        "sequence_mean_token_mean",
        "sequence_mean_token_sum",
        "sequence_mean_token_sum_norm",
    ):
        return mask.any(dim=1).sum().float()
    raise ValueError(
        f"aggregation is one of token_mean, sequence_mean_token_mean, sequence_mean_token_sum, "
        f"sequence_mean_token_sum_norm; found {how!r}"
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # MPS has no float64


def _mean(wide: Tensor, mask: Tensor, sum_across: AllSum) -> Tensor:
    total, count = sum_across(torch.stack([wide.where(mask, 0.0).sum(), mask.sum().to(wide.dtype)]))
    return total / count.clamp(min=1)


def _variance(
    wide: Tensor, mask: Tensor, unbiased: bool, sum_across: AllSum
) -> tuple[Tensor, Tensor]:
    mean = _mean(wide, mask, sum_across)
    squares = (wide - mean).square().where(mask, 0.0).sum()
    total, count = sum_across(torch.stack([squares, mask.sum().to(wide.dtype)]))
    return mean, total / (count - int(unbiased)).clamp(min=1)
