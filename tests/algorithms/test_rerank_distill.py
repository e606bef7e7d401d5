"""Candidates ranked by a critic, and imitated."""

import dataclasses

import pytest
import torch

from llmac.core.reranking import candidate_weights

from .making import card, make_rollouts, make_values, moved, ragged

SCORES = torch.tensor([0.1, 0.9, 0.5, 0.7], dtype=torch.float64)
ONE = torch.zeros(4, dtype=torch.int64)
ALL = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("top_k", "temperature", "weights"),
    [
        (3, 1.0, [0, 0.40176, 0.26931, 0.32893]),
        (3, 0.1, [0, 0.86681, 0.01588, 0.11731]),
        (3, 0.0, [0, 1, 0, 0]),
        (1, 1.0, [0, 1, 0, 0]),
    ],
)
def test_the_best_candidates_have_the_softmax_of_their_scores(top_k, temperature, weights):
    found = candidate_weights(SCORES, ONE, ALL, top_k=top_k, temperature=temperature)
    assert found.tolist() == pytest.approx(weights, abs=1e-5)


def test_each_group_chooses_among_those_who_may_stand():
    scores = torch.tensor([5.0, 1.0, 3.0, 3.0, 9.0, 2.0])
    group = torch.tensor([7, 4, 7, 7, 4, 2])
    eligible = torch.tensor([True, True, True, True, False, False])
    best = candidate_weights(scores, group, eligible, top_k=2, temperature=0.0)
    assert best.tolist() == [1, 1, 0, 0, 0, 0]  # nobody of group 2 may stand
    tied = candidate_weights(-scores, group, eligible, top_k=2, temperature=0.0)
    assert tied.tolist() == [0, 1, 0.5, 0.5, 0, 0]
    assert candidate_weights(scores, group, eligible, top_k=9, temperature=1e9).tolist() == (
        pytest.approx([1 / 3, 1, 1 / 3, 1 / 3, 0, 0])
    )


def judged():
    """Two prompts; values before the last tokens are .1 .9 .5 and .7 .2."""
    rollouts = make_rollouts(
        rewards=[0, 1, 0, 1, 0], lengths=[2, 1, 3, 2, 1], group=[3, 3, 3, 8, 8], injected=[(3, 0)]
    )
    at = torch.tensor([[4, 0.1, 9], [0.9, 9, 9], [4, 4, 0.5], [9, 0.7, 9], [0.2, 9, 9]]).double()
    return rollouts, dataclasses.replace(make_values(rollouts), at=at)


def test_the_loss_is_the_mean_over_prompts_of_the_weighted_likelihood_of_responses():
    rollouts, values = judged()
    algorithm = card("rerank_distill", top_k=2, temperature=0.4)
    credit = algorithm.credit(rollouts, values)
    logprobs = moved(rollouts)
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    first = torch.tensor([0.9, 0.5]).div(0.4).softmax(0)
    second = torch.tensor([0.7, 0.2]).div(0.4).softmax(0)
    likelihood = (logprobs * rollouts.action_mask).sum(1)
    expected = -(first[0] * likelihood[1] + first[1] * likelihood[2]) / 2
    expected = expected - (second[0] * likelihood[3] + second[1] * likelihood[4]) / 2
    assert (loss.total / loss.weight).item() == pytest.approx(expected.item())
    assert loss.weight == algorithm.loss_weight(rollouts, credit) == 4
    reward = credit.metrics["actor/distilled_reward"].value
    assert reward == pytest.approx(((first[0] + second[0]) / 2).item())


def test_the_critic_learns_what_came_of_every_state_of_every_response():
    rollouts, values = judged()
    targets = card("rerank_distill", top_k=1).credit(rollouts, values).critic_targets
    assert torch.equal(targets.value_mask, rollouts.action_mask)
    assert targets.returns[1:4].tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert not targets.bootstraps.any()
    rewarded = card("rerank_distill", score_by="reward")
    assert (rewarded.wanted_critic, rewarded.uses_values) == (None, False)
    assert card("rerank_distill").wanted_critic == "value_head"


def test_rewards_in_the_critics_place_are_best_of_n():
    rollouts, _ = judged()
    algorithm = card("rerank_distill", score_by="reward", temperature=0.0)
    credit = algorithm.credit(rollouts, None)
    assert credit.critic_targets is None
    assert credit.policy_mask.any(1).tolist() == [False, True, False, True, False]
    assert torch.equal(credit.likelihood, credit.policy_mask.double())
    assert credit.metrics["actor/distilled_reward"].value == 1.0


def test_what_may_not_be_learned_is_no_candidate():
    rollouts = ragged()
    credit = card("rerank_distill", mask_truncated=True, temperature=0.0).credit(
        rollouts,
        dataclasses.replace(
            make_values(rollouts), at=rollouts.truncated[:, None] * 9.0 + 0 * rollouts.rewards
        ),
    )
    assert not credit.policy_mask[rollouts.truncated].any()
    assert not credit.policy_mask[~rollouts.action_mask.any(1)].any()
    assert credit.policy_mask.any(1).sum() == 9  # the best that may, though the cut ones score more
    # Equally good candidates share: three in each group, of one weight, a mean of 1 each.
    assert torch.allclose(
        credit.likelihood[credit.policy_mask], torch.ones((), dtype=torch.float64)
    )


def test_values_that_are_missing_or_not_asked_for_are_refused():
    rollouts, values = judged()
    algorithm = card("rerank_distill")
    with pytest.raises(
        ValueError, match="RerankDistill ranks by the values of a critic and got none"
    ):
        algorithm.credit(rollouts, None)
    with pytest.raises(ValueError, match="has no use for a critic's values"):
        card("rerank_distill", score_by="reward").credit(rollouts, values)
    starts = values.starts.clone()
    starts[2, 2] = False
    with pytest.raises(ValueError, match="of a response to prompt 'p3' there is none"):
        algorithm.credit(rollouts, dataclasses.replace(values, starts=starts))
