"""PACS: cross-entropy on outcomes, and the policy gradient that it is."""

import dataclasses

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from llmac.core.group_bce import group_bce

from .making import card, known, labelled, moved, ragged

SCORES = torch.tensor([0.3, -0.3, 0.0, 0.1], dtype=torch.float64)
RIGHT = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
ONE = torch.zeros(4, dtype=torch.int64)


def tokens(scores=SCORES):
    """Four responses of two tokens that have become likelier by `scores` in all."""
    rollouts = known(old=[[-1.0, -0.5]] * 4, rewards=[1, 0, 0, 0])
    new = rollouts.old_logprobs + torch.tensor([[0.25, 0.75]]) * scores[:, None]
    return dataclasses.replace(rollouts, group=ONE), new.detach().requires_grad_()


def gradient_by_credit(algorithm, rollouts, logprobs):
    """Of the loss the learner would take: undivided, over its weight."""
    credit = algorithm.credit(rollouts, None)
    credit = algorithm.refreshed(credit, rollouts, logprobs.detach())
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    return torch.autograd.grad(loss.total / loss.weight, logprobs)[0]


def loss_through_the_groups(rollouts, logprobs, *, beta, score="sum", relative, weights):
    """The paper's loss, group by group and response by response."""
    total, rows = 0.0, len(rollouts.trajectories)
    lengths = rollouts.action_mask.sum(-1)
    for g in rollouts.group.unique():
        members = (rollouts.group == g).nonzero().flatten().tolist()
        labels = [rollouts.trajectories[i].reward for i in members]
        said = []
        for i in members:
            told = logprobs[i][rollouts.action_mask[i]]
            if score == "sum":
                said.append(beta * (told - rollouts.old_logprobs[i][rollouts.action_mask[i]]).sum())
            else:
                said.append(beta * told.sum() / max(int(lengths[i]), 1))
        said = torch.stack(said)
        for k in range(len(members)):
            others = torch.cat([said[:k], said[k + 1 :]])
            logit = {
                "leave_one_out": said[k] - others.mean(),
                "group": (said[k] - said.mean()) / (said.std() + 1e-6),
                "naive": said[k],
            }[relative]
            both = len(set(labels)) == 2
            weight = {
                "none": 1.0,
                "balanced": len(labels) / 2 / labels.count(labels[k]) if both else 1.0,
                "positive": labels[k],
                "negative": 1 - labels[k],
            }[weights]
            label = torch.tensor(labels[k], dtype=logit.dtype)
            total = total + weight * binary_cross_entropy_with_logits(logit, label)
    return total / rows


@pytest.mark.parametrize(
    ("beta", "weights", "loss", "gradient"),
    [
        # psi = .3 - (-.3 + 0 + .1) / 3 = .366667, and so on; loss of the first: log(1 + e^-.366667)
        (1.0, "none", 0.611828, [-0.219835, 0.047724, 0.080503, 0.091607]),
        (1.0, "balanced", 0.583394, [-0.283005, 0.077299, 0.099152, 0.106554]),
        (2.0, "none", 0.550415, None),
        (2.0, "balanced", 0.497693, None),
    ],
)
def test_the_loss_and_its_gradient_are_the_released_codes(beta, weights, loss, gradient):
    found = group_bce(beta * SCORES, RIGHT, ONE, relative="leave_one_out", weights=weights).mean()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    if gradient is not None:
        rollouts, logprobs = tokens()
        algorithm = card("pacs", group_size=4, beta=beta, class_weights=weights)
        by_credit = gradient_by_credit(algorithm, rollouts, logprobs)
        assert by_credit[:, 0].tolist() == pytest.approx(gradient, abs=1e-6)
        assert torch.equal(by_credit[:, 0], by_credit[:, 1])


def test_the_first_unweighted_step_is_rloos_times_beta():
    rollouts, _ = tokens()
    pacs = card("pacs", beta=2.0, class_weights="none").credit(rollouts, None)
    rloo = card("rloo").credit(rollouts, None)
    assert torch.allclose(pacs.advantages, 2.0 * rloo.advantages)
    assert torch.equal(pacs.policy_mask, rloo.policy_mask)
    # per token (1/n) of it: -RLOO / 4, and at two logits of 0 the loss is ln 2
    first = gradient_by_credit(
        card("pacs", group_size=4, class_weights="none"), *tokens(torch.zeros_like(SCORES))
    )
    assert first[:, 0].tolist() == pytest.approx([-1 / 4, 1 / 12, 1 / 12, 1 / 12])
    weighted = gradient_by_credit(card("pacs", group_size=4), *tokens(torch.zeros_like(SCORES)))
    assert weighted[:, 0].tolist() == pytest.approx([-1 / 3, 1 / 9, 1 / 9, 1 / 9])


