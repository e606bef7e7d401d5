"""Binary cross-entropy whose logit compares a response with its siblings: an outcome as a label.

PACS (Li et al. 2025, arXiv:2509.02522): a policy that classifies its own responses as right or
wrong, and learns from how surprised that classifier is.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmac.core.baselines import group_mean, leave_one_out

Relative = Literal["leave_one_out", "group", "naive"]
ClassWeights = Literal["balanced", "positive", "negative", "none"]

STD_EPS = 1e-6
"""Added to the deviation that `group` divides by, as in the released code."""


def group_logits(
    scores: Float[Tensor, "B"], group: Int[Tensor, "B"], relative: Relative
) -> Float[Tensor, "B"]:
    """How much better each response scores than its siblings: the logit of "it is right".

        leave_one_out    ψ_i = s_i - mean_{j≠i} s_j
        group            ψ_i = (s_i - mean_g) / (std_g + 1e-6)      (std with Bessel's correction)
        naive            ψ_i = s_i

    Where all scores of a group are equal, `group` has a slope of 1e6 and no curvature: the first
    step of a policy that has not moved is that much longer than the others.

    Args:
        scores: of each response, any scale; may carry a gradient.
        group: same integer for responses to the same prompt, in any order.
        relative: which of the three.

    Returns:
        Logits, in nats for the first and the last.

    Raises:
        ValueError: leave_one_out of a response without siblings.

    >>> same = torch.tensor([7, 7])
    >>> group_logits(torch.tensor([.3, -.3]), same, "leave_one_out")
    tensor([ 0.6000, -0.6000])
    """
    if relative == "leave_one_out":
        return leave_one_out(scores, group)
    if relative == "naive":
        return scores
    mean, size = group_mean(scores, group)
    variance, _ = group_mean((scores - mean).square(), group)
    variance = variance * size / (size - 1).clamp(min=1)
    spread = variance > 0  # the root of 0 has no slope that could be multiplied by 0
    deviation = torch.where(spread, variance.where(spread, 1.0).sqrt(), 0.0)
    return (scores - mean) / (deviation + STD_EPS)


def class_weights(
    labels: Float[Tensor, "B"], group: Int[Tensor, "B"], how: ClassWeights
) -> Float[Tensor, "B"]:
    """How much each response weighs, so that neither class of a group drowns the other.

        balanced    w_i = n_g / (2 · number of the class of i in g); 1 where g has one class only
        positive    1 for right responses, 0 for wrong ones;     negative: the reverse
        none        1

    Args:
        labels: 1 right, 0 wrong.
        group: same integer for responses to the same prompt, in any order.
        how: which of the four.

    Returns:
        Weights, which `balanced` gives a mean of 1 in each group.

    >>> class_weights(torch.tensor([1., 0., 0., 0.]), torch.zeros(4, dtype=torch.int64), "balanced")
    tensor([2.0000, 0.6667, 0.6667, 0.6667])
    """
    if how == "none":
        return torch.ones_like(labels)
    if how == "positive":
        return labels
    if how == "negative":
        return 1 - labels
    right, _ = group_mean(labels, group)
    share = torch.where(labels > 0, right, 1 - right)
    return torch.where((right > 0) & (right < 1), 0.5 / share, 1.0)


def group_bce(
    scores: Float[Tensor, "B"],
    labels: Float[Tensor, "B"],
    group: Int[Tensor, "B"],
    *,
    relative: Relative,
    weights: ClassWeights,
) -> Float[Tensor, "B"]:
    """Weighted binary cross-entropy of each response.

        l_i = w_i · (softplus(ψ_i) - y_i · ψ_i),    dl_i/dψ_i = w_i · (sigmoid(ψ_i) - y_i)

    PACS, arXiv:2509.02522, whose loss is the mean of these.

    Args:
        scores: what is compared; may carry a gradient.
        labels: y, 1 right, 0 wrong.
        group: same integer for responses to the same prompt, in any order.
        relative: ψ, of `group_logits`.
        weights: w, of `class_weights`.

    Returns:
        Losses, nats.

    >>> one = torch.zeros(2, dtype=torch.int64)
    >>> labels = torch.tensor([1., 0.])
    >>> group_bce(torch.zeros(2), labels, one, relative="leave_one_out", weights="none")
    tensor([0.6931, 0.6931])
    """
    logits = group_logits(scores, group, relative)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return class_weights(labels, group, weights) * loss
