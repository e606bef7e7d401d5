"""How far a critic's outputs are from the returns: per token, undivided, all to be minimised.

`losses.py` has the squared error; here are its robust, quantile and probabilistic relatives.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def squared(error: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half the squared error.

        l = ½ · e²

    >>> squared(torch.tensor([2.0]))
    tensor([2.])
    """
    return 0.5 * error.square()


def huber(error: Float[Tensor, "*shape"], *, delta: float) -> Float[Tensor, "*shape"]:
    """Half the squared error up to `delta`, linear beyond: an outlier pulls no harder than delta.

        l = ½ · e²                  |e| <= δ
        l = δ · (|e| - ½ · δ)       otherwise

    Huber 1964.

    Args:
        error: value minus return.
        delta: unit of the error.

    >>> huber(torch.tensor([0.3, 1.0]), delta=0.5)
    tensor([0.0450, 0.3750])
    """
    size = error.abs()
    return torch.where(size <= delta, 0.5 * error.square(), delta * (size - 0.5 * delta))


def near(
    values: Float[Tensor, "*shape"], old_values: Float[Tensor, "*shape"], *, clip: float
) -> Float[Tensor, "*shape"]:
    """The values, moved no further than `clip` from the old ones.

        clamp(V, V_old - clip, V_old + clip)

    >>> near(torch.tensor([0.9]), torch.tensor([0.5]), clip=0.2)
    tensor([0.7000])
    """
    return torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)


def either(
    free: Float[Tensor, "*shape"],
    clipped: Float[Tensor, "*shape"],
    *,
    how: Literal["max", "mean"],
) -> Float[Tensor, "*shape"]:
    """One loss from that of the value and that of the clipped value.

        max     the larger: no reward for moving further than the clip (PPO)
        mean    their average: half the gradient remains where the clip binds (SAFE)

    SAFE: arXiv:2602.04651, as its code does it.

    >>> either(torch.tensor([0.4]), torch.tensor([0.2]), how="mean")
    tensor([0.3000])
    """
    return torch.maximum(free, clipped) if how == "max" else 0.5 * (free + clipped)


def cross_entropy(
    logits: Float[Tensor, "*shape K"], probabilities: Float[Tensor, "*shape K"]
) -> Float[Tensor, "*shape"]:
    """How badly a softmax foresees a distribution; at best its entropy, not 0.

        l = -Σ_k q_k · log softmax(z)_k,        ∂l/∂z = softmax(z) - q

    Args:
        logits: z.
        probabilities: q, constant.

    >>> cross_entropy(torch.zeros(4), torch.tensor([0.0, 0.0, 0.5, 0.5]))
    tensor(1.3863)
    """
    return -(probabilities * logits.log_softmax(dim=-1)).sum(dim=-1)


def binary_cross_entropy(
    logits: Float[Tensor, "*shape"], chance: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """How badly σ(z) foresees an event that happens with a given chance, which need not be 0 or 1.

        l = -p · log σ(z) - (1 - p) · log σ(-z),        ∂l/∂z = σ(z) - p

    Args:
        logits: z.
        chance: p, in [0, 1], constant.

    >>> binary_cross_entropy(torch.tensor([0.4]), torch.tensor([0.25]))
    tensor([0.8130])
    """
    return torch.nn.functional.softplus(logits) - chance * logits


def quantile_huber(
    quantiles: Float[Tensor, "*shape N"], returns: Float[Tensor, "*shape"], *, kappa: float
) -> Float[Tensor, "*shape N"]:
    """Pulls each output towards its quantile of the returns.

        u_i = G - θ_i,    τ_i = (i + ½) / N
        l_i = |τ_i - 1[u_i < 0]| · Huber_κ(u_i) / κ        κ = 0: |τ_i - 1[u_i < 0]| · |u_i|

    QR-DQN: Dabney et al. 2018, arXiv:1710.10044, eq. 10.

    Args:
        quantiles: θ, unit of reward.
        returns: G, constant.
        kappa: errors below are squared, unit of reward. Where it is as wide as the returns spread,
            the outputs are expectiles, and their average is not the mean return.

    Returns:
        Loss of each output.

    >>> quantile_huber(torch.tensor([0.0, 0.0]), torch.tensor(2.0), kappa=1.0)
    tensor([0.3750, 1.1250])
    """
    count = quantiles.shape[-1]
    levels = (torch.arange(count, device=quantiles.device) + 0.5).to(quantiles) / count
    error = returns[..., None] - quantiles
    size = huber(error, delta=kappa) / kappa if kappa > 0 else error.abs()
    return (levels - (error < 0).to(levels)).abs() * size


def gaussian_nll(
    mean: Float[Tensor, "*shape"],
    deviation: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    *,
    reach: float | None = None,
) -> Float[Tensor, "*shape"]:
    """How badly a normal distribution foresees the returns.

        l = ½ · log(2π·σ²) + (G - μ)² / 2σ²

    With `reach`, σ learns from returns no further than that from μ, and μ from all:

        l = ½ · (G - μ)² / sg[σ]²  +  ½ · log(2π·σ²) + (clamp(G, μ ± reach) - sg[μ])² / 2σ²

    whose value counts the error twice and whose gradient does not. A distributional critic of DSAC's
    kind (Duan et al. 2021, arXiv:2001.02811); the split is our form of its clipping.

    Args:
        mean: μ.
        deviation: σ, positive.
        returns: G, constant.
        reach: unit of reward; None: no limit.

    >>> gaussian_nll(torch.tensor(0.7), torch.tensor(0.2), torch.tensor(1.0))
    tensor(0.4345)
    """
    log_width = deviation.log() + 0.5 * math.log(2 * math.pi)
    if reach is None:
        return log_width + ((returns - mean) / deviation).square() / 2
    center = mean.detach()
    seen = near(returns, center, clip=reach)
    of_mean = ((returns - mean) / deviation.detach()).square() / 2
    return of_mean + log_width + ((seen - center) / deviation).square() / 2


def between(x: Float[Tensor, "*shape"], *, low: float, high: float) -> Float[Tensor, "*shape"]:
    """Any number, bent smoothly into (low, high).

        V = low + (high - low) · (½ + atan(x) / π)

    >>> between(torch.tensor([0.0, 1.0, -1.0]), low=0.0, high=1.0)
    tensor([0.5000, 0.7500, 0.2500])
    """
    return low + (high - low) * (0.5 + torch.atan(x) / math.pi)
