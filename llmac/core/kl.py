"""Divergence from the reference policy, estimated from the sampled tokens alone.

Estimators k1, k2, k3: Schulman 2020, "Approximating KL divergence",
http://joschu.net/blog/kl-approx.html.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.losses import MAX_LOG_RATIO

KLKind = Literal["k1", "k2", "k3", "k3+"]
"""Which estimator; `kl_estimate` has the formulas."""


def kl_estimate(
    logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"], kind: KLKind
) -> Float[Tensor, "B T"]:
    """Estimate of KL(π ‖ π_ref) at each token, for tokens sampled from π.

    With d = log π - log π_ref:

        k1  = d                  unbiased, high variance, negative half of the time
        k2  = d² / 2             biased, low variance; its gradient is that of the KL
        k3  = e^{-d} - 1 + d     unbiased, low variance, never negative; -d is clamped to ±20
        k3+ = sg[k3] + k2 - sg[k2]    value of k3, gradient of k2

    In a reward, k1 and k3 have the right mean. As a loss, the gradient of k1 has mean 0 and that of
    k3 belongs to another divergence; k2 and k3+ have the gradient one wants.

    Args:
        logprobs: π, the policy that sampled (or the policy now, when used as a loss).
        ref_logprobs: π_ref, constant.
        kind: which estimator.

    Returns:
        Per-token estimate, nats.

    >>> kl_estimate(torch.tensor([[-1.]]), torch.tensor([[-1.5]]), "k3")
    tensor([[0.1065]])
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return _k3(difference)
    if kind == "k3+":
        square = 0.5 * difference.square()
        return _k3(difference).detach() + (square - square.detach())
    raise ValueError(f"a KL estimator is one of k1, k2, k3, k3+; found {kind!r}")


def kl_shaped_rewards(
    rewards: Float[Tensor, "B T"],
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    coef: float,
    kind: KLKind,
) -> Float[Tensor, "B T"]:
    """Rewards minus the price of leaving the reference, token by token.

        r'_t = r_t - coef · kl_t

    RLHF: Ziegler et al. 2019, arXiv:1909.08593; Stiennon et al. 2020, arXiv:2009.01325.

    Args:
        rewards: r_t.
        logprobs: π_old, the policy at collection.
        ref_logprobs: π_ref.
        action_mask: True = sampled by the policy; other tokens cost nothing.
        coef: unit of reward a nat.
        kind: which estimator.

    Returns:
        Shaped rewards, constant, in the unit of `rewards`.

    >>> policy, reference = torch.tensor([[-1., -1.]]), torch.tensor([[-1.5, -1.]])
    >>> kl_shaped_rewards(torch.tensor([[0., 1.]]), policy, reference, torch.tensor([[True, True]]),
    ...                   coef=0.1, kind="k1")
    tensor([[-0.0500,  1.0000]])
    """
    price = coef * kl_estimate(logprobs, ref_logprobs, kind).detach()
    return rewards - price.where(action_mask, 0.0)


def _k3(difference: Tensor) -> Tensor:
    log_inverse = (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_inverse) - log_inverse
