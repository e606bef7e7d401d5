"""Direct Advantage Policy Optimization: a regression whose numbers and minimisers are known."""

import dataclasses
import math

import pytest
import torch

from llmac.algorithms.dapo_step import after_tokens
from llmac.core.collate import collate
from llmac.core.plans import Flat
from llmac.core.protocols import SamplingParams
from llmac.core.stored import Stored
from llmac.core.types import Values
from llmac.core.value_losses import binary_cross_entropy

from .making import card, known, make_rollouts, make_values, moved, padded
from .toy_world.world import LIMIT, Prompts, TableCritic, TableEngine, score, train


def said(rollouts, rows):
    """A critic that says these values, one a token."""
    return Values(
        at=padded(rows),
        starts=rollouts.action_mask,
        bootstrap=torch.zeros_like(rollouts.rewards[:, 0]),
    )


def with_tokens(rollouts, rows):
    """The same rows with other token ids."""
    trajectories = tuple(
        dataclasses.replace(t, response_ids=tuple(ids))
        for t, ids in zip(rollouts.trajectories, rows, strict=True)
    )
    ids = padded(rows).long()
    return dataclasses.replace(rollouts, trajectories=trajectories, response_ids=ids)


@pytest.mark.parametrize(("beta", "loss", "slope"), [(1.0, 0.005, -0.1), (0.5, 0.08, -0.4)])
def test_half_the_squared_distance_of_log_ratio_and_advantage_over_beta(beta, loss, slope):
    rollouts = known(old=[[-1.0]], ref=[[-1.5]], rewards=[1.0])
    algorithm = card("dapo_step", beta=beta)
    credit = algorithm.credit(rollouts, said(rollouts, [[0.7]]))
    logprobs = torch.tensor([[-1.3]], dtype=torch.float64, requires_grad=True)
    found = algorithm.policy_loss(logprobs, rollouts, credit)
    assert found.total.item() == pytest.approx(loss)
    (gradient,) = torch.autograd.grad(found.total, logprobs)
    assert gradient.item() == pytest.approx(slope)


def two_actions(x, **fields):
    """One response for each of two actions, π_ref = (½, ½), A/β = ±x: mean loss at π(1) = p."""
    algorithm = card("dapo_step", **fields)
    half = [[math.log(0.5)]] * 2
    rollouts = with_tokens(known(old=half, ref=half, rewards=[0.5, 0.5]), [[1], [2]])
    values = said(rollouts, [[0.5 - algorithm.beta * x], [0.5 + algorithm.beta * x]])
    credit = algorithm.credit(rollouts, values)

    def loss(p):
        logprobs = torch.stack([p, 1 - p]).log()[:, None]
        found = algorithm.policy_loss(logprobs, rollouts, credit)
        return found.total / found.weight

    return loss


def minimiser(loss):
    low, high = 0.01, 0.99
    for _ in range(60):
        p = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(p), p)
        low, high = (p.item(), high) if slope < 0 else (low, p.item())
    return p.detach()


@pytest.mark.parametrize(
    ("x", "best", "tilt", "loss_at_best", "loss_at_tilt"),
    [
        (0.1, 0.549591, 0.549834, None, None),
        (0.5, 0.713759, 0.731059, 0.006023, 0.007214),
        (2.0, 0.938176, 0.982014, 0.471724, 0.877816),
    ],
)
def test_the_minimiser_is_a_compromise(x, best, tilt, loss_at_best, loss_at_tilt):
    loss = two_actions(x)
    found = minimiser(loss)
    assert found.item() == pytest.approx(best, abs=1e-6)
    exponential = torch.sigmoid(torch.tensor(2 * x, dtype=torch.float64))
    assert exponential.item() == pytest.approx(tilt, abs=1e-6)
    assert loss(found) < loss(exponential)
    if loss_at_best is not None:
        assert loss(found).item() == pytest.approx(loss_at_best, abs=1e-6)
        assert loss(exponential).item() == pytest.approx(loss_at_tilt, abs=1e-6)


def test_with_the_normaliser_the_minimiser_is_the_exponential_tilt():
    loss = two_actions(0.5, normalize=True)
    found = minimiser(loss)
    assert found.item() == pytest.approx(0.731059, abs=1e-6)
    assert loss(found).item() == pytest.approx(0.0, abs=1e-12)


def test_the_advantage_of_a_step_is_the_change_of_value():
    rollouts = known(old=[[-1.0] * 3], rewards=[1.0])
    values = said(rollouts, [[0.5, 0.75, 0.25]])
    credit = card("dapo_step", step_tokens=1).credit(rollouts, values)
    assert credit.advantages[0].tolist() == pytest.approx([0.25, -0.5, 0.75])
    assert credit.advantages.sum().item() == pytest.approx(1 - 0.5)


def test_a_critic_fitted_to_chances_is_best_at_the_chance():
    def loss(value):
        logit = torch.tensor(value, dtype=torch.float64).logit()
        return binary_cross_entropy(logit, torch.tensor(5 / 8, dtype=torch.float64)).item()

    assert loss(0.6) == pytest.approx(0.662875, abs=1e-6)
    assert loss(0.625) == pytest.approx(0.661563, abs=1e-6)
    assert loss(0.625) < min(loss(0.62), loss(0.63))


