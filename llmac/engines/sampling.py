"""From logits to tokens: temperature, top-k, top-p, and the log-probability of what was drawn."""

import torch
from torch import Tensor

from llmac.core.protocols import SamplingParams

NEVER = float("-inf")


def draw(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution at a given uniform number.

        a = min { i : Σ_{j≤i} μ(j) > u },    μ = softmax(logits / temperature), cut to top-k, then top-p, renormalised

    One uniform number a row and step, rather than one a row, step and vocabulary entry (Gumbel, exponential race):
    cheaper, and a row's draw does not depend on which other rows are in the batch.

    Args:
        logits: [B, V], any float dtype; computed in float32.
        uniforms: [B, 1] float32 in [0, 1).
        params: how to sample; temperature 0 takes the likeliest token and needs no `uniforms`.

    Returns:
        Token ids [B] and their log μ [B] float32. Greedy tokens get their log-probability at temperature 1, because
        the distribution they are drawn from is a point mass and would say 0 for every one of them.

    >>> from llmac.core.protocols import SamplingParams
    >>> logits = torch.tensor([[0.0, 0.0, 1.0]])
    >>> draw(logits, torch.tensor([[0.9]]), SamplingParams(top_k=1))
    (tensor([2]), tensor([0.]))
    """
    logits = logits.float()
    if params.temperature == 0:
        ids = logits.argmax(dim=-1, keepdim=True)
        return ids.squeeze(1), logits.log_softmax(dim=-1).gather(1, ids).squeeze(1)
    if params.temperature != 1:
        logits = logits / params.temperature

    order = None
    if 0 < params.top_k < logits.shape[1]:
        logits, order = logits.topk(params.top_k, dim=-1)
    if params.top_p < 1:
        if order is None:
            logits, order = logits.sort(dim=-1, descending=True)
        probabilities = logits.softmax(dim=-1)
        # A token is cut when the likelier ones already hold top_p; the likeliest is never cut.
        likelier = probabilities.cumsum(dim=-1) - probabilities
        cut = likelier >= params.top_p
        cut[:, 0] = False
        logits = logits.masked_fill(cut, NEVER)

    logprobs = logits.log_softmax(dim=-1)
    # A parallel scan in float32 need not be monotone, and a step back would let a cut token through.
    wide = torch.float64 if logits.is_cuda else None
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=wide)
    places = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    # Only not-a-number lands past the end; the caller reports it.
    places.clamp_(max=logits.shape[1] - 1)
    ids = places if order is None else order.gather(1, places)
    return ids.squeeze(1), logprobs.gather(1, places).squeeze(1)


def uniform_table(rows: int, steps: int, seed: int) -> Tensor:
    """The uniform numbers of a call, [steps, rows] float32 on CPU: the same on every device.

    >>> torch.equal(uniform_table(2, 3, seed=5), uniform_table(2, 3, seed=5))
    True
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, steps, generator=generator).t().contiguous()
