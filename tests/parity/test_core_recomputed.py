"""Every estimator again, from its formula, one number at a time in plain Python.

Ragged batches with tool output in the middle, a single-token and a zero-length response, and groups whose
rewards are all equal. `README.md` lists where we differ from other libraries on purpose.
"""

import math
import statistics

import pytest
import torch

from llmac.core.baselines import group_relative, leave_one_out
from llmac.core.diagnostics import explained_variance, sampler_gap
from llmac.core.importance import importance_weights
from llmac.core.kl import kl_estimate, kl_shaped_rewards
from llmac.core.losses import (
    cispo,
    clipped_surrogate,
    log_ratio,
    reinforce,
    sequence_log_ratio,
    value_clipped,
    value_mse,
)
from llmac.core.masking import aggregate, masked_mean, masked_var, whiten
from llmac.core.returns import place_outcome_rewards, reward_to_go, segment_gae

LENGTHS = [6, 1, 0, 9, 4, 2]
WIDTH = 9
GROUP = [3, 3, 3, 8, 8, 8]


class Ragged:
    """Random per-token lists; padding in the tensors is NaN wherever functions promise not to look."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.mask = [[bool(self.uniform() < 0.75) for _ in range(n)] for n in LENGTHS]
        self.mask[1] = [True]
        self.mask[5] = [True, False]

    def uniform(self):
        return torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def numbers(self, low=-1.0, high=1.0):
        return [[low + (high - low) * self.uniform() for _ in range(n)] for n in LENGTHS]

    @property
    def kept(self):
        """(row, position) of all tokens that count."""
        return [(i, t) for i, row in enumerate(self.mask) for t, keep in enumerate(row) if keep]


def tensor(rows, padding=math.nan):
    return torch.tensor(
        [[*row, *[padding] * (WIDTH - len(row))] for row in rows],
        dtype=torch.bool if padding is False else torch.float64,
    )


def assert_same(ours, theirs, kept):
    """`ours[i, t]` equals `theirs[i][t]` at every token that counts."""
    assert ours.dtype == torch.float64
    for i, t in kept:
        assert ours[i, t].item() == pytest.approx(theirs[i][t], rel=1e-12, abs=1e-12), (i, t)


@pytest.fixture(params=range(4))
def ragged(request):
    return Ragged(request.param)


def gae_of_row(rewards, values, mask, bootstrap, gamma, lam):
    """Collect the decisions first, then apply the definition: a sum over later TD errors."""
    actions = [t for t, keep in enumerate(mask) if keep]
    if not actions:
        return [0.0] * len(mask)
    bounds = [*actions[1:], len(mask)]
    paid = [sum(rewards[a:b]) for a, b in zip(actions, bounds, strict=True)]
    known = [values[t] for t in actions] + [bootstrap]
    errors = [paid[k] + gamma * known[k + 1] - known[k] for k in range(len(actions))]
    out = [0.0] * len(mask)
    for k, t in enumerate(actions):
        out[t] = sum((gamma * lam) ** (j - k) * errors[j] for j in range(k, len(actions)))
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0)])
@pytest.mark.parametrize("truncated", [False, True])
def test_gae(ragged, gamma, lam, truncated):
    rewards, values = ragged.numbers(), ragged.numbers()
    bootstrap = [0.1 * i if truncated else 0.0 for i in range(len(LENGTHS))]
    mask = tensor(ragged.mask, padding=False)
    ours = segment_gae(
        tensor(rewards, 0.0), tensor(values), mask, torch.tensor(bootstrap, dtype=torch.float64),
        gamma=gamma, lam=lam, action_mask=mask,
    )  # fmt: skip
    theirs = [
        gae_of_row(*row, gamma, lam)
        for row in zip(rewards, values, ragged.mask, bootstrap, strict=True)
    ]
    assert_same(ours, theirs, ragged.kept)
    assert (ours[~mask] == 0).all()


def test_gae_in_single_precision(ragged):
    rewards, values = tensor(ragged.numbers(), 0.0), tensor(ragged.numbers())
    mask, bootstrap = tensor(ragged.mask, padding=False), torch.ones(6, dtype=torch.float64)
    double = segment_gae(rewards, values, mask, bootstrap, gamma=0.99, lam=0.95, action_mask=mask)
    single = segment_gae(
        rewards.float(), values.float(), mask, bootstrap.float(),
        gamma=0.99, lam=0.95, action_mask=mask,
    )  # fmt: skip
    torch.testing.assert_close(single, double.float(), rtol=0, atol=2e-6)


def test_reward_to_go(ragged):
    rewards = ragged.numbers()
    theirs = [
        [sum(0.9 ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]
        for row in rewards
    ]
    everywhere = [(i, t) for i, row in enumerate(rewards) for t in range(len(row))]
    assert_same(reward_to_go(tensor(rewards, 0.0), gamma=0.9), theirs, everywhere)


def test_outcome_rewards(ragged):
    outcomes = [1.0, 0.1, 5.0, -2.0, 0.0, 3.0]
    placed = place_outcome_rewards(
        torch.tensor(outcomes, dtype=torch.float64), tensor(ragged.mask, padding=False)
    )
    theirs = torch.zeros(6, WIDTH, dtype=torch.float64)
    for i, row in enumerate(ragged.mask):
        if any(row):
            theirs[i, max(t for t, keep in enumerate(row) if keep)] = outcomes[i]
    assert torch.equal(placed, theirs)


@pytest.mark.parametrize(
    "rewards", [[1.0, 0.0, 0.5, 0.2, 0.9, 0.9], [0.1] * 6, [0.1] * 3 + [1.0, 0.0, 0.0]]
)
def test_group_advantages(rewards):
    ours = torch.tensor(rewards, dtype=torch.float64), torch.tensor(GROUP)
    for i, reward in enumerate(rewards):
        siblings = [r for r, g in zip(rewards, GROUP, strict=True) if g == GROUP[i]]
        others = [r for j, r in enumerate(rewards) if GROUP[j] == GROUP[i] and j != i]
        centred = reward - statistics.fmean(siblings) if len(set(siblings)) > 1 else 0.0
        expected = {
            "none": centred,
            "group": centred / (statistics.stdev(siblings) + 1e-6),
            "batch": centred / (statistics.stdev(rewards) + 1e-6),
        }
        for scale, advantage in expected.items():
            assert group_relative(*ours, scale=scale)[i].item() == pytest.approx(
                advantage, rel=1e-9, abs=1e-14
            )
        assert leave_one_out(*ours)[i].item() == pytest.approx(
            reward - statistics.fmean(others), abs=1e-14
        )


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_whitening(ragged, unbiased, center):
    x = ragged.numbers(-3.0, 7.0)
    counted = [x[i][t] for i, t in ragged.kept]
    mean = statistics.fmean(counted)
    variance = statistics.variance(counted) if unbiased else statistics.pvariance(counted)
    mask = tensor(ragged.mask, padding=False)
    assert masked_mean(tensor(x), mask).item() == pytest.approx(mean)
    assert masked_var(tensor(x), mask, unbiased=unbiased).item() == pytest.approx(variance)
    theirs = [
        [(v - mean) / math.sqrt(variance + 1e-8) + (0 if center else mean) for v in row]
        for row in x
    ]
    ours = whiten(tensor(x), mask, unbiased=unbiased, center=center)
    assert_same(ours, theirs, ragged.kept)


@pytest.mark.parametrize("clip_high", [0.2, 0.28])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_clipped_surrogate(ragged, clip_high, dual_clip):
    now, old, advantages = ragged.numbers(-4.0, 0.0), ragged.numbers(-2.0, 0.0), ragged.numbers()

    def one(logprob, old_logprob, advantage):
        ratio = math.exp(logprob - old_logprob)
        gain = min(ratio * advantage, min(max(ratio, 0.8), 1 + clip_high) * advantage)
        if dual_clip is not None and advantage < 0:
            gain = max(gain, dual_clip * advantage)
        flat = (advantage > 0 and ratio > 1 + clip_high) or (advantage < 0 and ratio < 0.8)
        return -gain, flat

    theirs = [
        [one(*x) for x in zip(*rows, strict=True)]
        for rows in zip(now, old, advantages, strict=True)
    ]
    loss, clipped = clipped_surrogate(
        log_ratio(tensor(now), tensor(old)), tensor(advantages),
        clip_low=0.2, clip_high=clip_high, dual_clip=dual_clip,
    )  # fmt: skip
    assert_same(loss, [[loss for loss, _ in row] for row in theirs], ragged.kept)
    assert [clipped[i, t].item() for i, t in ragged.kept] == [
        theirs[i][t][1] for i, t in ragged.kept
    ]


def test_sequence_ratio_and_cispo_and_reinforce(ragged):
    now, old, advantages = ragged.numbers(-4.0, 0.0), ragged.numbers(-2.0, 0.0), ragged.numbers()
    ratios, capped, plain = [], [], []
    for i, row in enumerate(ragged.mask):
        kept = [now[i][t] - old[i][t] for t, keep in enumerate(row) if keep]
        ratios.append([statistics.fmean(kept) if kept else 0.0] * len(row))
        capped.append(
            [
                -min(max(math.exp(a - b), 0.5), 1.5) * c * a
                for a, b, c in zip(now[i], old[i], advantages[i], strict=True)
            ]
        )
        plain.append([-c * a for a, c in zip(now[i], advantages[i], strict=True)])
    mask = tensor(ragged.mask, padding=False)
    assert_same(sequence_log_ratio(tensor(now), tensor(old), mask), ratios, ragged.kept)
    ratio = log_ratio(tensor(now), tensor(old))
    ours = cispo(tensor(now), ratio, tensor(advantages), cap_low=0.5, cap_high=1.5)
    assert_same(ours, capped, ragged.kept)
    assert_same(reinforce(tensor(now), tensor(advantages)), plain, ragged.kept)


def test_value_losses(ragged):
    values, old, returns = ragged.numbers(), ragged.numbers(), ragged.numbers()
    clipped = [
        [
            max((v - g) ** 2, (min(max(v, o - 0.3), o + 0.3) - g) ** 2) / 2
            for v, o, g in zip(*rows, strict=True)
        ]
        for rows in zip(values, old, returns, strict=True)
    ]
    squared = [
        [(v - g) ** 2 / 2 for v, g in zip(*rows, strict=True)]
        for rows in zip(values, returns, strict=True)
    ]
    assert_same(
        value_clipped(tensor(values), tensor(old), tensor(returns), clip=0.3), clipped, ragged.kept
    )
    assert_same(value_mse(tensor(values), tensor(returns)), squared, ragged.kept)


KL = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
    "k3+": lambda d: math.exp(-d) - 1 + d,
}


@pytest.mark.parametrize("kind", KL)
def test_kl_estimates_and_shaped_rewards(ragged, kind):
    policy, reference, rewards = ragged.numbers(), ragged.numbers(), ragged.numbers()
    theirs = [
        [KL[kind](p - r) for p, r in zip(*rows, strict=True)]
        for rows in zip(policy, reference, strict=True)
    ]
    assert_same(kl_estimate(tensor(policy), tensor(reference), kind), theirs, ragged.kept)
    mask = tensor(ragged.mask, padding=False)
    shaped = kl_shaped_rewards(
        tensor(rewards, 0.0), tensor(policy), tensor(reference), mask, coef=0.05, kind=kind
    )
    for i, row in enumerate(rewards):
        for t, reward in enumerate(row):
            price = 0.05 * theirs[i][t] if ragged.mask[i][t] else 0.0
            assert shaped[i, t].item() == pytest.approx(reward - price, abs=1e-12)
    assert shaped.isfinite().all()


@pytest.mark.parametrize(
    "how",
    [
        "token_mean",
        "sequence_mean_token_mean",
        "sequence_mean_token_sum",
        "sequence_mean_token_sum_norm",
    ],
)
def test_aggregations_and_their_gradients(ragged, how):
    loss, horizon = ragged.numbers(), 32
    rows = [[t for t, keep in enumerate(row) if keep] for row in ragged.mask]
    responses, tokens = sum(bool(row) for row in rows), sum(map(len, rows))

    def weight_of(row):
        return {
            "token_mean": lambda: 1 / tokens,
            "sequence_mean_token_mean": lambda: 1 / len(row) / responses,
            "sequence_mean_token_sum": lambda: 1 / responses,
            "sequence_mean_token_sum_norm": lambda: 1 / responses / horizon,
        }[how]()

    expected = sum(weight_of(row) * loss[i][t] for i, row in enumerate(rows) for t in row)
    ours = tensor(loss).requires_grad_()
    total, weight = aggregate(ours, tensor(ragged.mask, padding=False), how, horizon=horizon)
    assert (total / weight).item() == pytest.approx(expected, rel=1e-12)
    (total / weight).backward()
    for i, row in enumerate(rows):
        for t in range(WIDTH):
            share = weight_of(row) if t in row else 0.0
            assert ours.grad[i, t].item() == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("low", [None, 0.6])
def test_importance_weights(ragged, level, kind, low):
    old, sampler = ragged.numbers(), ragged.numbers()
    ours = importance_weights(
        tensor(old), tensor(sampler), tensor(ragged.mask, padding=False),
        level=level, kind=kind, low=low, high=1.4,
    )  # fmt: skip
    for i, row in enumerate(ragged.mask):
        gaps = [old[i][t] - sampler[i][t] for t in range(len(row))]
        whole = sum(gap for gap, keep in zip(gaps, row, strict=True) if keep)
        for t, keep in enumerate(row):
            ratio = math.exp(gaps[t] if level == "token" else whole)
            inside = (low or 0.0) <= ratio <= 1.4
            bounded = min(max(ratio, low or 0.0), 1.4) if kind == "truncate" else ratio * inside
            assert ours[i, t].item() == pytest.approx(bounded if keep else 0.0, abs=1e-12)
        assert (ours[i, len(row) :] == 0).all()


def test_explained_variance_and_sampler_gap(ragged):
    values, returns = ragged.numbers(), ragged.numbers()
    mask = tensor(ragged.mask, padding=False)
    residuals = [returns[i][t] - values[i][t] for i, t in ragged.kept]
    spread = statistics.pvariance([returns[i][t] for i, t in ragged.kept])
    ours = explained_variance(tensor(values), tensor(returns), mask)
    assert ours.item() == pytest.approx(1 - statistics.pvariance(residuals) / spread)

    gap = sampler_gap(tensor(values), tensor(returns), mask)
    differences = [values[i][t] - returns[i][t] for i, t in ragged.kept]
    expected = {
        "actor/sampler_kl": statistics.fmean(math.exp(d) - 1 - d for d in differences),
        "actor/sampler_logprob_diff_mean": statistics.fmean(map(abs, differences)),
        "actor/sampler_logprob_diff_max": max(map(abs, differences)),
        "actor/sampler_ratio_mean": statistics.fmean(map(math.exp, differences)),
    }
    assert {name: measure.value for name, measure in gap.items()} == pytest.approx(expected)
