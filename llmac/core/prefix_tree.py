"""What the siblings of a response say about its states: those with the same first tokens went on from it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def prefix_means(
    outcomes: Float[Tensor, "B"],
    group: Int[Tensor, "B"],
    response_ids: Int[Tensor, "B T"],
    lengths: Int[Tensor, "B"],
    known: Bool[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T+1"]:
    """Mean outcome of the siblings that begin as each response does, for each length of the beginning.

        S_t(i) = { k in the group of i : k has the tokens 0 .. t-1 of i }        S_0 = the group
        V_t(i) = mean of the outcomes of S_t(i)

    The responses to one prompt are a tree of prefixes already; nothing more is sampled. TEMPO (P2T): arXiv:2509.18314.
    In sorted order S_t(i) is a run of neighbours, so the cost is that of sorting plus one pass over the tokens.

    Args:
        outcomes: of each response, any unit; anything where not `known`.
        group: same integer for responses to the same prompt; rows stand in any order.
        response_ids: tokens, injected ones included; anything behind the end of a response.
        lengths: tokens of each response.
        known: whether a response has an outcome already; None: all have. Where S_t(i) has none, the deepest shorter
            beginning with one speaks for it, and 0 where the whole group has none.

    Returns:
        V_t(i) in the unit of `outcomes` for t = 0 .. T; from the end of the response on, what V is there. It contains
        the response's own outcome, and nothing else once the response shares its beginning with no sibling.

    >>> responses = torch.tensor([[5, 6], [5, 7], [8, 0]])
    >>> prefix_means(torch.tensor([1., 0., 0.]), torch.tensor([3, 3, 3]), responses, torch.tensor([2, 2, 1]))
    tensor([[0.3333, 0.5000, 1.0000],
            [0.3333, 0.5000, 0.0000],
            [0.3333, 0.0000, 0.0000]])
    """
    rows, width = response_ids.shape
    if known is None:
        known = torch.ones_like(group, dtype=torch.bool)
    beginnings = [
        (int(number), [int(token) for token in ids[: int(length)]])
        for number, ids, length in zip(group, response_ids.numpy(), lengths, strict=True)
    ]
    order = torch.tensor(sorted(range(rows), key=beginnings.__getitem__), dtype=torch.long)

    length, t = lengths[order, None], torch.arange(width + 1)
    apart = _begins_a_run(group[order], response_ids[order], length)
    row = torch.arange(rows)[:, None]
    first = row.where(apart, 0).cummax(0).values
    following = torch.cat([row.where(apart, rows), torch.full((1, width + 1), rows)])[1:]
    behind = following.flip(0).cummin(0).values.flip(0)

    def of_runs(x: Tensor) -> Tensor:
        before = torch.cat([x.new_zeros(1), x.cumsum(0)])
        return before[behind] - before[first]

    count = of_runs(known[order].long())
    total = of_runs(outcomes.where(known, 0.0)[order].double())
    deepest = t.where((count > 0) & (t <= length), 0).cummax(1).values
    means = (total / count.clamp(min=1)).gather(1, deepest)
    return torch.empty_like(means).index_copy(0, order, means).to(outcomes.dtype)


def _begins_a_run(
    group: Int[Tensor, "B"], ids: Int[Tensor, "B T"], length: Int[Tensor, "B 1"]
) -> Bool[Tensor, "B T+1"]:
    """Whether a row of sorted rows differs from the one before it within the first t tokens."""
    t = torch.arange(ids.shape[1] + 1)
    real = t[:-1] < length
    same = (ids[1:] == ids[:-1]) & real[1:] & real[:-1]
    shared = same.long().cumprod(1).sum(1).where(group[1:] == group[:-1], -1)
    return torch.cat([torch.full((1,), -1), shared])[: len(ids), None] < t
