"""What the edges of a tree are worth: V of a node from its children, and an edge's advantage from V of its ends.

Pure rules; `core.tree` samples. Segment Policy Optimization, arXiv:2505.23564: formulas as in the
authors' code.
"""

from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

EdgeAdvantage = Literal["rloo", "grpo", "leave_one_out"]
"""How an edge is judged by the values of its ends; `baselines` and `in_deviations` have the formulas."""
ROUNDING = 1e-9
"""An advantage below is 0: means of equal rewards in another order differ by less."""
STD_EPS = 1e-8
"""Added to the deviation by which `in_deviations` divides; SPO's code."""


def mean_and_std(
    values: Float[Tensor, "N"], copies: Int[Tensor, "N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """V of a node and how far its children are apart.

        V = Σ_j n_j V_j / Σ_j n_j          std = √( Σ_j n_j (V_j - V)² / Σ_j n_j )

    Counted from the smallest, so that equal children have exactly their own value as mean, and
    exactly 0 as deviation.

    Args:
        values: V_j of the children, unit of reward.
        copies: n_j, how many of the sampled segments are this child.

    >>> from torch import tensor
    >>> mean_and_std(tensor([1.0, 0.5]), tensor([1, 1]))
    (tensor(0.7500), tensor(0.2500))
    """
    smallest, count = values.min(), copies.sum()
    mean = smallest + ((values - smallest) * copies).sum() / count
    return mean, (((values - mean).square() * copies).sum() / count).sqrt()


def baselines(
    values: Float[Tensor, "N"], copies: Int[Tensor, "N"], *, how: EdgeAdvantage
) -> Float[Tensor, "N"]:
    """What each child is compared with: the value of its parent, as `how` has it.

        rloo, grpo         V = mean of all b siblings, the child itself included
        leave_one_out      mean of the b - 1 others = (b V - V_j) / (b - 1)

    "rloo" is the name in SPO's code and not what others call RLOO: the child is part of its own
    baseline, so the expected advantage of an edge is (b - 1)/b of the true one. "leave_one_out",
    ours, is unbiased. A child that was sampled n times is left out once: its other copies are
    samples like any.

    Args:
        values: V_j of the children, unit of reward.
        copies: n_j, how many of the b sampled segments are this child.
        how: see above.

    Raises:
        ValueError: leave_one_out of a single sibling.

    >>> from torch import tensor
    >>> baselines(tensor([1.0, 0.0]), tensor([1, 1]), how="leave_one_out")
    tensor([0., 1.])
    """
    mean, _ = mean_and_std(values, copies)
    if how != "leave_one_out":
        return mean.expand_as(values)
    count = copies.sum()
    if count < 2:
        raise ValueError(
            "leave_one_out compares a segment with the others that begin where it does, and there "
            "is one; raise its number in branching to at least 2"
        )
    # From the mean, so that equal children have exactly their own value as baseline.
    return mean - (values - mean) / (count - 1)


def in_deviations(
    advantages: Float[Tensor, "*shape"], std: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The "grpo" advantage of an edge: in deviations of the children of its parent.

        a = (V(child) - V(parent)) / (std + 1e-8)

    Args:
        advantages: V(child) - V(parent), unit of reward.
        std: population standard deviation of V over the children of the parent.

    >>> from torch import tensor
    >>> in_deviations(tensor([0.25, -0.25]), tensor([0.25, 0.25]))
    tensor([ 1., -1.])
    """
    return advantages / (std + STD_EPS)


def best_of(
    values: Float[Tensor, "*shape"],
    attempts: float,
    *,
    reward_range: tuple[float, float] = (0.0, 1.0),
) -> Float[Tensor, "*shape"]:
    """Chance that the best of several attempts succeeds, each with the chance that V is.

        f(V) = 1 - (1 - p)^attempts,     p = (V - low) / (high - low)

    p below 0 counts as 0, above 1 as 1: outside of the range V is no chance, and f would fall
    again.

    Args:
        values: V, unit of reward.
        attempts: 4 in SPO's code.
        reward_range: (low, high), reward of a failure and of a success.

    >>> from torch import tensor
    >>> best_of(tensor([0.0, 0.5, 1.0]), 4.0)
    tensor([0.0000, 0.9375, 1.0000])
    """
    low, high = reward_range
    chance = ((values - low) / (high - low)).clamp(0.0, 1.0)
    return 1 - (1 - chance) ** attempts


def prover(
    parent: Float[Tensor, "*shape"],
    child: Float[Tensor, "*shape"],
    *,
    attempts: float,
    reward_range: tuple[float, float] = (0.0, 1.0),
) -> Float[Tensor, "*shape"]:
    """What an edge is worth to a prover that may try several times.

        f(V(child)) - f(V(parent))

    The idea of process advantage verifiers: progress is judged by another policy than the one that
    acts, here best-of-n of it (arXiv:2410.08146, as SPO's code has it).

    Args:
        parent: V at the start of each edge, unit of reward.
        child: V at its end.
        attempts: exponent of `best_of`.
        reward_range: reward of a failure and of a success.

    >>> from torch import tensor
    >>> prover(tensor([0.75]), tensor([0.5]), attempts=4.0)
    tensor([-0.0586])
    """
    after = best_of(child, attempts, reward_range=reward_range)
    return after - best_of(parent, attempts, reward_range=reward_range)


def informative(
    parent: Float[Tensor, "*shape"], child: Float[Tensor, "*shape"]
) -> Bool[Tensor, "*shape"]:
    """Whether an edge has anything to say: SPO's rule for what it keeps.

        V(child)  ≠  V(parent)                                           (beyond rounding)

    SPO's code adds f(V(child)) - f(V(parent)), f as in `best_of`, to the difference. f rises with
    V, so that the same edges stay.

    Args:
        parent: V at the start of each edge, unit of reward.
        child: V at its end.

    >>> from torch import tensor
    >>> informative(tensor([1.0, 0.5]), tensor([1.0, 1.0]))
    tensor([False,  True])
    """
    return (child - parent).abs() > ROUNDING
