"""Targets on atoms and what they say: hand-computed numbers, exact means, and the stated bias at the ends."""

import math

import pytest
import torch

from llmac.core.distributions import (
    bin_centers,
    bin_edges,
    even_with_mean,
    expectation,
    gaussian_density,
    gaussian_mass,
    lambda_distributions,
    open_with_mean,
    project,
    two_hot,
)
from llmac.core.returns import segment_gae
from llmac.core.value_losses import cross_entropy

FIVE = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
FOUR = bin_edges(0.0, 1.0, 4), bin_centers(0.0, 1.0, 4)
RECIPE = bin_edges(-0.1, 1.1, 101), bin_centers(-0.1, 1.1, 101)


def check_close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found, torch.as_tensor(wanted), rtol=0, atol=atol, check_dtype=False)


def mean(probabilities, atoms):
    return (probabilities * atoms).sum(-1)


@pytest.mark.parametrize(
    ("y", "mass", "of_mass", "density", "of_density"),
    [
        (0.5, [0.088055, 0.411945, 0.411945, 0.088055], 0.5,
         [0.072289, 0.427711, 0.427711, 0.072289], 0.5),
        (0.8, [0.001945, 0.061992, 0.39684, 0.539223], 0.743335,
         [0.000931, 0.046488, 0.392498, 0.560084], 0.752934),
    ],
)  # fmt: skip
def test_hl_gauss_of_four_bins(y, mass, of_mass, density, of_density):
    edges, centers = FOUR
    q = gaussian_mass(torch.tensor(y), edges, sigma=0.1875)
    check_close(q, mass)
    check_close(mean(q, centers), of_mass)
    q = gaussian_density(torch.tensor(y), centers, sigma=0.1875)
    check_close(q, density)
    check_close(mean(q, centers), of_density)


def test_the_end_of_a_support_biases_hl_gauss_and_a_margin_does_not():
    one = torch.tensor(1.0)
    edges, centers = FOUR
    check_close(mean(gaussian_mass(one, edges, sigma=0.1875), centers), 0.827463)
    edges, centers = bin_edges(0.0, 1.0, 101), bin_centers(0.0, 1.0, 101)
    check_close(mean(gaussian_mass(one, edges, sigma=0.75 / 101), centers), 0.993167)
    edges, centers = RECIPE
    check_close(mean(gaussian_mass(one, edges, sigma=0.024), centers), 0.999998)


def test_cross_entropy_of_an_even_softmax_and_at_best():
    edges, centers = FOUR
    q = gaussian_mass(torch.tensor(0.5), edges, sigma=0.1875)
    check_close(cross_entropy(torch.zeros(4), q), math.log(4))
    check_close(cross_entropy(q.log(), q), 1.158592)
    edges, centers = RECIPE
    half = torch.tensor(0.5)
    for q, floor in (
        (gaussian_mass(half, edges, sigma=0.024), 2.132),
        (gaussian_density(half, centers, sigma=0.024), 2.122),
    ):
        check_close(cross_entropy(torch.zeros(101), q), 4.615121)
        check_close(cross_entropy(q.clamp(min=1e-30).log(), q), floor, atol=1e-3)


def test_the_gradient_of_cross_entropy_is_what_is_said_minus_what_should_be():
    logits = torch.zeros(4, requires_grad=True)
    cross_entropy(logits, gaussian_mass(torch.tensor(0.8), FOUR[0], sigma=0.1875)).backward()
    check_close(logits.grad, [0.248055, 0.188008, -0.14684, -0.289223])


def test_a_mixture_of_targets_says_the_mean_return():
    # the best head after 30 % successes decodes 0.3
    edges, centers = RECIPE
    zero, one = (gaussian_mass(torch.tensor(y), edges, sigma=0.024) for y in (0.0, 1.0))
    check_close(mean(0.7 * zero + 0.3 * one, centers), 0.300001, atol=2e-6)


def test_two_hot_is_exact_everywhere_ends_included():
    check_close(two_hot(torch.tensor(0.8), FIVE), [0, 0, 0, 0.8, 0.2])
    check_close(two_hot(torch.tensor(1.0), FIVE), [0, 0, 0, 0, 1.0])
    uneven = torch.tensor([-1.0, -0.6, -0.3, 1.0])
    for atoms in (FIVE, uneven):
        y = torch.linspace(float(atoms[0]), float(atoms[-1]), 37)
        q = two_hot(y, atoms)
        check_close(mean(q, atoms), y)
        assert ((q > 1e-7).sum(-1) <= 2).all()
        check_close(q.sum(-1), torch.ones(37))


