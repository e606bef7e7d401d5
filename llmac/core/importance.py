"""Correction for the gap between the engine that sampled and the policy that is trained.

Kernels, precision and staleness make the engine's μ differ from the trainer's π_old for the same
weights. On the policy term, the ratio π_old/μ of a whole response removes the bias; token by token it
corrects each choice, but not which states μ leads to. A bound keeps the variance finite and gives
some bias back.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.losses import MAX_LOG_RATIO


def importance_weights(
    old_logprobs: Float[Tensor, "B T"],
    sampler_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    level: Literal["token", "sequence"],
    kind: Literal["truncate", "mask"],
    low: float | None,
    high: float,
) -> Float[Tensor, "B T"]:
    """Bounded weights π_old/μ to multiply onto the policy loss.

        level "token":     ρ_t = exp(clamp(log π_old(a_t|s_t) - log μ(a_t|s_t), ±20))
        level "sequence":  ρ   = exp(clamp(Σ_t mask · (log π_old - log μ), ±20)), one for all tokens
        kind "truncate":   w = clamp(ρ, low, high)
        kind "mask":       w = ρ if low <= ρ <= high else 0

    Truncated token weights: TIS, Yao et al. 2025; masked ones: IcePop. A sequence ratio is a
    product of as many factors as there are tokens, so bounds that suit tokens drop most long
    responses.

    Args:
        old_logprobs: π_old, the trainer's policy at collection.
        sampler_logprobs: μ, as the engine reports it.
        mask: True = sampled by the policy.
        level: one ratio a token or a response.
        kind: what happens outside the bounds.
        low: lower bound; None = none.
        high: upper bound.

    Returns:
        Constant weights; 0 where `mask` is False.

    >>> trainer, engine = torch.tensor([[-1., -2.]]), torch.tensor([[-2., -1.5]])
    >>> importance_weights(trainer, engine, torch.tensor([[True, True]]),
    ...                    level="token", kind="truncate", low=None, high=2.0)
    tensor([[2.0000, 0.6065]])
    """
    if low is not None and low > high:
        raise ValueError(
            f"bounds of importance weights need low <= high; found low = {low}, high = {high}"
        )
    difference = (old_logprobs - sampler_logprobs).detach().where(mask, 0.0)
    if level == "sequence":
        difference = difference.sum(dim=1, keepdim=True).expand_as(difference)
    elif level != "token":
        raise ValueError(f"level is one of token, sequence; found {level!r}")
    ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if kind == "truncate":
        weights = ratio.clamp(low, high)
    elif kind == "mask":
        weights = ratio.where((ratio <= high) & (ratio >= (low or 0.0)), 0.0)
    else:
        raise ValueError(f"kind is one of truncate, mask; found {kind!r}")
    return torch.where(mask, weights, 0.0)
