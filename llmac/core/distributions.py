"""A distribution of returns on fixed atoms: targets for a softmax over them, and what it says.

An atom is a return, in the unit of rewards, in ascending order. Atoms are made from the support
each time they are needed, in the precision of what they are used with: kept in a module they would
be rounded along with its weights, and bfloat16 moves the atoms of [0, 1] by up to 0.004.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

WIDEST_TILT = 400.0
"""How far apart the logits of `even_with_mean` may lie: a probability of e^-400 is 0 in float64."""


def bin_edges(low: float, high: float, bins: int) -> Float[Tensor, "M"]:
    """Where `bins` equal bins of [low, high] begin and end.

    >>> bin_edges(0.0, 1.0, 2)
    tensor([0.0000, 0.5000, 1.0000])
    """
    return torch.linspace(low, high, bins + 1)


def bin_centers(low: float, high: float, bins: int) -> Float[Tensor, "K"]:
    """Midpoints of `bins` equal bins of [low, high].

    >>> bin_centers(0.0, 1.0, 2)
    tensor([0.2500, 0.7500])
    """
    half = (high - low) / bins / 2
    return torch.linspace(low + half, high - half, bins)


def expectation(
    logits: Float[Tensor, "*shape K"], atoms: Float[Tensor, "K"]
) -> Float[Tensor, "*shape"]:
    """Mean return of a softmax over atoms.

        V = Σ_k softmax(z)_k · c_k

    Args:
        logits: z.
        atoms: c, unit of reward.

    Returns:
        Unit of reward, in float32 or wider.

    >>> expectation(torch.zeros(3), torch.tensor([0.0, 1.0, 5.0]))
    tensor(2.)
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # A sum and not a matrix product: autocast would run that in half precision.
    return (wide.softmax(dim=-1) * atoms.to(wide)).sum(dim=-1)


def gaussian_mass(
    y: Float[Tensor, "*shape"], edges: Float[Tensor, "M"], *, sigma: float
) -> Float[Tensor, "*shape K"]:
    """The share of a normal distribution around `y` that falls into each bin (HL-Gauss).

        q_k = [Φ((e_{k+1} - y)/σ) - Φ((e_k - y)/σ)] / [Φ((e_K - y)/σ) - Φ((e_0 - y)/σ)]

    Imani and White 2018, arXiv:1806.04613; for value functions, Farebrother et al. 2024,
    arXiv:2403.03950. Nearer to an end of the support than 2σ or so, the mean of q is not y.

    Args:
        y: returns inside the support, unit of reward.
        edges: of the K bins, ascending: M = K + 1 of them.
        sigma: standard deviation of the smoothing, unit of reward.

    Returns:
        Probabilities.

    >>> gaussian_mass(torch.tensor(0.5), bin_edges(0.0, 1.0, 4), sigma=0.1875)
    tensor([0.0881, 0.4119, 0.4119, 0.0881])
    """
    below = 0.5 * torch.erfc((y[..., None] - edges.to(y)) / (sigma * math.sqrt(2)))
    return (below[..., 1:] - below[..., :-1]) / (below[..., -1:] - below[..., :1])


def gaussian_density(
    y: Float[Tensor, "*shape"], centers: Float[Tensor, "K"], *, sigma: float
) -> Float[Tensor, "*shape K"]:
    """A normal density around `y` at the bins' centres, normalised.

        q_k ∝ exp(-(c_k - y)² / 2σ²)

    What HL-Gauss PPO (arXiv:2608.02181) computes where its formula is `gaussian_mass`; with bins
    narrower than σ the two hardly differ.

    Args:
        y: returns, unit of reward.
        centers: of the bins.
        sigma: standard deviation of the smoothing, unit of reward.

    Returns:
        Probabilities.

    >>> gaussian_density(torch.tensor(0.5), bin_centers(0.0, 1.0, 4), sigma=0.1875)
    tensor([0.0723, 0.4277, 0.4277, 0.0723])
    """
    return (-((centers.to(y) - y[..., None]) ** 2) / (2 * sigma**2)).softmax(dim=-1)


def two_hot(y: Float[Tensor, "*shape"], atoms: Float[Tensor, "K"]) -> Float[Tensor, "*shape K"]:
    """The two atoms around `y`, each with the weight that makes the mean `y`.

        q_u = (y - c_l) / (c_u - c_l),    q_l = 1 - q_u        for c_l <= y <= c_u

    Exact everywhere, ends included. Atoms need not be equally spaced.

    Args:
        y: returns; those outside of the atoms count as the nearest.
        atoms: c, ascending.

    Returns:
        Probabilities.

    >>> two_hot(torch.tensor(0.8), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    tensor([0.0000, 0.0000, 0.0000, 0.8000, 0.2000])
    """
    return project(y[..., None], torch.ones_like(y)[..., None], atoms)


