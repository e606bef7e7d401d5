"""How good a critic is on responses it has not learned from, by single outcomes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmac.core.calibration import (
    bias,
    calibration_curve,
    expected_calibration_error,
    mean_squared_error,
    ranking_auc,
    variance_explained,
)
from llmac.core.measures import Last, Metrics

THIRDS = ("first", "middle", "last")
"""Parts of a response, by tokens, that are looked at apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One held-out response: what the critic said before each sampled token, and what came of it."""

    values: Tensor
    """[T']"""
    returns: Tensor
    """[T']"""
    prompt: int
    """Same for siblings."""


def report(judged: Sequence[Judged]) -> Metrics:
    """The instruments over all states, and over the first, middle and last third of the responses.

    A state counts as success if its return is nearer to the largest return seen than to the smallest. Rankings are
    undefined, and absent, where one of the two outcomes is missing; the Brier score where returns are not 0 or 1, and
    there it is the squared error.
    """
    values = torch.cat([one.values for one in judged]).double()
    returns = torch.cat([one.returns for one in judged]).double()
    prompt = torch.cat([torch.full(one.values.shape, one.prompt) for one in judged])
    third = torch.cat([_thirds(len(one.values)) for one in judged])
    low, high = float(returns.min()), float(returns.max())
    binary = bool(((returns == 0) | (returns == 1)).all())
    found: dict[str, float] = {}
    for part, member in _parts(third):
        v, g, p = values[member], returns[member], prompt[member]
        one = torch.ones_like(v)
        error = float(mean_squared_error(v, g, one))
        curve = calibration_curve(v, g, one, low=low, high=high)
        success = (g > (low + high) / 2).double()
        together = torch.zeros_like(p)
        found |= {
            f"held_out/{part}/explained_variance": float(variance_explained(v, g, one)),
            f"held_out/{part}/squared_error": error,
            f"held_out/{part}/brier": error if binary else math.nan,
            f"held_out/{part}/bias": float(bias(v, g, one)),
            f"held_out/{part}/ece": float(expected_calibration_error(curve)),
            f"held_out/{part}/auc": float(ranking_auc(v, success, 1 - success, together, one)),
            f"held_out/{part}/auc_within_prompts": float(
                ranking_auc(v, success, 1 - success, p, one)
            ),
        }
    return {name: Last(value) for name, value in found.items() if not math.isnan(value)}


def _parts(third: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, states that belong to it)."""
    yield "all", torch.ones_like(third, dtype=torch.bool)
    for number, name in enumerate(THIRDS):
        member = third == number
        if bool(member.any()):
            yield name, member


def _thirds(tokens: int) -> Tensor:
    """The third of each state of a response; the first state is in the first."""
    return torch.arange(tokens) * len(THIRDS) // max(tokens, 1)
