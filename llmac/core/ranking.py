"""A loss that wants good prompts above bad ones, not only the mean right."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def pairwise_loss(margins: Float[Tensor, "N"], outcomes: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """How much positives are not above negatives, over all pairs of the two.

        L = mean over (i, j), y_i >= ½ > y_j, of  -log σ(s_i - s_j)

    Burges et al. 2005 (RankNet); on prompts of one step: arXiv:2602.03584.

    Args:
        margins: s, the logit of success minus that of failure.
        outcomes: y in [0, 1].

    Returns:
        Nats; 0 where there is no pair.

    >>> pairwise_loss(torch.tensor([0.8, -0.6]), torch.tensor([0.9, 0.25]))
    tensor(0.2204)
    """
    good = outcomes >= 0.5
    gaps = margins[good][:, None] - margins[~good]
    return functional.softplus(-gaps).mean() if gaps.numel() else margins.sum() * 0.0


def soft_cross_entropy(
    logits: Float[Tensor, "N 2"], outcomes: Float[Tensor, "N"]
) -> Float[Tensor, ""]:
    """Cross-entropy with labels between failure and success.

        L = -mean_i [ (1 - y_i) log softmax(z_i)_0 + y_i log softmax(z_i)_1 ]

    Args:
        logits: z, of failure and success.
        outcomes: y in [0, 1].

    >>> soft_cross_entropy(torch.tensor([[0.2, 1.0], [0.5, -0.1]]), torch.tensor([0.9, 0.25]))
    tensor(0.5193)
    """
    labels = torch.stack([1 - outcomes, outcomes], dim=1)
    return -(labels * logits.log_softmax(dim=1)).sum(dim=1).mean()


def prompt_loss(
    logits: Float[Tensor, "N 2"], outcomes: Float[Tensor, "N"], *, pair_weight: float
) -> Float[Tensor, ""]:
    """Ranking and calibration together: pair_weight · pairwise + (1 - pair_weight) · cross-entropy.

    Args:
        logits: z, of failure and success.
        outcomes: y in [0, 1].
        pair_weight: 1/4 in the code of arXiv:2602.03584.

    >>> z = torch.tensor([[0.2, 1.0], [0.5, -0.1]])
    >>> prompt_loss(z, torch.tensor([0.9, 0.25]), pair_weight=0.25)
    tensor(0.4446)
    """
    pairs = pairwise_loss(logits[:, 1] - logits[:, 0], outcomes)
    return pair_weight * pairs + (1 - pair_weight) * soft_cross_entropy(logits, outcomes)
