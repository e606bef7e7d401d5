"""Critique in the loop: right answers are learned by heart, and nothing else is."""

import dataclasses

import pytest
import torch

from llmac.core.critique_rows import REFINED, Keep
from llmac.core.protocols import SamplingParams
from llmac.core.refinement import SoftFilter

from .making import card, make_rollouts, make_values, moved


def rows(refined=(0, 1, 0, 1)):
    """Four rows of 2, 1, 3 and 4 tokens, the third of which is wrong."""
    rollouts = make_rollouts(rewards=[1, 1, 0, 1], lengths=[2, 1, 3, 4], group=[0, 0, 1, 1])
    marked = tuple(
        dataclasses.replace(t, reward_parts={REFINED: float(r)})
        for t, r in zip(rollouts.trajectories, refined, strict=True)
    )
    return dataclasses.replace(rollouts, trajectories=marked)


def loss_of(algorithm, rollouts, logprobs):
    loss = algorithm.policy_loss(logprobs, rollouts, algorithm.credit(rollouts, None))
    return loss.total.item() / loss.weight.item()


@pytest.mark.parametrize("name", ["critique_loop", "critique_filter"])
def test_the_loss_is_the_mean_likelihood_of_what_is_right(name):
    rollouts, algorithm = rows(), card(name)
    logprobs = moved(rollouts)
    nll = -logprobs.detach()
    right = [*nll[0, :2], *nll[1, :1], *nll[3, :4]]
    assert loss_of(algorithm, rollouts, logprobs) == pytest.approx(sum(right).item() / 7)
    credit = algorithm.credit(rollouts, None)
    assert not credit.advantages.any()
    assert credit.policy_mask.sum(1).tolist() == [2, 1, 0, 4]
    assert not any("sampler" in metric for metric in credit.metrics)


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_sets_weigh_their_shares_however_many_tokens_they_have(share):
    rollouts = rows()
    algorithm = card("critique_loop", weighing="sets", refined_share=share)
    logprobs = moved(rollouts)
    nll = -logprobs.detach()
    first, refined = nll[0, :2].mean(), torch.stack([*nll[1, :1], *nll[3, :4]]).mean()
    expected = ((1 - share) * first + share * refined).item()
    assert loss_of(algorithm, rollouts, logprobs) == pytest.approx(expected, rel=1e-5)


def test_a_step_without_a_right_answer_teaches_nothing():
    rollouts = make_rollouts(rewards=[0], lengths=[3], group=[0])
    for fields in ({}, {"weighing": "sets"}):
        algorithm = card("critique_loop", **fields)
        logprobs = moved(rollouts)
        loss = algorithm.policy_loss(logprobs, rollouts, algorithm.credit(rollouts, None))
        (gradient,) = torch.autograd.grad(loss.total, logprobs)
        assert (loss.weight.item(), gradient.abs().sum().item()) == (0, 0)


def test_a_critic_of_values_is_refused(rollouts):
    with pytest.raises(ValueError, match="has no use for a critic's values"):
        card("critique_loop").credit(rollouts, make_values(rollouts))


def test_the_plan_is_what_the_card_says():
    sampling = SamplingParams(temperature=0.7, max_new_tokens=64)
    plan = card(
        "critique_loop", criticise="all", learn_as="both", reserved=2, solution_column="worked"
    ).plan(prompts_per_step=3, sampling=sampling)
    assert plan.keep == Keep(
        also_right=True, reserved=2, learned_as="both", barrier=True, solution_column="worked"
    )
    assert plan.answers == dataclasses.replace(sampling, n=5)
    assert plan.refinements == dataclasses.replace(sampling, n=4)
    assert plan.critiques == SamplingParams(temperature=0.0, max_new_tokens=1536)
    assert (plan.trains, plan.uneven, plan.prompts_per_step) == ("actor", True, 3)
    filtered = card("critique_filter", tau=0.4).plan(prompts_per_step=3, sampling=sampling)
    assert (filtered.judge, filtered.refinements.n) == (SoftFilter(tau=0.4), 10)
    assert (filtered.trains, filtered.critiques.n) == ("critic", 4)
