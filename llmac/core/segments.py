"""Where a value is asked: each True begins a segment for `returns.segment_gae`.

Every segmenter marks the first action token, so that each action token belongs to a segment, and
marks action tokens only.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def every_token(action_mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """A segment for each action token: PPO.

    >>> every_token(torch.tensor([[True, False, True]]))
    tensor([[ True, False,  True]])
    """
    return action_mask.clone()


def response_start(action_mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """One segment for each response, begun by its first action token.

    >>> response_start(torch.tensor([[False, True, True]]))
    tensor([[False,  True, False]])
    """
    return action_mask & (action_mask.cumsum(dim=1) == 1)


def every_n(action_mask: Bool[Tensor, "B T"], n: int) -> Bool[Tensor, "B T"]:
    """A segment for every `n` action tokens; injected tokens are not counted.

    Args:
        action_mask: True = sampled by the policy.
        n: segment length, action tokens; the last segment of a response may be shorter.

    >>> every_n(torch.tensor([[True, True, False, True, True]]), 2)
    tensor([[ True, False, False,  True, False]])
    """
    if n < 1:
        raise ValueError(f"a segment has at least one token; found n = {n}")
    return action_mask & ((action_mask.cumsum(dim=1) - 1) % n == 0)


def low_probability(
    logprobs: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"], *, threshold: float
) -> Bool[Tensor, "B T"]:
    """A segment from each action token that was in doubt, besides the first.

        starts_t = action_mask_t and (π(a_t|s_t) < threshold or t is the first action token)

    The value is read before such a token, so the segment's advantage is what this decision was
    worth together with the near-certain tokens after it. SPO: Guo et al. 2025, arXiv:2505.23564.
    Where a segment ends then depends on the token after it, so the advantages are slightly biased
    even with exact values, unlike those of the other segmenters.

    Args:
        logprobs: of the tokens taken, by the policy that sampled them; anything where `action_mask`
            is False.
        action_mask: True = sampled by the policy.
        threshold: probability; 0.9 in SPO.

    >>> logprobs, action_mask = torch.tensor([[.95, .5, .99]]).log(), torch.tensor([[True] * 3])
    >>> low_probability(logprobs, action_mask, threshold=0.9)
    tensor([[ True,  True, False]])
    """
    return action_mask & ((torch.exp(logprobs) < threshold) | response_start(action_mask))