def test_steps_of_several_tokens_add_their_log_ratios():
    rollouts = known(old=[[-1.0] * 5, [-1.0] * 2], rewards=[1.0, 0.0])
    values = said(rollouts, [[0.5, 9.0, 0.7, 9.0, 0.2], [0.4, 9.0]])
    algorithm = card("dapo_step", beta=1.0, step_tokens=2)
    credit = algorithm.credit(rollouts, values)
    expected = [[0.2, 0.2, -0.5, -0.5, 0.8], [-0.4, -0.4, 0.0, 0.0, 0.0]]
    assert torch.allclose(credit.advantages, padded(expected))
    logprobs = padded([[-0.9, -1.1, -0.8, -0.9, -1.2], [-1.3, -1.2]]).requires_grad_()
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    # log-ratios of the steps: 0, .3, -.2 | -.5; distances: -.2, .8, -1 | -.1
    assert loss.total.item() == pytest.approx(0.5 * (0.04 + 0.64 + 1.0 + 0.01))
    assert loss.weight.item() == 4
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    distances = [[-0.2, -0.2, 0.8, 0.8, -1.0], [-0.1, -0.1, 0.0, 0.0, 0.0]]
    assert torch.allclose(gradient, padded(distances))


@pytest.mark.parametrize(
    ("aggregation", "weight", "total"),
    [
        ("token_mean", 4, 0.5 * (0.04 + 0.04 + 0.16 + 0.16)),
        ("sequence_mean_token_mean", 2, 0.5 * ((0.04 + 0.04 + 0.16) / 3 + 0.16)),
        ("sequence_mean_token_sum", 2, 0.5 * (0.04 + 0.04 + 0.16 + 0.16)),
    ],
)
def test_aggregation_counts_steps(aggregation, weight, total):
    rollouts = known(old=[[-1.0] * 5, [-1.0] * 2], rewards=[1.0, 0.0])
    algorithm = card("dapo_step", beta=1.0, step_tokens=2, aggregation=aggregation)
    credit = dataclasses.replace(
        algorithm.credit(rollouts, make_values(rollouts)),
        advantages=padded([[0.2, 0.2, 0.2, 0.2, -0.4], [-0.4, -0.4]]),
    )
    loss = algorithm.policy_loss(rollouts.ref_logprobs, rollouts, credit)
    assert loss.weight.item() == algorithm.loss_weight(rollouts, credit).item() == weight
    assert loss.total.item() == pytest.approx(total)


def test_injected_tokens_belong_to_no_step():
    rollouts = known(old=[[-1.0, 0.0, -1.0, -1.0]], rewards=[1.0], injected=[(0, 1)])
    algorithm = card("dapo_step", beta=1.0, step_tokens=2)
    credit = algorithm.credit(rollouts, said(rollouts, [[0.5, 7.0, 7.0, 0.25]]))
    assert credit.advantages[0].tolist() == pytest.approx([-0.25, 0.0, -0.25, 0.75])
    logprobs = torch.tensor([[-0.9, torch.nan, -0.8, -1.0]], dtype=torch.float64)
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    assert loss.total.item() == pytest.approx(0.5 * ((0.3 + 0.25) ** 2 + 0.75**2))


