"""Policy and value losses, per token and undivided; `masking.aggregate` makes one number of them.

All are to be minimised. None of them knows a mask: what does not count is dropped by the
aggregation.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this: far outside any clip range; e^89 would overflow float32."""


def log_ratio(
    logprobs: Float[Tensor, "B T"], old_logprobs: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Log of the importance ratio of each token.

        log ρ_t = clamp(log π_θ(a_t|s_t) - log π_old(a_t|s_t), ±20)

    Args:
        logprobs: policy now.
        old_logprobs: policy at collection, constant.

    Returns:
        Log-ratio, nats.

    >>> log_ratio(torch.tensor([[-1., 0.]]), torch.tensor([[-1.5, -100.]]))
    tensor([[ 0.5000, 20.0000]])
    """
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_log_ratio(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Log of the length-normalised ratio of the whole response, with a gradient for each token.

        s_i = clamp((1/L_i) · Σ_t mask · (log π_θ - log π_old), ±20)
        out_it = sg[s_i] + log π_θ(a_t|s_t) - sg[log π_θ(a_t|s_t)]

    Every token carries the value of the response's ratio and its own gradient. GSPO-token: Zheng et
    al. 2025, arXiv:2507.18071; with one advantage a response its gradient is GSPO's.

    Args:
        logprobs: policy now.
        old_logprobs: policy at collection, constant.
        mask: tokens of the response that count.

    Returns:
        Log-ratio, nats, to be used in place of `log_ratio`; 0 where `mask` is False.

    >>> both = torch.tensor([[True, True]])
    >>> sequence_log_ratio(torch.tensor([[.3, -.1]]), torch.zeros(1, 2), both)
    tensor([[0.1000, 0.1000]])
    """
    difference = (logprobs - old_logprobs).detach().where(mask, 0.0)
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)
    sequence = (difference.sum(dim=1, keepdim=True) / length).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (sequence + (logprobs - logprobs.detach())).where(mask, 0.0)


def clipped_surrogate(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """PPO's clipped objective as a loss: no reward for leaving the clip range.

        l_t = max(-Â_t · ρ_t,  -Â_t · clamp(ρ_t, 1 - clip_low, 1 + clip_high))
        dual clip, for Â_t < 0:  l_t = min(l_t, -dual_clip · Â_t)

    PPO: Schulman et al. 2017, arXiv:1707.06347, eq. 7. Unequal clips: DAPO, Yu et al. 2025,
    arXiv:2503.14476. Dual clip: Ye et al. 2020, arXiv:1912.09729.

    Args:
        log_ratio: from `log_ratio` or `sequence_log_ratio`.
        advantages: Â, constant.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        dual_clip: largest ratio that still pushes down a token with negative advantage; > 1. None:
            no bound.

    Returns:
        loss: per token.
        clipped: True where the clip range took the gradient away. Tokens stopped by the dual clip
            are not among them; those are `(advantages < 0) & (log_ratio.exp() > dual_clip)`.

    >>> ratio, advantages = torch.tensor([[1.5, 0.5]]), torch.ones(1, 2)
    >>> clipped_surrogate(ratio.log(), advantages, clip_low=0.2, clip_high=0.2)
    (tensor([[-1.2000, -0.5000]]), tensor([[ True, False]]))
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"dual_clip is a ratio above 1 (usually 3) or None; found {dual_clip}")
    ratio = log_ratio.exp()
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(free, bounded)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss, bounded > free


def cispo(
    logprobs: Float[Tensor, "B T"],
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    cap_low: float,
    cap_high: float,
) -> Float[Tensor, "B T"]:
    """REINFORCE weighted by a capped, constant ratio: every token keeps its gradient.

        l_t = -sg[clamp(ρ_t, cap_low, cap_high)] · Â_t · log π_θ(a_t|s_t)

    MiniMax-M1 2025, arXiv:2506.13585. Caps are ratios themselves, as in TRL (0 and 5.0 there);
    verl's `clip_ratio` .2/.28 is 0.8 and 1.28 here.

    Args:
        logprobs: policy now.
        log_ratio: from `log_ratio`; its gradient is not used.
        advantages: Â, constant.
        cap_low: smallest weight; 0 = none.
        cap_high: largest weight.

    Returns:
        Loss per token.

    >>> logprobs, ratio = torch.tensor([[-1.]]), torch.tensor([[7.]])
    >>> cispo(logprobs, ratio.log(), torch.ones(1, 1), cap_low=0.0, cap_high=5.0)
    tensor([[5.]])
    """
    return reinforce(logprobs, log_ratio.detach().exp().clamp(cap_low, cap_high) * advantages)


def reinforce(
    logprobs: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The plain policy gradient as a loss.

        l_t = -Â_t · log π_θ(a_t|s_t)

    Williams 1992.

    Args:
        logprobs: policy now.
        advantages: Â, constant.

    Returns:
        Loss per token; its value means nothing, its gradient everything.

    >>> reinforce(torch.tensor([[-0.5]]), torch.tensor([[2.]]))
    tensor([[1.]])
    """
    return -advantages * logprobs


def value_mse(values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Half the squared error of the critic.

        l_t = ½ · (V(s_t) - G_t)²

    Args:
        values: critic now.
        returns: targets, constant.

    Returns:
        Loss per token, unit of reward squared.

    >>> value_mse(torch.tensor([[.5]]), torch.tensor([[1.]]))
    tensor([[0.1250]])
    """
    return 0.5 * (values - returns).square()


def value_clipped(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    *,
    clip: float,
) -> Float[Tensor, "B T"]:
    """The critic's squared error, without reward for moving further than `clip`.

        l_t = ½ · max((V - G)²,  (clamp(V, V_old - clip, V_old + clip) - G)²)

    Unlike the policy's clip, its scale is that of the rewards: 0.2 suits rewards in [0, 1] and
    freezes a critic whose returns are in the hundreds.

    Args:
        values: critic now.
        old_values: critic at collection, constant.
        returns: targets, constant.
        clip: unit of reward.

    Returns:
        Loss per token, unit of reward squared. The gradient is 0 where the clamp binds and its
        error is the larger.

    >>> value_clipped(torch.tensor([[1.2]]), torch.tensor([[.5]]), torch.tensor([[1.]]), clip=0.2)
    tensor([[0.0450]])
    """
    near = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    return torch.maximum(value_mse(values, returns), value_mse(near, returns))
