"""Numbers that tell whether training is healthy."""

import itertools
import math

import pytest
import torch

from llmac.core.diagnostics import (
    advantage_by_outcome,
    explained_variance,
    pass_at_k,
    sampler_gap,
)
from llmac.core.measures import combine

MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_explained_variance_of_perfect_constant_and_harmful_critics():
    returns = torch.tensor([[0.0, 1.0, math.nan], [1.0, 0.0, 1.0]])
    assert explained_variance(returns, returns, MASK).item() == 1.0
    constant = torch.full((2, 3), 17.0)
    assert explained_variance(constant, returns, MASK).item() == pytest.approx(0.0, abs=1e-5)
    # V = -G: Var(2G) = 4 Var(G)
    assert explained_variance(-returns, returns, MASK).item() == pytest.approx(-3.0)
    assert explained_variance(0.5 * returns, returns, MASK).item() == pytest.approx(0.75)


def test_equal_returns_leave_nothing_to_explain():
    returns = torch.full((2, 3), 0.1)
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert explained_variance(values, returns, MASK).item() == 0.0
    nothing = torch.zeros_like(MASK)
    assert explained_variance(values, returns, nothing).item() == 0.0


def test_returns_that_differ_by_rounding_leave_nothing_to_explain():
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 50, dtype=torch.bool)
    values = torch.rand(4, 50, generator=generator)
    one = torch.tensor(1.0)
    returns = torch.where(values < 0.5, one, torch.nextafter(one, 2 * one))
    assert explained_variance(values, returns, mask) == 0.0
    truly = 1.0 + 0.01 * torch.rand(4, 50, generator=generator)
    assert explained_variance(values, truly, mask) < -10


def test_the_sampler_gap_of_five_tokens():
    old = torch.tensor([[-1.0, -2.0, math.nan], [-1.0, -1.0, -3.0]])
    sampler = torch.tensor([[-1.0, -1.5, 0.0], [-1.2, -1.0, -3.0]])
    gap = sampler_gap(old, sampler, MASK)  # d = 0, -.5, .2, 0, 0
    assert gap["actor/sampler_logprob_diff_mean"].value == pytest.approx(0.7 / 5)
    assert gap["actor/sampler_logprob_diff_max"].value == pytest.approx(0.5)
    assert gap["actor/sampler_ratio_mean"].value == pytest.approx(
        (3 + math.exp(-0.5) + math.exp(0.2)) / 5
    )
    assert gap["actor/sampler_kl"].value == pytest.approx(
        (math.exp(-0.5) - 1 + 0.5 + math.exp(0.2) - 1 - 0.2) / 5
    )


def test_the_sampler_gap_adds_up_over_micro_batches():
    old, sampler = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    whole = sampler_gap(old, sampler, MASK)
    parts = combine(
        *(sampler_gap(old[i : i + 1], sampler[i : i + 1], MASK[i : i + 1]) for i in (0, 1))
    )
    for name, measure in whole.items():
        assert parts[name].value == pytest.approx(measure.value)


def test_the_sampler_gap_of_nothing_is_zero():
    gap = sampler_gap(torch.zeros(1, 0), torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.bool))
    assert {measure.value for measure in gap.values()} == {0.0}


def test_the_sampler_kl_averages_to_the_divergence():
    sampler, policy = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
    estimate = sum(
        chance
        * sampler_gap(p.log()[None, None], s.log()[None, None], torch.tensor([[True]]))[
            "actor/sampler_kl"
        ].value
        for chance, p, s in zip(sampler[0].tolist(), policy[0], sampler[0], strict=True)
    )
    exact = (sampler * (sampler / policy).log()).sum().item()
    assert estimate == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 2), (6, 2, 3), (5, 5, 1), (5, 0, 5), (6, 4, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, 1, 5), (4, -1, 1), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)


def test_advantages_are_told_apart_by_outcome():
    advantages = torch.tensor([[1.0, 2.0, math.nan], [-1.0, -2.0, -6.0]])
    split = advantage_by_outcome(advantages, MASK, torch.tensor([1.0, 0.0]))
    assert split["critic/advantages/good/mean"].value == 1.5
    assert split["critic/advantages/bad/mean"].value == -3.0
    higher = advantage_by_outcome(advantages, MASK, torch.tensor([1.0, 0.0]), threshold=2.0)
    assert higher["critic/advantages/good/mean"].value == 0.0
    assert higher["critic/advantages/bad/mean"].value == pytest.approx(-6 / 5)