def test_a_step_ends_after_one_of_its_tokens():
    ids = torch.tensor([[9, 5, 9, 9, 5, 8, 5], [5, 9, 9, 5, 0, 0, 0]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 2] = False  # a tool's 9
    mask[1, 4:] = False
    starts = after_tokens(ids, mask, (9, 8))
    assert starts.int().tolist() == [[1, 1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 0, 0]]


def test_steps_are_cut_after_their_tokens_or_else_by_number():
    rollouts = with_tokens(known(old=[[-1.0] * 5], rewards=[1.0]), [[5, 9, 6, 7, 9]])
    after, every = card("dapo_step", step_token_ids=(9,)), card("dapo_step", step_tokens=3)
    assert after.segments(rollouts).int().tolist() == [[1, 0, 1, 0, 0]]
    assert every.segments(rollouts).int().tolist() == [[1, 0, 0, 1, 0]]


def test_a_step_does_not_end_at_the_token_of_a_tool():
    ids = torch.tensor([[5, 9, 5, 5]])
    mask = torch.tensor([[True, False, True, True]])
    assert after_tokens(ids, mask, (9,)).int().tolist() == [[1, 0, 0, 0]]


def test_beyond_the_clamp_a_step_has_no_gradient(rollouts):
    algorithm = card("dapo_step", step_tokens=3, log_ratio_clamp=0.5)
    credit = algorithm.credit(rollouts, make_values(rollouts))
    logprobs = (rollouts.ref_logprobs - 0.3).detach().requires_grad_()
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    tokens = algorithm.segments(rollouts).cumsum(1).masked_fill(~rollouts.action_mask, 0)
    for row, steps in enumerate(tokens):
        for step in range(1, int(steps.max()) + 1):
            inside = (steps == step).sum() * 0.3 < 0.5
            assert ((gradient[row, steps == step] != 0) == inside).all()


def test_the_normaliser_looks_at_steps_from_the_same_state_only():
    rollouts = known(old=[[-1.0] * 2] * 3, rewards=[1.0, 0.0, 1.0])
    rollouts = with_tokens(rollouts, [[1, 2], [1, 3], [4, 2]])
    values = said(rollouts, [[0.5, 0.6], [0.5, 0.6], [0.5, 0.3]])
    plain, normal = (
        card("dapo_step", beta=1.0, step_tokens=1, normalize=on).credit(rollouts, values).advantages
        for on in (False, True)
    )
    removed = plain - normal
    first = math.log((math.exp(0.1) * 2 + math.exp(-0.2)) / 3)
    second = math.log((math.exp(0.4) + math.exp(-0.6)) / 2)  # after 1; nobody else is after 4
    expected = [[first, second], [first, second], [first, 0.0]]
    assert torch.allclose(removed, padded(expected))
    apart = tuple(
        dataclasses.replace(t, group=number) for number, t in enumerate(rollouts.trajectories)
    )
    other = dataclasses.replace(rollouts, group=torch.arange(3), trajectories=apart)
    alone = card("dapo_step", beta=1.0, step_tokens=1, normalize=True).credit(other, values)
    assert torch.equal(alone.advantages, plain)


def test_the_critic_is_taught_nothing(rollouts):
    credit = card("dapo_step").credit(rollouts, make_values(rollouts))
    assert credit.critic_targets is None


def test_a_step_whose_value_nobody_gave_is_an_error(rollouts):
    values = make_values(rollouts)
    blind = dataclasses.replace(values, starts=torch.zeros_like(values.starts))
    with pytest.raises(
        ValueError, match=r"a value before each of .* and the critic gave 0 of them"
    ):
        card("dapo_step").credit(rollouts, blind)
    with pytest.raises(ValueError, match="DAPOStep needs the values of a critic and got none"):
        card("dapo_step").credit(rollouts, None)


def test_a_missing_reference_is_an_error(rollouts):
    algorithm = card("dapo_step")
    credit = algorithm.credit(rollouts, make_values(rollouts))
    blind = dataclasses.replace(rollouts, ref_logprobs=None)
    with pytest.raises(ValueError, match="DAPOStep learns the log-ratio to a reference"):
        algorithm.policy_loss(moved(rollouts), blind, credit)


def test_rollouts_of_a_file_are_replayed_and_others_sampled():
    sampling = SamplingParams(max_new_tokens=8)
    online = card("dapo_step").plan(prompts_per_step=4, sampling=sampling)
    offline = card("dapo_step", rollouts="r.parquet").plan(prompts_per_step=4, sampling=sampling)
    assert isinstance(online, Flat)
    assert isinstance(offline, Stored)
    assert (offline.path, offline.length_limit) == ("r.parquet", 8)


def test_ratios_of_sampler_and_trainer_weigh_a_step_by_the_mean_of_its_tokens():
    rollouts = make_rollouts(rewards=[1, 0], lengths=[2, 2], group=[0, 0])
    algorithm = card("dapo_step", mismatch="token_truncate", mismatch_high=9.0)
    credit = algorithm.credit(rollouts, make_values(rollouts))
    plain = dataclasses.replace(credit, importance=None)
    one = torch.tensor([0])
    logprobs = moved(rollouts)[:1]
    losses = [
        algorithm.policy_loss(logprobs, rollouts.rows(one), c.rows(one, 2)).total
        for c in (credit, plain)
    ]
    ratio = losses[0] / losses[1]
    assert ratio.item() == pytest.approx(credit.importance[0].mean().item())


def offline(*, beta, steps, sign=1.0):
    """Success of a policy that learns from stored responses alone, by a critic fitted to them."""
    sampling = SamplingParams(max_new_tokens=LIMIT)
    flat = Flat(group_size=32, prompts_per_step=60, sampling=sampling)
    stored, _ = flat.rollout(TableEngine(), Prompts(), score, seed=5)
    critic = TableCritic()
    for _ in range(10):
        critic.observe(collate(stored, length_limit=LIMIT))
    algorithm = card("dapo_step", rollouts="toy", step_tokens=1, beta=beta)
    plan = algorithm.plan(prompts_per_step=6, sampling=sampling)
    plan.stored = stored
    given = {"plan": plan, "critic": critic, "lr": 0.5, "minibatches": 1, "until": 0.9}
    return train(algorithm, steps=steps, sign=sign, **given)


def test_a_policy_learns_from_stored_responses_and_a_critic_fitted_to_them():
    assert offline(beta=0.005, steps=25)[-1] >= 0.9


@pytest.mark.slow
def test_a_larger_beta_stays_closer_to_the_reference():
    assert 0.5 < max(offline(beta=0.02, steps=8)) < 0.8
    assert max(offline(beta=0.2, steps=8)) < 0.3


def test_stored_responses_teach_the_opposite_with_the_sign_flipped():
    assert offline(beta=0.005, steps=5, sign=-1.0)[-1] < 0.005
