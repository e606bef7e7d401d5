"""A2C is PPO with one epoch of one minibatch and no clip."""

import math

import pytest
import torch

from .making import card, known, make_values, moved

FIELDS = {"lam": 0.9, "critic_lam": 1.0, "gamma": 0.95, "kl_coef": 0.1}


def gradient_of(algorithm, rollouts, logprobs):
    credit = algorithm.credit(rollouts, make_values(rollouts))
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    return torch.autograd.grad(loss.total / loss.weight, logprobs)[0]


@pytest.mark.parametrize("clip", [0.2, math.inf])
@pytest.mark.parametrize("white", [False, True])
def test_in_the_first_step_a2c_has_ppos_gradient(clip, white, rollouts):
    fresh = rollouts.old_logprobs.clone().requires_grad_()
    a2c = card("a2c", whiten_advantages=white, **FIELDS)
    ppo = card("ppo", whiten_advantages=white, clip_low=clip, clip_high=clip, **FIELDS)
    assert torch.allclose(gradient_of(a2c, rollouts, fresh), gradient_of(ppo, rollouts, fresh))


def test_once_the_policy_has_moved_they_part(rollouts):
    later = moved(rollouts)
    a2c, ppo = card("a2c", **FIELDS), card("ppo", whiten_advantages=False, **FIELDS)
    assert not torch.allclose(
        gradient_of(a2c, rollouts, later), gradient_of(ppo, rollouts, later), rtol=0.1
    )


def test_a_whole_update_of_a2c_is_ppos_with_one_epoch_one_minibatch_and_no_clip(rollouts):
    policies = []
    for algorithm in (
        card("a2c", **FIELDS),
        card("ppo", whiten_advantages=False, clip_low=math.inf, clip_high=math.inf, **FIELDS),
    ):
        weights = rollouts.old_logprobs.clone().requires_grad_()
        optimizer = torch.optim.AdamW([weights], lr=0.1)
        weights.grad = gradient_of(algorithm, rollouts, weights)
        optimizer.step()
        policies.append(weights.detach())
    assert torch.allclose(*policies)
    assert not torch.allclose(policies[0], rollouts.old_logprobs)


def test_the_gradient_of_a_log_probability_is_minus_its_advantage():
    rollouts = known(old=[[-1.0, -1.0]], rewards=[1.0])
    values = make_values(rollouts)
    algorithm = card("a2c")
    credit = algorithm.credit(rollouts, values)
    logprobs = moved(rollouts, spread=2.0)
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    # λ = γ = 1: the advantage is 1 - V, however far the policy has moved
    assert torch.allclose(gradient, values.at - 1.0)
    assert loss.metrics["actor/pg_loss"].weight == 2
