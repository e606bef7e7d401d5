"""Scores that a language model writes about a state: out of its words, into values, and what they earn.

    text  --parse_score-->  whole number on a scale  --value_of_score-->  V in reward units
    R = 1 - (z - v)²                       what a score earns once the outcome is known
    w = R - baseline                       what REINFORCE weighs the words by

The scale and the tags are the business of who asks; rewards are not seen here but through
`reward_range`.
"""

import re
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmac.core.baselines import group_mean

Baseline = Literal["none", "leave_one_out", "by_outcome"]


def parse_score(text: str, *, scale: tuple[int, int], tag: str = "answer") -> int | None:
    """The whole number that stands alone between the tags, cut to the scale; None: there is none.

    The first such pair of tags counts. Words, fractions and an end that is missing are no score:
    nothing is guessed. Generative critic of arXiv:2604.10701, whose scale is 0 to 10.

    Args:
        text: what the model wrote.
        scale: smallest and largest score; what is beyond counts as the nearer of the two.
        tag: name of the tags, without brackets.

    >>> [parse_score(f"Well. <answer>{said}</answer>", scale=(0, 10)) for said in ("7", " 12 ", "-3", "7.5")]
    [7, 10, 0, None]
    """
    name = re.escape(tag)
    found = re.search(rf"<{name}>\s*([+-]?[0-9]+)\s*</{name}>", text)
    if found is None:
        return None
    low, high = scale
    # By way of a float: Python refuses to make an integer of thousands of digits.
    return int(min(max(float(found[1]), float(low)), float(high)))


def value_of_score(
    score: int, *, scale: tuple[int, int], reward_range: tuple[float, float]
) -> float:
    """V(s) that a score means, in reward units.

        V = low + (high - low) · (n - n_low) / (n_high - n_low)

    >>> value_of_score(5, scale=(0, 10), reward_range=(-1., 1.))
    0.0
    """
    (lowest, highest), (low, high) = scale, reward_range
    return low + (high - low) * (score - lowest) / (highest - lowest)


def fraction_of(outcome: float, reward_range: tuple[float, float]) -> float:
    """z: where an outcome lies in the range, from 0 to 1; what is beyond counts as the nearer end.

    >>> fraction_of(-.5, (-1., 1.)), fraction_of(3., (-1., 1.))
    (0.25, 1.0)
    """
    low, high = reward_range
    return min(max((outcome - low) / (high - low), 0.0), 1.0)


def brier_reward(value: float | None, outcomes: Sequence[float]) -> float:
    """What a score earns, averaged over the outcomes of the responses that came through its state.

        R = 1 - mean_j (z_j - v)²        and 0 if there is no score

    A proper scoring rule (Brier 1950): its expectation is largest where v is the probability of
    success. Critic reward of arXiv:2604.10701.

    Args:
        value: v, in [0, 1]; None: what was written has no score.
        outcomes: z of each response, in [0, 1]; at least one.

    >>> round(brier_reward(.7, [1.]), 2), round(brier_reward(.7, [1., 0.]), 2), brier_reward(None, [1.])
    (0.91, 0.71, 0.0)
    """
    if value is None:
        return 0.0
    return 1.0 - sum((z - value) ** 2 for z in outcomes) / len(outcomes)


def above_baseline(
    rewards: Float[Tensor, "N"],
    group: Int[Tensor, "N"],
    outcomes: Float[Tensor, "N"],
    baseline: Baseline,
) -> Float[Tensor, "N"]:
    """w: what the words of each score are weighed by.

        none             w_j = R_j
        leave_one_out    w_j = R_j - mean reward of the *other* scores of the group
        by_outcome       the same among those of the group whose outcome was as good (z > 1/2) or not

    None of the baselines contains the score's own reward, and outcomes do not depend on what the
    critic wrote, so none of them changes the expected gradient of a score that is compared. By
    outcome, it is compared with scores that had the same luck. A score without others to compare
    with has w = 0: it teaches nothing.

    Args:
        rewards: R of each score.
        group: same integer for scores that are compared.
        outcomes: z of each, in [0, 1].
        baseline: which.

    >>> w = above_baseline(torch.tensor([.91, .75, .51, 0.]), torch.zeros(4, dtype=torch.long),
    ...                    torch.ones(4), "leave_one_out")
    >>> [round(x, 4) for x in w.tolist()]
    [0.49, 0.2767, -0.0433, -0.7233]
    """
    if baseline == "none":
        return rewards
    if baseline == "by_outcome":
        group = 2 * group + (outcomes > 0.5).long()
    elif baseline != "leave_one_out":
        raise ValueError(f"baseline is one of none, leave_one_out, by_outcome; found {baseline!r}")
    mean, size = group_mean(rewards, group)
    return torch.where(size > 1, (rewards - mean) * size / (size - 1).clamp(min=1), 0.0)


def smoothed(before: float | None, new: float, *, rate: float) -> float:
    """Exponential moving average: rate · before + (1 - rate) · new, beginning with the first number.

    >>> rate = smoothed(smoothed(None, .25, rate=.9), .35, rate=.9)
    >>> f"{100 * smoothed(rate, .5, rate=.9):.1f}%"
    '28.4%'
    """
    return new if before is None else rate * before + (1.0 - rate) * new
