"""VinePPO: PPO by reasoning steps, with values that were sampled."""

import dataclasses

import pytest
import torch

from .making import card, lines, make_rollouts, make_values, moved, segments_of
from .toy_world.world import train


def test_a_step_is_worth_what_it_changed():
    # Steps end with tokens 2 and 5, which are lines; the outcome stands at the end of the third.
    rollouts = make_rollouts(rewards=[1.0], lengths=[7], group=[0])
    algorithm = card("vineppo", whiten_advantages=False)
    starts = algorithm.segments(rollouts, decode=lines)
    assert starts[0].nonzero().flatten().tolist() == [0, 3, 6]
    at = torch.full_like(rollouts.rewards, torch.nan)
    at[0, [0, 3, 6]] = torch.tensor([2 / 9, 5 / 9, 4 / 9], dtype=at.dtype)
    values = dataclasses.replace(make_values(rollouts), at=at, starts=starts)
    credit = algorithm.credit(rollouts, values)
    assert credit.advantages[0].tolist() == pytest.approx([3 / 9] * 3 + [-1 / 9] * 3 + [5 / 9])
    # Targets are outcomes, so that explained variance says how well continuations foresaw them.
    assert credit.critic_targets.returns[0, [0, 3, 6]].tolist() == pytest.approx([1.0] * 3)
    assert torch.equal(credit.critic_targets.value_mask, starts)


def test_a_response_cut_at_the_limit_is_worth_nothing_behind_its_end():
    rollouts = make_rollouts(rewards=[0.0], lengths=[4], group=[0], truncated=[0])
    algorithm = card("vineppo", whiten_advantages=False)
    values = dataclasses.replace(make_values(rollouts), starts=segments_of(algorithm, rollouts))
    advantages = algorithm.credit(rollouts, values).advantages
    assert torch.allclose(advantages[0, 3], -values.at[0, 3])


def test_by_tokens_it_is_ppo_with_lambda_0(rollouts):
    values, logprobs = make_values(rollouts), moved(rollouts)
    vine = card("vineppo", segmenter="every_token")
    ppo = card("ppo", lam=0.0, critic_lam=1.0)
    ours, theirs = (a.credit(rollouts, values) for a in (vine, ppo))
    assert torch.equal(ours.advantages, theirs.advantages)
    assert torch.equal(
        vine.policy_loss(logprobs, rollouts, ours).total,
        ppo.policy_loss(logprobs, rollouts, theirs).total,
    )


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("spo_chain", {"cut_interval": 1, "first_segment": "value", "whiten": "rows"}),
        ("spo_chain", {"cut_interval": 2, "kl_coef": 0.01, "kl_aggregation": "like_policy"}),
    ],
)
def test_segments_learn_the_toy_world(name, fields):
    assert train(card(name, **fields), steps=40, until=0.9)[-1] >= 0.9