def test_what_lies_outside_of_the_atoms_counts_as_the_nearest():
    check_close(two_hot(torch.tensor([-3.0, 7.0]), FIVE), [[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0]])


def test_c51_projects_a_shrunk_distribution():
    p = torch.tensor([0.2, 0.0, 0.3, 0.0, 0.5])
    q = project(0.9 * FIVE, p, FIVE)
    check_close(q, [0.2, 0.06, 0.24, 0.2, 0.3])
    check_close(mean(q, FIVE), 0.585)


def responses(seed=0):
    """Ragged rows with an injected token, a truncated row, and rewards that stay inside of [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(
        [[True, True, True, True], [True, False, True, False], [True, True, False, False]]
    )
    rewards = torch.zeros(3, 4)
    rewards[0, 3], rewards[1, 2] = 0.5, 1.0
    logits = torch.randn(3, 5, 5, generator=generator) - torch.arange(5.0)
    p = logits.softmax(-1)
    p[1, 3:] = p[1, 3]
    p[2, 2:] = p[2, 2]
    return p, rewards, mask, torch.tensor([False, False, True])


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_mean_of_a_bootstrapped_distribution_is_the_scalar_lambda_return(lam, gamma):
    p, rewards, mask, truncated = responses()
    q = lambda_distributions(p, rewards, mask, truncated, FIVE, gamma=gamma, lam=lam)
    values = mean(p, FIVE)
    advantages = segment_gae(
        rewards,
        values[:, :-1] * mask,
        mask,
        values[:, -1] * truncated,
        gamma=gamma,
        lam=lam,
        action_mask=mask,
    )
    check_close((mean(q, FIVE) - values[:, :-1])[mask], advantages[mask])
    check_close(q.sum(-1)[mask], torch.ones(int(mask.sum())))


def test_lambda_one_makes_c51_two_hot_of_the_return():
    p, rewards, mask, truncated = responses()
    q = lambda_distributions(p, rewards, mask, truncated, FIVE, gamma=1.0, lam=1.0)
    returns = rewards.sum(1, keepdim=True).expand_as(rewards)
    ended = mask & ~truncated[:, None]
    check_close(q[ended], two_hot(returns, FIVE)[ended])
    check_close(q[2, 0], p[2, 2])  # the truncated row goes on as the critic says


def test_lambda_zero_looks_one_asked_state_ahead():
    p, rewards, mask, truncated = responses()
    q = lambda_distributions(p, rewards, mask, truncated, FIVE, gamma=1.0, lam=0.0)
    check_close(q[0, 0], p[0, 1])
    check_close(q[1, 0], p[1, 2])  # the injected token's state is not asked
    check_close(q[0, 3], two_hot(torch.tensor(0.5), FIVE))


@pytest.mark.parametrize("wanted", [0.003, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("atoms", [FIVE, RECIPE[1], torch.tensor([-1.0, -0.6, -0.3, 1.0])])
def test_the_most_even_distribution_has_the_wanted_mean(atoms, wanted):
    logits = even_with_mean(wanted, atoms)
    check_close(expectation(logits, atoms), wanted, atol=2e-6)
    steps = logits.diff() / atoms.diff()  # a straight line in the atoms
    check_close(steps, steps[0].expand_as(steps), atol=1e-3 * float(steps.abs().max()) + 1e-3)


def test_a_mean_at_the_end_or_beyond_is_moved_inside():
    for wanted, found in ((0.0, 0.0), (-5.0, 0.0), (1.0, 1.0), (9.0, 1.0)):
        check_close(expectation(even_with_mean(wanted, FIVE), FIVE), found)
    wide = torch.tensor([-500.0, 700.0])
    check_close(expectation(even_with_mean(100.0, wide), wide), 100.0, atol=1e-3)


def test_values_are_decoded_in_float32_from_half_precision():
    logits = even_with_mean(0.3, RECIPE[1])
    half = logits.bfloat16()
    check_close(expectation(half, RECIPE[1]), mean(half.float().softmax(-1), RECIPE[1]), atol=1e-6)
    assert expectation(half, RECIPE[1]).dtype == torch.float32


@pytest.mark.parametrize("wanted", [-3.0, 0.0, 0.05, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("atoms", [FIVE, torch.linspace(0.0, 1.0, 101)])
def test_an_open_distribution_has_the_mean_and_rules_nothing_out(atoms, wanted):
    logits = open_with_mean(wanted, atoms)
    check_close(expectation(logits, atoms), min(max(wanted, 0.01), 0.99), atol=2e-6)
    assert float(logits.softmax(-1).min()) >= 0.0199 / len(atoms)
