"""Which of several responses to a prompt are worth imitating, and how much each."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def candidate_weights(
    scores: Float[Tensor, "B"],
    group: Int[Tensor, "B"],
    eligible: Bool[Tensor, "B"],
    *,
    top_k: int,
    temperature: float,
) -> Float[Tensor, "B"]:
    """The best responses of each group, weighted by how good they are.

        w_i = exp(Q_i / temperature) / Σ_j exp(Q_j / temperature)    over the top_k of the group

    At temperature 0 the best has all the weight, and equally good ones share it. Of equal scores at
    the border of the top_k the first rows are in. The targets of PA-RL (Mark et al. 2024,
    arXiv:2412.06685), with the expectation over them in place of a draw.

    Args:
        scores: Q, any scale; anything where not `eligible`.
        group: same integer for responses to the same prompt, in any order.
        eligible: responses that may be imitated at all.
        top_k: most responses with a weight in each group.
        temperature: unit of `scores`, at least 0.

    Returns:
        Weights that sum to 1 in each group that has an eligible response.

    >>> scores, one = torch.tensor([.1, .9, .5, .7]), torch.zeros(4, dtype=torch.int64)
    >>> candidate_weights(scores, one, one == 0, top_k=3, temperature=1.0)
    tensor([0.0000, 0.4018, 0.2693, 0.3289])
    """
    weights = torch.zeros_like(scores)
    for one in {int(g) for g in group}:
        rows = torch.arange(len(group))[(group == one) & eligible]
        best = rows[scores[rows].argsort(descending=True, stable=True)[:top_k]]
        if temperature > 0:
            weights[best] = (scores[best] / temperature).softmax(dim=0)
        elif len(best):
            equal = (scores[best] == scores[best[0]]).to(scores.dtype)
            weights[best] = equal / equal.sum()
    return weights
