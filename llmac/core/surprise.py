"""How much a response has surprised the policy that sampled it: its own log-probabilities, summed up state by state."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

FEATURES = 8
UNLIKELY = (0.5, 0.25, 0.1)
"""A token is counted as unlikely below each of these probabilities."""
LOWEST = -8.0
"""Log-probabilities are taken as at least this, nats."""


def surprise(
    logprobs: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"], *, length_limit: int
) -> Float[Tensor, "B S 8"]:
    """What the policy found likely of s_t, for the states s_0 .. s_T (S = T + 1).

        1 l_{t-1}   2 min_{i<t} l_i   3 exp(min_{i<t} l_i)   4 log(1 - Σ_{i<t} l_i)
        5-7 log(1 + #{i < t: l_i < log p}), p = .5, .25, .1   8 t / length_limit

    with l_i = log π(a_i|s_i), 0 for injected tokens. Row t has seen the tokens before t and no other. 1 and 2 are
    divided by 4, so that all numbers are of the size of 1.

    Args:
        logprobs: of the policy that sampled, nats.
        action_mask: tokens the policy sampled.
        length_limit: response length, tokens, at which sampling was cut.

    Raises:
        ValueError: `length_limit` is not positive.

    >>> seen = surprise(torch.tensor([[-0.1, -2.0]]), torch.ones(1, 2, dtype=torch.bool), length_limit=4)
    >>> seen[0, :, 1], seen[0, :, 4]
    (tensor([ 0.0000, -0.0250, -0.5000]), tensor([0.0000, 0.0000, 0.6931]))
    """
    if length_limit < 1:
        raise ValueError(f"length_limit must be at least 1 token, found {length_limit}")
    taken = logprobs.where(action_mask, 0.0).clamp(min=LOWEST, max=0.0)
    before = functional.pad(taken, (1, 0))
    lowest = before.cummin(dim=1).values
    counts = [(before < torch.tensor(p).log()).to(before.dtype).cumsum(1) for p in UNLIKELY]
    place = torch.arange(before.shape[1], device=before.device) / length_limit
    return torch.stack(
        [
            before / 4,
            lowest / 4,
            lowest.exp(),
            torch.log1p(-before.cumsum(1)),
            *(torch.log1p(count) for count in counts),
            place.to(before.dtype).expand_as(before),
        ],
        dim=-1,
    )
