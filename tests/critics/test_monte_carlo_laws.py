"""The values of `monte_carlo` against those of a world where all are known: right on average, noisy as 1/K."""

import functools

import pytest
import torch

from llmac.core.collate import collate
from llmac.core.protocols import SamplingParams
from llmac.core.returns import segment_gae
from llmac.core.segments import every_n, low_probability
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory
from llmac.critics.monte_carlo import MonteCarloConfig
from tests.core.exact_world import ExactWorld, WorldEngine
from tests.critics.making import bench

SYMBOLS, HORIZON, STOP, REPEATS = 3, 3, 0, 200


class OneProcess:
    """Of the ranks, what the critic asks."""

    @staticmethod
    def sum(tensor):
        return tensor


@functools.cache
def world():
    def odd(tokens):
        ended = tokens[-1] == STOP or len(tokens) == HORIZON
        return float(ended and sum(tokens) % 2 == 1)

    return ExactWorld(symbols=SYMBOLS, horizon=HORIZON, reward=odd, stop=STOP, seed=3)


def every_response(world):
    """All possible responses of a world, as rows in the order of `world.responses()`."""
    rows = [
        Trajectory(
            prompt=Prompt(id="p0", token_ids=(9,), source="?"),
            response_ids=tokens,
            action_mask=(True,) * len(tokens),
            sampler_logprobs=(0.0,) * len(tokens),
            finish=Finish.STOP if tokens[-1] == world.stop else Finish.LENGTH,
            group=0,
            reward=world.reward(tokens),
        )
        for tokens in world.responses().tokens
    ]
    batch = collate(rows, length_limit=world.horizon)
    return Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)


def asked_often(world, times, **settings):
    """V at every token of every response, [times, B, T]."""
    engine = WorldEngine(world)
    on_the_table = bench(
        OneProcess(),
        policy="not asked",
        engine=engine,
        score=engine.score,
        sampling=SamplingParams(),
    )
    critic = MonteCarloConfig(**settings).build(on_the_table)
    rollouts, values = every_response(world), []
    for version in range(times):
        engine.policy_version = version
        values.append(critic.values(rollouts, rollouts.action_mask).at)
    return torch.stack(values).double()


@functools.cache
def k_of(number):
    return asked_often(world(), REPEATS, continuations=number)


def each_state_once():
    """Index of the states among the rows' tokens, those that lead to something certain left out."""
    every = world().responses()
    state = torch.where(every.mask, every.decision // SYMBOLS, -1).flatten()
    first = torch.tensor([int((state == s).nonzero()[0]) for s in range(int(state.max()) + 1)])
    chance = every.values.flatten()[first]
    return first[(chance > 1e-9) & (chance < 1 - 1e-9)]


def off(found, truth):
    """Of the mean of independent samples from the truth, in standard errors."""
    error = found.std(dim=0) / len(found) ** 0.5
    return ((found.mean(dim=0) - truth) / error.clamp(min=1e-12)).abs()


@pytest.mark.parametrize("k", [1, 9])
def test_values_are_right_on_average(k):
    states = each_state_once()
    assert len(states) >= 5
    truth = world().responses().values.flatten()[states]
    distances = off(k_of(k).flatten(1)[:, states], truth)
    assert distances.max() < 4


def test_the_noise_of_values_falls_as_one_over_k():
    states = each_state_once()
    truth = world().responses().values.flatten()[states]
    coins = float((truth * (1 - truth)).sum())
    variance = {k: float(k_of(k).flatten(1)[:, states].var(dim=0).sum()) for k in (1, 4, 9)}
    for k, found in variance.items():
        # Known to √(2 / (7 states · 200 samples)) = 4 % at most; three of these.
        assert found * k == pytest.approx(coins, rel=0.12)
    assert variance[1] / variance[9] == pytest.approx(9, rel=0.17)


@pytest.mark.parametrize(("p", "expected"), [(0.5, 0.166667), (0.1, 0.1)])
def test_the_noise_of_a_coin_is_known(p, expected):
    # √(p (1 - p) / 9): √(.25 / 9) = .166667, √(.09 / 9) = .1
    logits = torch.tensor([[1 - p, p]], dtype=torch.float64).log()
    coin = ExactWorld(symbols=2, horizon=1, reward=lambda tokens: float(tokens[-1]), logits=logits)
    assert asked_often(coin, 400, continuations=9)[:, 0, 0].std().item() == pytest.approx(
        expected, rel=0.1
    )


def advantages(values, starts):
    every = world().responses()
    return segment_gae(every.rewards, values, starts, every.bootstrap, gamma=1.0, lam=0.0)


@pytest.mark.parametrize("n", [1, 2])
def test_advantages_of_segments_of_fixed_length_are_unbiased(n):
    every = world().responses()
    starts = every_n(every.mask, n)
    by_decision = torch.stack(
        [world().expected_by_decision(every, advantages(values, starts)) for values in k_of(9)]
    )
    # At the token that begins a segment; at the next, up to a baseline: see tests/core/test_estimator_table.py.
    away = off(by_decision[:, starts], every.advantages[starts])
    assert away.max() < 4
    assert by_decision[:, starts].std(dim=0).max() > 0.05


def test_cuts_at_unlikely_tokens_are_biased_whatever_the_values():
    every = world().responses()
    starts = low_probability(every.logprobs.detach(), every.mask, threshold=0.3)
    found = torch.stack([advantages(values, starts) for values in k_of(9)])
    exact = advantages(every.values, starts)
    # Each segment's advantage is right for the segment ...
    assert off(found[:, every.mask], exact[every.mask]).max() < 4
    # ... but not for the decision: where a segment begins depends on the token there.
    expected = world().expected_by_decision(every, exact)
    assert (expected - every.advantages)[starts].abs().max() > 0.05


def test_advantages_of_reused_continuations_are_unbiased():
    engine = WorldEngine(world())
    on_the_table = bench(
        OneProcess(),
        policy="not asked",
        engine=engine,
        score=engine.score,
        sampling=SamplingParams(),
    )
    critic = MonteCarloConfig(continuations=3, reuse=True).build(on_the_table)
    rollouts = every_response(world())
    starts = torch.zeros_like(rollouts.action_mask)
    starts[:, 0] = True
    found = {action: [] for action in range(SYMBOLS)}
    for version in range(300):
        engine.policy_version = version
        critic.values(rollouts, starts)
        for row in critic.responses():
            found[row.response_ids[0]].append(row.reward - row.value_span[0])
    for action, advantages_there in found.items():
        exact = world().action_value((), action) - world().value(())
        assert off(torch.tensor(advantages_there), torch.tensor(exact)) < 4
