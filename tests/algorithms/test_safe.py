"""SAFE: a gate on the KL that has the gradient it claims, and PPO below it."""

import dataclasses
import io
import math

import pytest
import torch

from llmac.algorithms.safe import SAFE, SafeMemory
from llmac.core.controllers import ThresholdState, entropy_gate, plain_gate
from llmac.core.ensembles import soft_min
from llmac.core.segments import response_start
from llmac.core.types import Values
from llmac.core.value_losses import either, huber, near

from .making import card, known, make_values, moved, ragged

ACTIONS = torch.tensor([0, 0, 1, 2])
"""Four responses of one token that stand for π = (1/2, 1/4, 1/4) exactly."""
POLICY = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
REFERENCE = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()


def bandit(rewards=(1.0, 0.0, 0.0, 1.0)):
    """Means over its rows are expectations under π: the KL and the entropy are exact."""
    return known(
        old=[[x] for x in POLICY[ACTIONS].tolist()],
        ref=[[x] for x in REFERENCE[ACTIONS].tolist()],
        rewards=list(rewards),
    )


def nothing_expected(rollouts, at=0.0):
    return Values(
        at=torch.full_like(rollouts.rewards, at),
        starts=response_start(rollouts.action_mask),
        bootstrap=torch.zeros_like(rollouts.rewards[:, 0]),
    )


def far_gone(kl=0.8):
    return SafeMemory(threshold=ThresholdState(kl=kl))


def kl_of(logits):
    logprobs = logits.log_softmax(-1)
    return (logprobs.exp() * (logprobs - REFERENCE)).sum()


def gradients(algorithm, memory):
    """Of the mean loss by the logits: with the gate, and without it."""
    rollouts = bandit()
    credit = algorithm.credit(rollouts, nothing_expected(rollouts), memory=memory)
    found = []
    for given in (credit, dataclasses.replace(credit, kl_weight=None)):
        logits = POLICY.clone().requires_grad_()
        logprobs = logits.log_softmax(-1)[ACTIONS][:, None]
        loss = algorithm.policy_loss(logprobs, rollouts, given)
        found.append(torch.autograd.grad(loss.total / loss.weight, logits)[0])
    return found


def by_finite_differences(penalty_of_kl):
    h, slopes = 1e-6, []
    for i in range(3):
        up, down = POLICY.clone(), POLICY.clone()
        up[i] += h
        down[i] -= h
        slopes.append((penalty_of_kl(kl_of(up)) - penalty_of_kl(kl_of(down))) / (2 * h))
    return torch.tensor(slopes, dtype=torch.float64)


@pytest.mark.parametrize("coef", [0.1, 5.0])
def test_the_gate_has_the_gradient_of_its_penalty(coef):
    algorithm = card("safe", entropy_coef=0.0, gate_coef=coef)
    gated, free = gradients(algorithm, far_gone())
    entropy = -(POLICY.exp() * POLICY).sum().item()

    def penalty(kl):
        smoothed = 0.9 * 0.8 + 0.1 * kl.item()
        return entropy_gate(smoothed, threshold=0.45, entropy=entropy, coef=coef).penalty

    expected = by_finite_differences(penalty)
    assert expected.abs().max() > 1e-4
    assert torch.allclose(gated - free, expected, atol=1e-8)


def test_the_asymmetric_gate_has_the_gradient_of_its_penalty():
    algorithm = card("safe", entropy_coef=0.0, gate="asymmetric", gate_threshold=0.1)
    gated, free = gradients(algorithm, far_gone())
    expected = by_finite_differences(lambda kl: plain_gate(kl.item(), threshold=0.1).penalty)
    assert expected.abs().max() > 1e-3
    assert torch.allclose(gated - free, expected, atol=1e-8)


def test_a_step_along_the_gate_lowers_the_kl():
    gated, free = gradients(card("safe", entropy_coef=0.0), far_gone())
    push = free - gated  # what descent adds on account of the gate
    assert kl_of(POLICY + 10 * push) < kl_of(POLICY)
    assert kl_of(POLICY - 10 * push) > kl_of(POLICY)


def test_a_closed_gate_has_no_gradient():
    gated, free = gradients(card("safe", entropy_coef=0.0), SafeMemory())
    assert torch.equal(gated, free)


