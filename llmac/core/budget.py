"""How many responses each prompt deserves, when the chance to solve it is known beforehand."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Utility = Literal["failures", "mixed"]

_EVENLY = 1e-9
"""Utility of log(1 + responses): decides between allocations that are equally good otherwise."""
_HALVINGS = 40


def failures_beside_a_success(
    budget: Float[Tensor, "..."], chance: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Expected number of failed responses that have a successful sibling.

        U(B, p) = B (1-p) [1 - (1-p)^(B-1)]

    Convex in B at first and concave later, the later the smaller p: a few more responses to a hard
    prompt are worth nothing unless many more follow. As reported of V_0, arXiv:2602.03584.

    Args:
        budget: B, responses to the prompt; they succeed independently.
        chance: p, that one succeeds.

    Returns:
        Responses; increasing in B.

    >>> failures_beside_a_success(torch.tensor([2.0, 8.0]), torch.tensor(0.5))
    tensor([0.5000, 3.9688])
    """
    failure = 1 - chance
    return budget * failure * (1 - failure ** (budget - 1).clamp(min=0))


def mixed_group(budget: Float[Tensor, "..."], chance: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Chance that a group has both a success and a failure, and so something to compare.

        G(B, p) = 1 - p^B - (1-p)^B

    Concave in B from 1 on, the same for p and 1-p.

    Args:
        budget: B, responses to the prompt, at least 1; they succeed independently.
        chance: p, that one succeeds.

    >>> mixed_group(torch.tensor([1.0, 2.0, 8.0]), torch.tensor(0.5))
    tensor([0.0000, 0.5000, 0.9922])
    """
    return 1 - chance**budget - (1 - chance) ** budget


UTILITIES = {"failures": failures_beside_a_success, "mixed": mixed_group}


def allocate(
    chance: Float[Tensor, "N"],
    total: int,
    *,
    minimum: int = 2,
    maximum: int | None = None,
    utility: Utility = "failures",
) -> Int[Tensor, "N"]:
    """The numbers of responses, `total` in all, whose utilities add up to the most.

        max Σ_i u(B_i, p_i)    over    Σ_i B_i = total,   minimum <= B_i <= maximum

    By dynamic programming over the prompts: giving the next response to whoever gains most from it
    is not optimal where u is convex. Choices that cannot be part of an optimum are left out before,
    by a price λ for each response: for any λ the optimum is at most

        D(λ) = λ · total + Σ_i max_B [u(B, p_i) - λ B]

    so that a B which takes more away from its maximum than D(λ) is above a solution already found
    is in no better solution. Between equal utilities the more even allocation wins. With `failures`
    and no `maximum` the hardest prompt that is not hopeless may take all: u grows with B for ever.

    Args:
        chance: p_i, that a response to prompt i succeeds.
        total: responses to give away.
        minimum: each prompt gets at least as many.
        maximum: and at most as many; None: no bound, and it may take long where many prompts are
            equally hard.
        utility: failures (`failures_beside_a_success`) or mixed (`mixed_group`).

    Returns:
        B_i, in the order of `chance`.

    Raises:
        ValueError: `total` is too small or too large for the bounds, or a chance is outside [0, 1].

    >>> allocate(torch.tensor([0.05, 0.5, 0.95]), 24).tolist()
    [20, 2, 2]
    """
    count = len(chance)
    _check(chance, total, minimum, maximum)
    spare = total - count * minimum
    if not count or not spare:
        return torch.full((count,), minimum)
    most = spare if maximum is None else min(spare, maximum - minimum)
    budget = torch.arange(minimum, minimum + most + 1, dtype=torch.float64)
    gains = UTILITIES[utility](budget, chance.double()[:, None]) + _EVENLY * budget.log1p()
    found, price = _first_solution(gains, spare)
    return minimum + _best(gains, spare, _worth_trying(gains, spare, found, price))


def route(
    chance: Float[Tensor, "M"], cost: Float[Tensor, "M"], *, weight: float
) -> tuple[int, Float[Tensor, "M"]]:
    """Which of several models to send a prompt to: likely to solve it, and cheap.

        score_m = weight · p_m + (1 - weight) · (1 - cost_m / max(cost))

    As reported of V_0, arXiv:2602.03584.

    Args:
        chance: p_m, that model m solves it.
        cost: of asking model m, any unit, not all 0.
        weight: 1: only the chance counts; 0: only the cost.

    Returns:
        choice: the best model, the first of several.
        scores: of all.

    >>> route(torch.tensor([0.8, 0.6, 0.3]), torch.tensor([1.0, 0.4, 0.1]), weight=1.0)[0]
    0
    """
    scores = weight * chance + (1 - weight) * (1 - cost / cost.max())
    return int(scores.argmax()), scores


def _check(chance: Tensor, total: int, minimum: int, maximum: int | None) -> None:
    count = len(chance)
    if not ((chance >= 0) & (chance <= 1)).all():
        outside = chance[~((chance >= 0) & (chance <= 1))][0].item()
        raise ValueError(f"chances are probabilities in [0, 1]; found {outside}")
    if minimum < 1 or total < count * minimum:
        raise ValueError(
            f"{total} responses are not enough for {count} prompts with at least {minimum} each; "
            "lower min_responses (1 is the least), or raise group_size"
        )
    if maximum is not None and total > count * maximum:
        raise ValueError(
            f"{total} responses are too many for {count} prompts with at most {maximum} each; "
            "raise max_responses, or lower group_size"
        )


def _first_solution(gains: Tensor, spare: int) -> tuple[Tensor, float]:
    """A good allocation of the spare responses, and the price at which demand meets supply."""
    extra = torch.arange(gains.shape[1], dtype=gains.dtype)
    low, high = 0.0, float(gains.diff(dim=1).max())
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        if int((gains - price * extra).argmax(dim=1).sum()) > spare:
            low = price
        else:
            high = price
    given = (gains - high * extra).argmax(dim=1)
    # Prompts that jump from one demand to another at this price are at the higher one while it fits.
    jumps = ((gains - low * extra).argmax(dim=1) - given).clamp(min=0)
    given = given + jumps.where(jumps.cumsum(0) <= spare - int(given.sum()), 0)
    rest = spare - int(given.sum())
    candidates = _one_takes(gains, given, rest), _one_by_one(gains, given, rest)
    return max((c for c in candidates if c is not None), key=lambda c: _total(gains, c)), high


def _one_takes(gains: Tensor, given: Tensor, rest: int) -> Tensor | None:
    """The rest to whom it helps most, if anyone has room for it."""
    fits = given + rest < gains.shape[1]
    if not fits.any():
        return None
    after = (given + rest).clamp(max=gains.shape[1] - 1)
    gained = _at(gains, after) - _at(gains, given)
    winner = gained.masked_fill(~fits, -math.inf).argmax()
    return given.index_add(0, winner[None], torch.tensor([rest]))


def _one_by_one(gains: Tensor, given: Tensor, rest: int) -> Tensor:
    """Each response of the rest to whom it helps most."""
    given, last = given.clone(), gains.shape[1] - 1
    step = gains.diff(dim=1, append=torch.full((len(gains), 1), -math.inf, dtype=gains.dtype))
    following = _at(step, given)
    for _ in range(rest):
        winner = int(following.argmax())
        given[winner] += 1
        following[winner] = step[winner, int(given[winner].clamp(max=last))]
    return given


def _at(gains: Tensor, given: Tensor) -> Tensor:
    return gains.gather(1, given[:, None]).squeeze(1)


def _total(gains: Tensor, given: Tensor) -> float:
    return float(_at(gains, given).sum())


def _worth_trying(gains: Tensor, spare: int, found: Tensor, price: float) -> list[Tensor]:
    """For each prompt the numbers of extra responses that an optimum may have."""
    priced = gains - price * torch.arange(gains.shape[1], dtype=gains.dtype)
    best = priced.amax(dim=1)
    gap = best.sum() + price * spare - _total(gains, found)
    within = best[:, None] - priced <= gap
    within.scatter_(1, found[:, None], True)  # whatever rounding does, one solution is left
    return [row.nonzero().squeeze(1) for row in within]


def _best(gains: Tensor, spare: int, choices: list[Tensor]) -> Tensor:
    """The optimum among the choices: value[b] is the most that the prompts so far make of b responses."""
    supply = torch.arange(spare + 1)
    value = torch.where(supply == 0, 0.0, -math.inf).to(gains.dtype)
    chosen: list[Tensor] = []
    for gain, choice in zip(gains, choices, strict=True):
        left = supply[:, None] - choice
        reached = torch.where(left >= 0, value[left.clamp(min=0)] + gain[choice], -math.inf)
        value, pick = reached.max(dim=1)
        chosen.append(choice[pick])
    given = torch.zeros(len(gains), dtype=torch.long)
    for index in reversed(range(len(gains))):
        given[index] = chosen[index][spare]
        spare -= int(given[index])
    return given
