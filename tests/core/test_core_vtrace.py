"""V-trace: closed forms, what it reduces to, and what it estimates."""

import math

import pytest
import torch

from llmac.core.returns import segment_gae
from llmac.core.segments import every_n, every_token, response_start
from llmac.core.vtrace import segment_ratios, vtrace

VALUES = torch.tensor([[0.2, 0.5, 0.8]])
REWARDS = torch.tensor([[0.0, 0.0, 1.0]])
EVERY = torch.ones(1, 3, dtype=torch.bool)
ENDED = torch.zeros(1)
PLAIN = {"gamma": 1.0, "lam": 1.0, "rho_max": 1.0, "c_max": 1.0}


@pytest.mark.parametrize(
    ("ratios", "targets", "advantages"),
    [
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.8, 0.5, 0.2]),
        # δ = .3, .5·.3, .2; v - V = .2; .15 + .5·.2; .3 + 1·.25
        ([2.0, 0.5, 1.0], [0.75, 0.75, 1.0], [0.55, 0.25, 0.2]),
        # δ = .15, .15, .1; v - V = .1; .15 + .5·.1; .15 + .5·.2
        ([0.5, 0.5, 0.5], [0.45, 0.7, 0.9], [0.25, 0.2, 0.1]),
    ],
)
def test_targets_and_advantages_of_three_tokens(ratios, targets, advantages):
    found = vtrace(REWARDS, VALUES, torch.tensor([ratios]), EVERY, ENDED, **PLAIN)
    torch.testing.assert_close(found[0], torch.tensor([advantages]))
    torch.testing.assert_close(found[1], torch.tensor([targets]))


def test_rho_and_c_are_bounded_apart():
    ratios = torch.tensor([[2.0, 3.0, 0.5]])
    rates = {"gamma": 1.0, "lam": 1.0, "rho_max": 2.0, "c_max": 1.0}
    advantages, targets = vtrace(REWARDS, VALUES, ratios, EVERY, ENDED, **rates)
    # v - V = .5·.2 = .1;  2·.3 + 1·.1 = .7;  2·.3 + 1·.7 = 1.3
    torch.testing.assert_close(targets, VALUES + torch.tensor([[1.3, 0.7, 0.1]]))
    # 2·(.3 + .7), 2·(.3 + .1), .5·.2
    torch.testing.assert_close(advantages, torch.tensor([[2.0, 0.8, 0.1]]))


@pytest.fixture
def rows():
    random = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 7, generator=random, dtype=torch.float64)
    mask = torch.rand(4, 7, generator=random) > 0.2
    bootstrap = torch.randn(4, generator=random, dtype=torch.float64)
    old, sampler = -torch.rand(2, 4, 7, generator=random, dtype=torch.float64)
    return rewards, values, mask, bootstrap, old, sampler


@pytest.mark.parametrize("segmenter", [every_token, response_start, lambda mask: every_n(mask, 2)])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("bounds", [(1.0, 1.0), (5.0, 2.0), (math.inf, math.inf)])
def test_where_the_same_policy_sampled_it_is_gae(rows, segmenter, lam, bounds):
    rewards, values, mask, bootstrap, old, _ = rows
    starts = segmenter(mask)
    ratios = segment_ratios(old, old, starts, mask)
    rho_max, c_max = bounds
    shared = {"gamma": 0.9, "lam": lam, "action_mask": mask}
    advantages, targets = vtrace(
        rewards, values, ratios, starts, bootstrap, rho_max=rho_max, c_max=c_max, **shared
    )
    expected = segment_gae(rewards, values, starts, bootstrap, **shared)
    torch.testing.assert_close(advantages, expected)
    known = starts & mask
    torch.testing.assert_close(targets[known], (expected + values)[known])


def test_a_sampler_that_never_did_what_the_policy_does_teaches_nothing(rows):
    rewards, values, mask, bootstrap, _, _ = rows
    advantages, targets = vtrace(
        rewards, values, torch.zeros_like(rewards), mask, bootstrap, **PLAIN, action_mask=mask
    )
    assert (advantages == 0).all()
    assert torch.equal(targets, values.where(mask, 0.0))


def test_the_ratio_of_a_segment_is_the_product_of_its_tokens_ratios():
    trainer = torch.tensor([[-1.0, -0.5, -9.0, -2.0, -1.0]])
    engine = torch.tensor([[-1.5, -0.25, math.nan, -2.0, -3.0]])
    mask = torch.tensor([[True, True, False, True, True]])
    starts = torch.tensor([[False, True, False, False, True]])
    ratios = segment_ratios(trainer, engine, starts, mask)
    # token 0 belongs to no segment; 1 and 3 to one, tool output at 2 between them
    expected = torch.tensor([[0.0, math.exp(-0.25), 0.0, math.exp(-0.25), math.exp(2.0)]])
    torch.testing.assert_close(ratios, expected)


def test_token_ratios_are_those_of_segments_of_one_token(rows):
    _, _, mask, _, old, sampler = rows
    ratios = segment_ratios(old, sampler, mask, mask)
    torch.testing.assert_close(ratios[mask], (old - sampler).exp()[mask])


def test_a_ratio_beyond_measure_stays_finite():
    ratios = segment_ratios(
        torch.tensor([[0.0]]), torch.tensor([[-200.0]]), EVERY[:, :1], EVERY[:, :1]
    )
    assert ratios.item() == pytest.approx(math.exp(20.0), rel=1e-5)


def test_inserted_tool_output_changes_no_credit(rows):
    rewards, values, _, bootstrap, old, sampler = rows
    every = torch.ones_like(rewards, dtype=torch.bool)
    bounds = {"gamma": 0.9, "lam": 0.8, "rho_max": 2.0, "c_max": 1.0}
    plain = vtrace(
        rewards, values, segment_ratios(old, sampler, every, every), every, bootstrap, **bounds
    )
    kept = torch.tensor([0, 1, 3, 4, 5, 8, 9])

    def widen(x, fill):
        wide = torch.full((4, 10), fill, dtype=x.dtype)
        wide[:, kept] = x
        return wide

    mask = widen(every, False)
    ratios = segment_ratios(widen(old, math.nan), widen(sampler, math.nan), mask, mask)
    found = vtrace(
        widen(rewards, 0.0),
        widen(values, math.nan),
        ratios,
        mask,
        bootstrap,
        **bounds,
        action_mask=mask,
    )
    for ours, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(ours[:, kept], expected)
        assert (ours[~mask] == 0).all()


def test_responses_without_tokens_have_no_credit():
    nothing = torch.zeros(2, 0)
    found = vtrace(nothing, nothing, nothing, nothing.bool(), torch.zeros(2), **PLAIN)
    assert found[0].shape == found[1].shape == (2, 0)