def test_below_the_threshold_safe_is_ppo_with_the_same_advantages(rollouts):
    values = make_values(rollouts)
    safe = card("safe", values_at="every_token", entropy_coef=0.0)
    ppo = card("ppo", lam=1.0, gamma=1.0)
    ours, theirs = safe.credit(rollouts, values), ppo.credit(rollouts, values)
    assert ours.kl_weight is None
    assert torch.allclose(ours.advantages, theirs.advantages)
    assert torch.allclose(ours.critic_targets.returns, theirs.critic_targets.returns)
    logprobs = moved(rollouts)
    losses = [a.policy_loss(logprobs, rollouts, theirs).total for a in (safe, ppo)]
    found, expected = (torch.autograd.grad(total, logprobs)[0] for total in losses)
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_a_gate_keeps_a_policy_near_its_reference():
    def final_kl(**fields):
        algorithm = card("safe", entropy_coef=0.0, advantage_scale="none", **fields)
        random = torch.Generator().manual_seed(0)
        logits = REFERENCE.clone().requires_grad_()
        optimizer, memory = torch.optim.SGD([logits], lr=0.5), algorithm.memory()
        for _ in range(60):
            now = logits.detach().log_softmax(-1)
            actions = now.exp().multinomial(64, replacement=True, generator=random)
            rollouts = known(
                old=[[x] for x in now[actions].tolist()],
                ref=[[x] for x in REFERENCE[actions].tolist()],
                rewards=(actions == 0).double().tolist(),
            )
            credit = algorithm.credit(rollouts, nothing_expected(rollouts, 0.5), memory=memory)
            logprobs = logits.log_softmax(-1)[actions][:, None]
            loss = algorithm.policy_loss(logprobs, rollouts, credit)
            optimizer.zero_grad()
            (loss.total / loss.weight).backward()
            optimizer.step()
        return kl_of(logits.detach()).item()

    free, gated = final_kl(gate_threshold=100.0, gate_bounds=(0.1, 100.0)), final_kl(gate_coef=30.0)
    assert free > 1.5
    assert gated < 0.8


def test_advantages_are_whitened_over_responses_however_long_they_are():
    rollouts = known(old=[[-1.0], [-1.0] * 3, [-1.0] * 2, [-1.0]], rewards=[1.0, 0.6, 0.0, 0.5])
    values = nothing_expected(rollouts)
    # R - V = .7, .1, -.4, .2: mean .15, deviation √(.61 / 3) = .450925
    at = torch.tensor([0.3, 0.5, 0.4, 0.3], dtype=torch.float64)
    values = dataclasses.replace(values, at=at[:, None].expand_as(rollouts.rewards))
    credit = card("safe").credit(rollouts, values)
    expected = torch.tensor([1.219715, -0.110883, -1.219715, 0.110883], dtype=torch.float64)
    expected = expected[:, None] * rollouts.action_mask
    assert torch.allclose(credit.advantages, expected, atol=1e-6)
    assert torch.equal(credit.critic_targets.value_mask, values.starts)
    assert credit.critic_targets.returns[:, 0].tolist() == pytest.approx([1.0, 0.6, 0.0, 0.5])


def test_running_scale_is_the_deviation_of_all_rewards_of_the_run():
    rollouts = known(old=[[-1.0]] * 3, rewards=[1.0, 2.0, 3.0])
    memory = SafeMemory()
    algorithm = card("safe", advantage_scale="running")
    credit = algorithm.credit(rollouts, nothing_expected(rollouts, 1.999933), memory=memory)
    assert memory.rewards.mean == pytest.approx(1.999933, abs=1e-6)
    assert memory.rewards.variance == pytest.approx(1.000133, abs=1e-6)
    found = credit.advantages.squeeze(1).tolist()
    assert found == pytest.approx([-0.999867, 0.000067, 1.0], abs=1e-5)
    again = algorithm.credit(rollouts, nothing_expected(rollouts, 1.999933), memory=memory)
    assert memory.rewards.count == pytest.approx(6.0001)
    assert again.advantages[2].item() > credit.advantages[2].item()  # variance is .8 of six


