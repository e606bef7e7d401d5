"""Correction for the gap between sampler and trainer."""

import math

import pytest
import torch

from llmac.core.importance import importance_weights

OLD = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.0, math.nan]])
SAMPLER = torch.tensor([[-1.2, -1.5, -0.5], [-2.0, -1.5, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
# ρ = [[e^.2, e^-.5, 1], [e, e^.5]]; products e^-.3 = .740818 and e^1.5 = 4.481689


@pytest.mark.parametrize(
    ("level", "kind", "low", "high", "expected"),
    [
        ("token", "truncate", None, 100.0, [[1.221403, 0.606531, 1], [2.718282, 1.648721, 0]]),
        ("token", "truncate", None, 2.0, [[1.221403, 0.606531, 1], [2.0, 1.648721, 0]]),
        ("token", "truncate", 0.7, 2.0, [[1.221403, 0.7, 1], [2.0, 1.648721, 0]]),
        ("token", "mask", 0.7, 2.0, [[1.221403, 0, 1], [0, 1.648721, 0]]),
        ("token", "mask", None, 2.0, [[1.221403, 0.606531, 1], [0, 1.648721, 0]]),
        ("sequence", "truncate", None, 2.0, [[0.740818] * 3, [2.0, 2.0, 0]]),
        ("sequence", "mask", None, 3.0, [[0.740818] * 3, [0, 0, 0]]),
        ("sequence", "mask", 0.8, 5.0, [[0] * 3, [4.481689, 4.481689, 0]]),
    ],
)
def test_weights_are_bounded_as_asked(level, kind, low, high, expected):
    weights = importance_weights(OLD, SAMPLER, MASK, level=level, kind=kind, low=low, high=high)
    torch.testing.assert_close(
        weights, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6
    )


def test_equal_policies_weigh_one_and_padding_nothing():
    same = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for level in ("token", "sequence"):
        weights = importance_weights(
            same, same, MASK, level=level, kind="mask", low=0.999, high=1.001
        )
        assert torch.equal(weights, MASK.float())


def test_weights_are_constant():
    old = torch.zeros(2, 3, requires_grad=True)
    weights = importance_weights(
        old, SAMPLER, MASK, level="token", kind="truncate", low=None, high=2.0
    )
    assert not weights.requires_grad


def test_a_token_the_sampler_called_impossible_stays_finite():
    sampler = torch.tensor([[-math.inf, 0.0]])
    weights = importance_weights(
        torch.zeros(1, 2), sampler, torch.tensor([[True, True]]),
        level="sequence", kind="truncate", low=None, high=1e12,
    )  # fmt: skip
    assert weights.isfinite().all()


def test_bounds_in_the_wrong_order_are_named():
    with pytest.raises(ValueError, match=r"low = 3\.0, high = 2\.0"):
        importance_weights(OLD, SAMPLER, MASK, level="token", kind="truncate", low=3.0, high=2.0)


def test_untruncated_token_weights_undo_the_sampler():
    # E_μ[ρ f] = E_π[f], enumerated over three tokens.
    sampler, policy = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
    payoff = torch.tensor([[1.0, -2.0, 5.0]])
    weights = importance_weights(
        policy.log(), sampler.log(), torch.ones(1, 3, dtype=torch.bool),
        level="token", kind="truncate", low=None, high=10.0,
    )  # fmt: skip
    torch.testing.assert_close((sampler * weights * payoff).sum(), (policy * payoff).sum())