def test_a_group_of_right_responses_pulls_back_only_once_it_has_moved():
    rollouts, logprobs = tokens()
    rollouts = dataclasses.replace(rollouts, rewards=rollouts.rewards * 0)
    rollouts.rewards[:, 1] = 1.0
    algorithm = card("pacs", group_size=4)
    assert algorithm.credit(rollouts, None).advantages.abs().max() < 1e-12
    expected = [0.030165, -0.035609, -0.00283, 0.008274]  # up where it fell, down where it rose
    by_credit = gradient_by_credit(algorithm, rollouts, logprobs)
    assert by_credit[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("score", "relative", "weights"),
    [
        ("sum", "leave_one_out", "balanced"),
        ("mean", "group", "positive"),
        ("sum", "group", "none"),
        ("mean", "leave_one_out", "negative"),
        ("sum", "naive", "balanced"),
    ],
)
def test_credit_is_the_gradient_through_the_whole_group(score, relative, weights):
    rollouts = labelled(ragged()).rows(torch.tensor([7, 3, 0, 5, 9, 1, 2, 8, 4, 6, 11]))
    algorithm = card("pacs", beta=0.7, score=score, relative=relative, class_weights=weights)
    algorithm = dataclasses.replace(algorithm, allocation="mixed")  # groups of any size
    logprobs = moved(rollouts)
    options = {"beta": 0.7, "score": score, "relative": relative, "weights": weights}
    loss = loss_through_the_groups(rollouts, logprobs, **options)
    (expected,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(gradient_by_credit(algorithm, rollouts, logprobs), expected)


def test_before_it_moves_the_mean_score_already_prefers_the_likelier_response():
    rollouts, _ = tokens()
    rollouts = dataclasses.replace(
        rollouts, old_logprobs=torch.tensor([[-1.0, -3], [-1, -1], [-1, -1], [-1, -1]]).double()
    )
    old = rollouts.old_logprobs.clone().requires_grad_()
    options = {"beta": 2.0, "score": "mean", "relative": "leave_one_out", "weights": "none"}
    loss = loss_through_the_groups(rollouts, old, **options)
    credit = card("pacs", beta=2.0, score="mean", class_weights="none").credit(rollouts, None)
    (expected,) = torch.autograd.grad(loss, old)
    assert torch.allclose(-credit.advantages / 4, expected)


def test_credit_follows_the_policy_and_keeps_what_is_masked_out():
    rollouts, logprobs = tokens()
    rollouts = dataclasses.replace(rollouts, truncated=torch.tensor([False, True, False, False]))
    algorithm = card("pacs", group_size=4, mask_truncated=True)
    credit = algorithm.credit(rollouts, None)
    later = algorithm.refreshed(credit, rollouts, logprobs.detach())
    assert algorithm.refreshes_credit
    assert later.advantages[0, 0] < credit.advantages[0, 0]  # it is on its way already
    assert (later.advantages[1] == 0).all()
    assert later.policy_mask is credit.policy_mask


def test_rows_that_only_keep_other_ranks_company_are_not_judged_again():
    rollouts, logprobs = tokens()
    algorithm = card("pacs", group_size=4)
    credit = algorithm.credit(rollouts, None)
    alone = torch.tensor([0])
    idle = credit.rows(alone, 2).counting_nothing()
    assert algorithm.refreshed(idle, rollouts.rows(alone), logprobs.detach()[alone]) is idle


@pytest.mark.parametrize("reward", [0.5, -1.0, 2.0])
def test_a_reward_that_is_no_label_is_refused(reward):
    rollouts = known(old=[[-1.0]] * 2, rewards=[1, reward])
    with pytest.raises(ValueError, match=f"'p0' has {reward:g}; let one reward function"):
        card("pacs").credit(rollouts, None)


def test_equal_scores_have_a_slope_and_no_nan():
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    loss = group_bce(scores, RIGHT, ONE, relative="group", weights="none").mean()
    (gradient,) = torch.autograd.grad(loss, scores)
    # -1/8 and 1/8 of each are what logits would get: minus the group's mean, over 1e-6
    assert gradient.tolist() == pytest.approx([-0.1875e6, 0.0625e6, 0.0625e6, 0.0625e6])