def test_the_soft_minimum_of_two_heads_is_near_the_smaller():
    heads = torch.tensor([[1.0, 1.0], [1.0, 0.0], [2.0, -1.0], [0.5, 0.4]], requires_grad=True)
    values = soft_min(heads, temperature=0.3)
    assert values.tolist() == pytest.approx([1.0, 0.197428, -0.792069, 0.445852], abs=1e-6)
    (weights,) = torch.autograd.grad(values[1], heads)
    assert weights[1].tolist() == pytest.approx([1 - 0.965555, 0.965555], abs=1e-6)
    above = values - heads.amin(-1)
    assert (above >= 0).all()
    assert above.max().item() <= 0.3 * math.log(2) == pytest.approx(0.207944, abs=1e-6)


def test_the_value_loss_is_the_average_of_both_huber_losses():
    assert huber(torch.tensor([0.3, 1.0]), delta=0.5).tolist() == pytest.approx([0.045, 0.375])
    value, old = torch.tensor([0.9]), torch.tensor([0.5])
    clipped = near(value, old, clip=0.2)
    losses = [huber(x, delta=0.5) for x in (value, clipped)]
    # huber(.9) = .5 * (.9 - .25) = .325; huber(.7) = .5 * (.7 - .25) = .225
    assert either(*losses, how="mean").item() == pytest.approx(0.275)


def test_the_value_is_asked_before_the_response_unless_wanted_everywhere(rollouts):
    assert torch.equal(card("safe").segments(rollouts), response_start(rollouts.action_mask))
    everywhere = card("safe", values_at="every_token").segments(rollouts)
    assert torch.equal(everywhere, rollouts.action_mask)


def test_a_restored_memory_continues_bitwise():
    algorithm = card("safe", phase_window=2, gate_threshold=0.05, gate_bounds=(0.01, 0.6))
    rollouts = ragged()
    values = make_values(rollouts)
    memory = algorithm.memory()
    for _ in range(5):
        algorithm.credit(rollouts, values, memory=memory)
    file = io.BytesIO()
    torch.save(memory.state(), file)
    file.seek(0)
    restored = algorithm.memory()
    restored.restore(torch.load(file, weights_only=True))
    assert restored == memory
    assert restored != algorithm.memory()
    went_on, resumed = (algorithm.credit(rollouts, values, memory=m) for m in (memory, restored))
    assert went_on.kl_weight is not None
    assert torch.equal(went_on.kl_weight, resumed.kl_weight)
    assert restored == memory


def test_the_memory_moves_once_a_step():
    memory, rollouts = SafeMemory(), bandit()
    kl = kl_of(POLICY).item()
    for step in range(1, 4):
        credit = card("safe").credit(rollouts, nothing_expected(rollouts), memory=memory)
        assert memory.threshold.kl == pytest.approx(kl * (1 - 0.9**step))
        assert len(memory.threshold.rewards) == step
        assert credit.metrics["actor/gate_kl"].value == memory.threshold.kl
        assert credit.metrics["actor/gate_threshold"].value == pytest.approx(0.45, abs=0.01)
    assert credit.metrics["actor/ref_kl"].value == pytest.approx(kl)


def test_the_gate_opens_when_the_kl_stays_high():
    memory, rollouts, algorithm = SafeMemory(), bandit(), card("safe", phase_window=3)
    weights = [
        algorithm.credit(rollouts, nothing_expected(rollouts), memory=memory)
        .metrics["actor/gate_weight"]
        .value
        for _ in range(30)
    ]
    opened = next(step for step, weight in enumerate(weights) if weight > 0)
    assert 0 < opened < 10
    assert weights[opened:] == sorted(weights[opened:])


def test_two_equal_ranks_remember_what_one_does():
    alone, one_of_two, rollouts = SafeMemory(), SafeMemory(), bandit()
    algorithm, values = card("safe"), nothing_expected(bandit())
    for _ in range(3):
        algorithm.credit(rollouts, values, memory=alone)
        algorithm.credit(rollouts, values, memory=one_of_two, sum_across=lambda x: 2 * x)
    assert one_of_two.threshold == alone.threshold
    assert one_of_two.rewards.mean == pytest.approx(alone.rewards.mean, abs=1e-4)


def test_without_values_or_a_reference_safe_says_what_is_missing():
    rollouts = bandit()
    with pytest.raises(ValueError, match="SAFE needs the values of a critic and got none"):
        SAFE().credit(rollouts, None)
    blind = dataclasses.replace(rollouts, ref_logprobs=None)
    with pytest.raises(ValueError, match="SAFE measures the KL to a reference"):
        SAFE().credit(blind, nothing_expected(blind))
