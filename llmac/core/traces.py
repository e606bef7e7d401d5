"""How far credit travels back: λ by the length of the response, or by the doubt of the policy.

Both rules look at tokens after the one they are for, so that with λ < 1 the estimate has a small
bias even where the critic is exact (`docs/estimators.md`).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_LENGTH_LAM = 0.999
"""Largest λ of `length_lam`, as in open-instruct."""


def length_lam(starts: Bool[Tensor, "B T"], *, alpha: float) -> Float[Tensor, "B T"]:
    """A λ that reaches further in longer responses.

        λ(l) = clamp(1 - 1 / (α · l), 0, .999),   l = starts of the response

    Chosen so that the weights of a trace add up to a fixed share of the response: Σ_k λ^k =
    1 / (1 - λ) = α · l. Up to l = 1/α, λ is 0. VAPO, Yue et al. 2025, arXiv:2504.05118; the clamp
    is open-instruct's.

    Args:
        starts: True where a value is known; with one before each token, l is the response's length.
        alpha: α, share of the response that a trace covers; .05 in accounts of VAPO.

    Returns:
        λ, the same at every position of a row; as `segment_gae` takes it.

    Raises:
        ValueError: α is not above 0.

    >>> length_lam(torch.ones(1, 100, dtype=torch.bool), alpha=0.05)[0, 0]
    tensor(0.8000)
    """
    if not alpha > 0:
        raise ValueError(f"alpha is a share of the response, above 0 (VAPO: .05); found {alpha}")
    length = starts.sum(dim=1, keepdim=True).clamp(min=1)
    return (1.0 - 1.0 / (alpha * length)).clamp(0.0, MAX_LENGTH_LAM).expand(starts.shape)


def doubt_lam(
    logprobs: Float[Tensor, "B T"],
    starts: Bool[Tensor, "B T"],
    *,
    lam: float,
    threshold: float,
) -> Float[Tensor, "B T"]:
    """A λ below 1 only where the next token was in doubt.

        λ_t = λ if π(a_t'|s_t') < threshold or no start follows, else 1
        t' = the next start after t

    Tokens the policy was sure of pass credit on undiminished; the decay is spent where something
    was decided. SAE, arXiv:2601.07320, in the form of open-instruct.

    Args:
        logprobs: of the sampled tokens, at collection.
        starts: True where a value is known.
        lam: λ at the doubtful places.
        threshold: probability below which a token was in doubt; .2 in open-instruct.

    Returns:
        λ, one a token, read by `segment_gae` at the segment's start.

    Raises:
        ValueError: the threshold is not a probability between 0 and 1.

    >>> logprobs, starts = torch.tensor([[.9, .1, .9]]).log(), torch.ones(1, 3, dtype=torch.bool)
    >>> doubt_lam(logprobs, starts, lam=0.5, threshold=0.2)
    tensor([[0.5000, 1.0000, 0.5000]])
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is a probability between 0 and 1; found {threshold}")
    doubtful = starts & (logprobs.exp() < threshold)
    following = starts.new_ones(len(starts))
    decays: list[Tensor] = []
    for start, doubt in zip(reversed(starts.unbind(1)), reversed(doubtful.unbind(1)), strict=True):
        decays.append(following)
        following = torch.where(start, doubt, following)
    if not decays:
        return torch.ones_like(logprobs)
    return torch.ones_like(logprobs).masked_fill(torch.stack(decays[::-1], dim=1), lam)
