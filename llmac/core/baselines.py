"""Baselines from siblings: what the other responses to the prompt say one could have earned."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmac.core.masking import masked_var
from llmac.core.types import AllSum, identity


def group_mean(
    rewards: Float[Tensor, "B"], group: Int[Tensor, "B"]
) -> tuple[Float[Tensor, "B"], Int[Tensor, "B"]]:
    """Mean reward and size of each response's group.

        mean_g = min_g + (1/G) · Σ (r - min_g)

    Counted from the smallest reward, so that equal rewards have exactly their own value as mean, in
    any dtype.

    Args:
        rewards: outcome reward of each response, any scale.
        group: same integer for responses to the same prompt; groups may differ in size and stand in
            any order.

    Returns:
        mean: of the group each response belongs to, unit of `rewards`.
        size: number of responses in that group.

    >>> group_mean(torch.tensor([1., 0., 5.]), torch.tensor([7, 7, 3]))
    (tensor([0.5000, 0.5000, 5.0000]), tensor([2, 2, 1]))
    """
    slot = torch.searchsorted(group.sort().values, group)  # one number a group, below B
    size = torch.zeros_like(group).scatter_add(0, slot, torch.ones_like(group))[slot]
    smallest = rewards.scatter_reduce(0, slot, rewards, "amin", include_self=False)[slot]
    excess = torch.zeros_like(rewards).scatter_add(0, slot, rewards - smallest)[slot]
    return smallest + excess / size, size


def group_std(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Sample standard deviation of each response's group.

        std_g = √( Σ (r - mean_g)² / (G-1) )

    Args:
        rewards: outcome reward of each response, any scale.
        group: same integer for responses to the same prompt.

    Returns:
        Standard deviation in the unit of `rewards`; exactly 0 where all rewards are equal or G = 1.

    >>> group_std(torch.tensor([1., 0., 5.]), torch.tensor([7, 7, 3]))
    tensor([0.7071, 0.7071, 0.0000])
    """
    mean, size = group_mean(rewards, group)
    mean_square, _ = group_mean((rewards - mean).square(), group)
    return (mean_square * size / (size - 1).clamp(min=1)).sqrt()


def group_relative(
    rewards: Float[Tensor, "B"],
    group: Int[Tensor, "B"],
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-6,
    sum_across: AllSum = identity,
) -> Float[Tensor, "B"]:
    """Reward minus the mean reward of the group, in units of a standard deviation.

        Â_i = (r_i - mean_g) / (std + eps)        (scale = "none": not divided)

    GRPO divides by the group's std (Shao et al. 2024, arXiv:2402.03300, section 4.1), which favours
    prompts that are nearly always or nearly never solved; Dr.GRPO does not divide (Liu et al. 2025,
    arXiv:2503.20783); "batch" divides by the std of all rewards of the step. The mean contains r_i
    itself, so the estimate is (G-1)/G of `leave_one_out`'s when not divided.

    Args:
        rewards: outcome reward of each response, any scale.
        group: same integer for responses to the same prompt; groups may differ in size.
        scale: whose standard deviation.
        eps: added to the standard deviation, unit of `rewards`. verl 1e-6, TRL 1e-4.
        sum_across: sums over ranks; used by "batch" only, since a group never leaves its rank.

    Returns:
        Advantages, summing to zero within each group; exactly 0 where all rewards are equal, a lone
        response included.

    >>> group_relative(torch.tensor([1., 1., 0., 0.]), torch.tensor([7, 7, 7, 7]))
    tensor([ 0.8660,  0.8660, -0.8660, -0.8660])
    """
    mean, _ = group_mean(rewards, group)
    deviation = rewards - mean
    if scale == "group":
        return deviation / (group_std(rewards, group) + eps)
    if scale == "batch":
        everyone = torch.ones_like(rewards, dtype=torch.bool)
        return deviation / (masked_var(rewards, everyone, sum_across=sum_across).sqrt() + eps)
    if scale == "none":
        return deviation
    raise ValueError(f"scale is one of group, batch, none; found {scale!r}")


def leave_one_out(rewards: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Reward minus the mean reward of the *other* responses to the same prompt.

        Â_i = r_i - (1 / (G-1)) · Σ_{j≠i} r_j  =  G/(G-1) · (r_i - mean_g)

    Unbiased, unlike subtracting the group mean, because r_i does not enter its own baseline.
    RLOO: Kool et al. 2019; for LLMs, Ahmadian et al. 2024, arXiv:2402.14740.

    Args:
        rewards: outcome reward of each response, any scale.
        group: same integer for responses to the same prompt; groups may differ in size.

    Returns:
        Advantages in the unit of `rewards`, summing to zero within each group; exactly 0 where all
        are equal.

    Raises:
        ValueError: a group has a single member, so there is no other to compare with.

    >>> leave_one_out(torch.tensor([1., 0., 0.]), torch.tensor([7, 7, 7]))
    tensor([ 1.0000, -0.5000, -0.5000])
    """
    mean, size = group_mean(rewards, group)
    if (size < 2).any():
        raise ValueError(
            f"group {group[size < 2][0].item()} has one response; leave-one-out needs at least "
            "two: raise group_size"
        )
    return (rewards - mean) * size / (size - 1)
