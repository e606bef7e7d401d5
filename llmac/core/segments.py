"""Where a value is asked: each True begins a segment for `returns.segment_gae`.

Every segmenter marks action tokens only, and the first of a response, so that each belongs to a
segment (`low_probability` may leave it out). Those that read text are in `text_segments.py`.
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
    logprobs: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    threshold: float,
    interval: int = 1,
    first: bool = True,
) -> Bool[Tensor, "B T"]:
    """A segment from every `interval`-th action token that was in doubt.

        doubt_t = action_mask_t and π(a_t|s_t) < threshold
        starts_t = doubt_t and (number of doubts before t is a multiple of interval)
                   or first and t is the first action token

    The value is read before such a token, so the segment's advantage is what this decision was
    worth together with the near-certain tokens after it. SPO: Guo et al. 2025, arXiv:2505.23564.
    Where a segment ends then depends on the token after it, so the advantages are slightly biased
    even with exact values, unlike those of the other segmenters.

    Args:
        logprobs: of the tokens taken, by the policy that sampled them; anything where `action_mask`
            is False.
        action_mask: True = sampled by the policy.
        threshold: probability; 0.9 in SPO.
        interval: cut at each, every second, ... token in doubt, from the first on; 5 in SPO.
        first: whether the first action token begins a segment even if it was not in doubt. False in
            SPO: tokens before the first cut are in no segment, and have no advantage.

    >>> logprobs = torch.tensor([[.95, .5, .99, .2, .3]]).log()
    >>> action_mask = torch.ones(1, 5, dtype=torch.bool)
    >>> low_probability(logprobs, action_mask, threshold=0.9)
    tensor([[ True,  True, False,  True,  True]])
    >>> low_probability(logprobs, action_mask, threshold=0.9, interval=2, first=False)
    tensor([[False,  True, False, False,  True]])
    """
    if interval < 1:
        raise ValueError(f"cuts are at least one token in doubt apart; found interval = {interval}")
    doubt = action_mask & (torch.exp(logprobs) < threshold)
    starts = doubt & ((doubt.cumsum(dim=1) - 1) % interval == 0)
    return starts | response_start(action_mask) if first else starts


def after_ends(ends: Bool[Tensor, "B T"], action_mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """A segment from the first action token, and from each that follows a token that ends one.

    Only sampled tokens end a segment: one in a tool's output does not.

    Args:
        ends: True = the last token of a segment.
        action_mask: True = sampled by the policy.

    >>> ends = torch.tensor([[False, True, False, False, True]])
    >>> after_ends(ends, torch.ones(1, 5, dtype=torch.bool))
    tensor([[ True, False,  True, False, False]])
    """
    closing = (ends & action_mask).long()
    # A token's segment is the number of ends before it; a segment starts where that number is new.
    segment = (closing.cumsum(dim=1) - closing).masked_fill(~action_mask, -1)
    latest = torch.cat([torch.full_like(segment[:, :1], -1), segment[:, :-1]], dim=1)
    return action_mask & (segment > latest.cummax(dim=1).values)


def at_most(starts: Bool[Tensor, "B T"], k: int) -> Bool[Tensor, "B T"]:
    """No more than `k` segments a row: of n starts, numbers ⌈j·n/k⌉ for j = 0 ... k-1.

    The first start stays, the others are spread evenly among those there are. A segment whose start
    is dropped becomes part of the one before it.

    Args:
        starts: True begins a segment.
        k: most segments of a row.

    >>> at_most(torch.tensor([[True, False, True, True, True]]), 2)
    tensor([[ True, False, False,  True, False]])
    """
    if k < 1:
        raise ValueError(f"a row has at least one segment; found k = {k}")
    number = starts.cumsum(dim=1) - 1
    count = starts.sum(dim=1, keepdim=True).clamp(min=1)
    # Start i is kept if ⌊i·k/n⌋ is reached here for the first time; -1 before the first start.
    reached = torch.div(number * k, count, rounding_mode="floor")
    before = torch.div((number - 1) * k, count, rounding_mode="floor")
    return starts & (reached > before)


def ends_in_doubt(
    logprobs: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"], *, threshold: float
) -> Bool[Tensor, "B T"]:
    """Tokens that end a segment: each sampled one that was in doubt, and the last of the response.

        ends_t = action_mask_t and (π(a_t|s_t) < threshold or t is the last action token)

    `after_ends` makes segments of them, each of which then holds one decision at its end. Unlike
    `low_probability`, where a segment ends depends on nothing behind it. GenAC, arXiv:2604.10701,
    as it was re-implemented (with threshold 0.2); whether the paper cuts so is not known to us.

    Args:
        logprobs: of the tokens taken, by the policy that sampled them; anything where `action_mask`
            is False.
        action_mask: True = sampled by the policy.
        threshold: probability.

    >>> logprobs = torch.tensor([[.9, .1, .95, .8, .15, .99, .7]]).log()
    >>> mask = torch.ones(1, 7, dtype=torch.bool)
    >>> ends_in_doubt(logprobs, mask, threshold=0.2).nonzero()[:, 1]
    tensor([1, 4, 6])
    """
    number = action_mask.cumsum(dim=1)
    last = action_mask & (number == number[:, -1:]) if action_mask.shape[1] else action_mask
    return last | (action_mask & (torch.exp(logprobs) < threshold))


def thinned_ends(ends: Bool[Tensor, "B T"], k: int) -> Bool[Tensor, "B T"]:
    """No more than `k` ends a row, the first and the last among them where k > 1.

    Of n > k ends those numbered round(j · (n-1) / (k-1)), j = 0 ... k-1, stay, halves rounded to
    even; for k = 1 the last. A segment whose end is dropped becomes part of the one behind it.

    Args:
        ends: True ends a segment.
        k: most segments of a row.

    >>> ends = torch.ones(1, 10, dtype=torch.bool)
    >>> thinned_ends(ends, 4).nonzero()[:, 1]
    tensor([0, 3, 6, 9])
    """
    if k < 1:
        raise ValueError(f"a row has at least one segment; found k = {k}")
    count = ends.sum(dim=1, keepdim=True)
    number = (ends.cumsum(dim=1) - 1).clamp(min=0)
    last = (count - 1).clamp(min=0)
    if k == 1:
        return ends & (number == last)
    # Multiplied before it is divided: the other order rounds some halves to the odd side.
    kept = (torch.arange(k, device=ends.device).double() * last / (k - 1)).round().long()
    stays = ends.new_zeros(len(ends), max(ends.shape[1], 1)).scatter(1, kept, True)
    return ends & ((count <= k) | stays.gather(1, number))
