"""Outcomes of known prompts to chances of unknown ones, in closed form: regression with a kernel."""

import torch
from jaxtyping import Float
from torch import Tensor

NOISE_LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""Candidates for the noise of an outcome, in units of the kernel, rising; the last leaves the mean alone."""


def kernel_regression(
    known: Float[Tensor, "N H"],
    outcomes: Float[Tensor, "N"],
    asked: Float[Tensor, "M H"],
    *,
    age: Float[Tensor, "N"],
    responses: Float[Tensor, "N"],
    memory_steps: float,
) -> Float[Tensor, "M"]:
    """What to expect of prompts, from the outcomes of those near them in meaning and time.

        k(i, j) = exp(-|age_i - age_j| / memory_steps) · (1 + exp(-‖x_i - x_j‖² / (2 m)))
        E[y | x] = ȳ + k(x)ᵀ (K + λ D)⁻¹ (y - ȳ),       D = mean(responses) / responses

    The 1 stands for how good the policy is on the whole, the other term for which prompts it is
    good at; both fade as the policy moves on. Every feature has mean 0 and variance 1 over the
    known prompts, m is the median of their squared distances, and λ is the largest of
    `NOISE_LEVELS` whose leave-one-out error is the smallest, up to one standard error of the
    difference (few prompts seem to say more than they do)

        e_i = [(K + λ D)⁻¹ (y - ȳ)]_i / [(K + λ D)⁻¹]_ii

    which needs no second fit. Where prompts have nothing to do with outcomes, λ becomes large, and
    the mean is all that is left. Kernel ridge regression: Saunders et al. 1998 (ICML).

    Args:
        known: features of the prompts with outcomes, at least one.
        outcomes: y, the mean over each prompt's responses.
        asked: features of the others; asked for at age 0.
        age: steps since the outcomes were seen, at least 0.
        responses: how many each outcome is the mean of.
        memory_steps: after that many steps an outcome says 1/e of what it did.

    Returns:
        Expectations in the unit of `outcomes`; beyond their range where they rise towards its end.

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> y = kernel_regression(
    ...     x, torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([[1.0], [2.0]]),
    ...     age=torch.ones(4), responses=torch.ones(4), memory_steps=8.0)
    >>> y.round(decimals=1)
    tensor([0.1000, 0.9000])
    """
    mean, std = known.mean(0), known.std(0, correction=0).clamp(min=1e-6)
    known, asked = ((x - mean) / std for x in (known.double(), asked.double()))
    apart = torch.cdist(known, known).square()
    off_diagonal = ~torch.eye(len(known), dtype=torch.bool, device=known.device)
    width = apart[off_diagonal].median() if len(known) > 1 else apart.new_ones(())
    width = width.where(width > 0, 1.0)
    age = age.double()

    def kernel(distance: Tensor, between: Tensor) -> Tensor:
        return torch.exp(-between.abs() / memory_steps) * (1 + torch.exp(-distance / (2 * width)))

    inner = kernel(apart, age[:, None] - age)
    outer = kernel(torch.cdist(asked, known).square(), age[None])
    weight = responses.double() / responses.double().sum()
    level = (weight * outcomes.double()).sum()
    wanted = outcomes.double() - level
    noise = torch.diag(responses.double().mean() / responses.double())
    solutions: list[Tensor] = []
    errors: list[Tensor] = []
    for noise_level in NOISE_LEVELS:
        inverse = torch.inverse(inner + noise_level * noise)
        solutions.append(inverse @ wanted)
        errors.append((solutions[-1] / inverse.diagonal()).square())
    chosen = _largest_as_good(torch.stack(errors), weight)
    return (level + outer @ solutions[chosen]).to(outcomes.dtype)


def _largest_as_good(errors: Float[Tensor, "L N"], weight: Float[Tensor, "N"]) -> int:
    """The last row whose mean exceeds the smallest by no more than the standard error of the difference."""
    means = errors @ weight
    excess = errors - errors[means.argmin()]
    doubt = ((excess - (excess @ weight)[:, None]).square() @ weight.square()).sqrt()
    as_good = excess @ weight <= doubt
    return int(as_good.nonzero().max())