def project(
    returns: Float[Tensor, "*shape N"],
    probabilities: Float[Tensor, "*shape N"],
    atoms: Float[Tensor, "K"],
) -> Float[Tensor, "*shape K"]:
    """A distribution on any returns, moved to the atoms: each mass is split between its neighbours.

    The mean is kept, unless a return lies outside of the atoms: it then counts as the nearest.
    C51: Bellemare et al. 2017, arXiv:1707.06887.

    Args:
        returns: where the mass is, unit of reward.
        probabilities: how much of it.
        atoms: where it goes, ascending.

    Returns:
        Probabilities.

    >>> atoms = torch.linspace(0.0, 1.0, 5)
    >>> project(0.9 * atoms, torch.tensor([0.2, 0.0, 0.3, 0.0, 0.5]), atoms)
    tensor([0.2000, 0.0600, 0.2400, 0.2000, 0.3000])
    """
    atoms = atoms.to(returns)
    inside = returns.clamp(float(atoms[0]), float(atoms[-1])).contiguous()
    upper = torch.searchsorted(atoms, inside, right=True).clamp(1, len(atoms) - 1)
    share = (inside - atoms[upper - 1]) / (atoms[upper] - atoms[upper - 1])
    empty = returns.new_zeros((*returns.shape[:-1], len(atoms)))
    lower = empty.scatter_add(-1, upper - 1, probabilities * (1 - share))
    return lower.scatter_add(-1, upper, probabilities * share)


def lambda_distributions(
    predicted: Float[Tensor, "B S K"],
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    truncated: Bool[Tensor, "B"],
    atoms: Float[Tensor, "K"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, "B T K"]:
    """What the distribution of the return from each state should have been: C51 with λ-returns.

        q_t = Π[ r_t + γ · ((1-λ) · p_{t+1} + λ · q_{t+1}) ]

    where r + γ·p means the distribution p moved and shrunk, Π is `project`, and behind the end all
    mass is at 0; behind a truncated response it is p(s_T). λ = 0 is C51's one-step target, λ = 1 is
    `two_hot` of the discounted return. Its mean is the λ-return of the means, unless something left
    the atoms. One pass over time, from the end.

    Args:
        predicted: p, probabilities at s_0 .. s_T (S = T + 1), constant.
        rewards: r.
        mask: states that count; between them rewards add up without discount.
        truncated: rows that go on behind the last token.
        atoms: ascending; 0 among or between them.
        gamma: discount of one counted state.
        lam: λ.

    Returns:
        Probabilities; anything where `mask` is False.

    >>> certain = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    >>> ended, atoms = torch.tensor([False]), torch.tensor([0.0, 1.0])
    >>> lambda_distributions(certain, torch.ones(1, 1), torch.tensor([[True]]), ended, atoms,
    ...                      gamma=1.0, lam=0.95)
    tensor([[[0., 1.]]])
    """
    atoms = atoms.to(predicted)
    nothing = two_hot(predicted.new_zeros(len(predicted)), atoms)
    says = torch.where(truncated[:, None], predicted[:, -1], nothing)
    should = says
    targets = torch.zeros_like(predicted[:, :-1])
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t, None]
        moved = rewards[:, t, None] + torch.where(counts, gamma, 1.0) * atoms
        says, should = project(moved, says, atoms), project(moved, should, atoms)
        targets[:, t] = (1 - lam) * says + lam * should
        should = torch.where(counts, targets[:, t], should)
        says = torch.where(counts, predicted[:, t], says)
    return targets


def even_with_mean(mean: float, atoms: Float[Tensor, "K"]) -> Float[Tensor, "K"]:
    """Logits of the most even distribution on the atoms that has a given mean.

        z_k = β · (c_k - mean),    β such that Σ_k softmax(z)_k · c_k = mean

    Of all distributions with that mean it has the largest entropy (Jaynes 1957).

    Args:
        mean: moved inside the atoms if it is not between them.
        atoms: c, ascending, at least two.

    Returns:
        Logits.

    >>> even_with_mean(0.25, torch.tensor([0.0, 1.0])).softmax(-1)
    tensor([0.7500, 0.2500])
    """
    grid = atoms.double()
    width = float(grid[-1] - grid[0])
    margin = 1e-6 * width
    wanted = min(max(mean, float(grid[0]) + margin), float(grid[-1]) - margin)
    below, above = -WIDEST_TILT / width, WIDEST_TILT / width
    while expectation(above * grid, grid) < wanted or expectation(below * grid, grid) > wanted:
        below, above = 2 * below, 2 * above
    for _ in range(100):
        middle = (below + above) / 2
        if float(expectation(middle * grid, grid)) < wanted:
            below = middle
        else:
            above = middle
    return ((below + above) / 2 * (grid - wanted)).to(atoms.dtype)


def open_with_mean(
    mean: float, atoms: Float[Tensor, "K"], *, share: float = 0.02
) -> Float[Tensor, "K"]:
    """`even_with_mean` that leaves every atom some chance: where a head starts that must still learn.

        p = (1 - ε) · softmax(even_with_mean(m', atoms)) + ε / K,    m' such that the mean is kept

    Without the second term a head that starts at an end of its range, because the first responses
    all failed, gives the other end a chance of e^-1000, and no step of an optimizer finds it again.

    Args:
        mean: moved inside the atoms by less than ε of their width if it is at an end or beyond.
        atoms: ascending, at least two.
        share: ε.

    Returns:
        Logits.

    >>> open_with_mean(0.0, torch.tensor([0.0, 1.0])).softmax(-1)
    tensor([0.9900, 0.0100])
    """
    inner = (mean - share * float(atoms.double().mean())) / (1 - share)
    tilted = even_with_mean(inner, atoms.double()).softmax(-1)
    return ((1 - share) * tilted + share / len(atoms)).log().to(atoms.dtype)
