"""One value from several heads that were taught the same."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Combine = Literal["mean", "min", "soft_min", "min_max"]
"""How the heads of an ensemble become one value; `Combination` has the formulas."""


def soft_min(values: Float[Tensor, "*shape E"], *, temperature: float) -> Float[Tensor, "*shape"]:
    """Pessimistic, and differentiable in every head.

        V = -α · log( (1/E) · Σ_e exp(-V_e / α) )

    Equal heads give their value; otherwise min <= V <= min + α · log E. SAFE, arXiv:2602.04651, for
    E = 2 and α = 0.3.

    Args:
        values: of the heads.
        temperature: α, unit of reward.

    >>> soft_min(torch.tensor([1.0, 0.0]), temperature=0.3)
    tensor(0.1974)
    """
    heads = values.shape[-1]
    return -temperature * ((-values / temperature).logsumexp(dim=-1) - math.log(heads))


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """How an ensemble speaks with one voice.

        mean        the average: least noise
        min         the smallest: clipped double Q of TD3 (Fujimoto et al. 2018, arXiv:1802.09477)
        soft_min    `soft_min`
        min_max     w · smallest + (1 - w) · largest

    All but the mean are pessimistic where the heads disagree. That leaves an on-policy baseline unbiased, but
    biases a target that bootstraps (lam < 1) downwards.
    """

    how: Combine = "mean"
    temperature: float = 0.3
    """α of `soft_min`, unit of reward."""
    min_weight: float = 0.75
    """w of `min_max`."""

    def __call__(self, values: Float[Tensor, "*shape E"]) -> Float[Tensor, "*shape"]:
        """The one value.

        >>> Combination(how="min_max")(torch.tensor([0.7, 0.5]))
        tensor(0.5500)
        """
        if self.how == "mean":
            return values.mean(dim=-1)
        if self.how == "soft_min":
            return soft_min(values, temperature=self.temperature)
        smallest = values.amin(dim=-1)
        if self.how == "min":
            return smallest
        return self.min_weight * smallest + (1 - self.min_weight) * values.amax(dim=-1)


def spread(values: Float[Tensor, "*shape E"]) -> Float[Tensor, "*shape"]:
    """How far apart the heads are: largest minus smallest.

    >>> spread(torch.tensor([0.75, 0.5, 0.625]))
    tensor(0.2500)
    """
    return torch.aminmax(values, dim=-1).max - torch.aminmax(values, dim=-1).min
