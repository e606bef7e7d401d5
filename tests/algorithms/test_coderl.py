"""CodeRL: tokens weighted by how clearly they show what came of the whole."""

import dataclasses

import pytest
import torch

from llmac.core.greedy_baseline import GreedyBaseline
from llmac.core.plans import Flat
from llmac.core.protocols import SamplingParams

from .making import card, known, make_values, moved, ragged
from .toy_world.world import Prompts, TableEngine, score

LOGITS = torch.tensor([[1.0, 0, 2, -1], [0, 0, 2.5, 0], [-1, 0, 3, 1]], dtype=torch.float64)


def failed(*, baseline=-0.6):
    """A program that failed a test (class 2), where the greedy one crashed."""
    rollouts = known(old=[[-1.0, -0.5, -0.2]], rewards=[-0.3])
    row = dataclasses.replace(rollouts.trajectories[0], baseline_reward=baseline)
    rollouts = dataclasses.replace(rollouts, trajectories=(row,))
    chances = LOGITS.softmax(-1)[:, 2][None]
    return rollouts, dataclasses.replace(make_values(rollouts), outcome_chances=chances)


@pytest.mark.parametrize(
    ("relative", "weights", "loss"),
    [
        (True, [0.19317, 0.24072, 0.24929], 0.12113),  # q times -.3 - -.6
        (False, [-0.19317, -0.24072, -0.24929], -0.12113),  # q times -.3
    ],
)
def test_tokens_weigh_the_chance_of_the_outcome_times_the_gain(relative, weights, loss):
    rollouts, values = failed()
    algorithm = card("coderl", relative_returns=relative)
    credit = algorithm.credit(rollouts, values)
    assert credit.advantages[0].tolist() == pytest.approx(weights, abs=1e-5)
    found = algorithm.policy_loss(rollouts.old_logprobs, rollouts, credit)
    assert (found.total / found.weight).item() == pytest.approx(loss, abs=1e-5)
    chance = credit.metrics["critic/outcome_chance"].value
    assert chance == pytest.approx((0.64391 + 0.80240 + 0.83095) / 3, abs=1e-5)
    assert "critic/vf_explained_var" not in credit.metrics  # of a whole that no state says


def test_a_policy_that_has_moved_has_the_same_gradient():
    rollouts, values = failed()
    algorithm = card("coderl")
    credit = algorithm.credit(rollouts, values)
    logprobs = moved(rollouts)
    loss = algorithm.policy_loss(logprobs, rollouts, credit)
    (gradient,) = torch.autograd.grad(loss.total / loss.weight, logprobs)
    assert torch.allclose(gradient, -credit.advantages / 3)  # the mean over its tokens


def test_the_critic_learns_the_outcome_at_the_last_sampled_token():
    rollouts = ragged()
    targets = card("coderl").credit(rollouts, make_values(rollouts)).critic_targets
    places = targets.value_mask.nonzero().tolist()
    lengths = [3, 8, 2, 5, 8, 1, 4, 6, 2, 7, 0, 4]
    assert places == [[row, length - 1] for row, length in enumerate(lengths) if length]
    outcomes = [t.reward for t in rollouts.trajectories if t.response_ids]
    assert targets.returns[targets.value_mask].tolist() == outcomes
    assert targets.returns.sum().item() == sum(outcomes)
    assert not targets.bootstraps.any()
    masked = card("coderl", mask_truncated=True).credit(rollouts, make_values(rollouts))
    assert not masked.critic_targets.value_mask[rollouts.truncated].any()
    frozen = card("coderl", teach_critic=False).credit(rollouts, make_values(rollouts))
    assert frozen.critic_targets is None


def test_what_is_missing_is_named():
    rollouts, values = failed(baseline=None)
    with pytest.raises(ValueError, match="to prompt 'p0' has none beside it; set relative_returns"):
        card("coderl").credit(rollouts, values)
    assert card("coderl", relative_returns=False).credit(rollouts, values)
    with pytest.raises(ValueError, match="got values alone; set critic: code_outcomes"):
        card("coderl").credit(rollouts, dataclasses.replace(values, outcome_chances=None))
    with pytest.raises(ValueError, match="got no values; set critic"):
        card("coderl").credit(rollouts, None)


def greedy_plan(group_size=3):
    sampling = SamplingParams(max_new_tokens=5, temperature=1.0)
    return card("coderl", group_size=group_size).plan(prompts_per_step=2, sampling=sampling)


def test_a_greedy_response_is_sampled_and_judged_beside_the_others_and_is_no_row():
    plan, engine, asked = greedy_plan(), TableEngine(), []
    generate = engine.generate

    def listening(requests):
        asked.extend(requests)
        return generate(requests)

    engine.generate = listening
    engine.logits[:, 2] += 2.0  # greedy: 2 2 2 2 2, which never ends
    rows, metrics = plan.rollout(engine, Prompts(), score, seed=3)
    flat = Flat(group_size=3, prompts_per_step=2, sampling=plan.flat.sampling)
    alone, _ = flat.rollout(engine, Prompts(), score, seed=3)
    assert isinstance(plan, GreedyBaseline)
    assert [dataclasses.replace(r, baseline_reward=None) for r in rows] == alone
    assert [r.baseline_reward for r in rows] == [0.0] * 6
    assert [(r.params.temperature, r.params.n) for r in asked[:4]] == [(0, 1)] * 2 + [(1, 3)] * 2
    assert metrics["rollout/greedy_reward"].value == 0.0
    tokens = sum(len(r.response_ids) for r in rows)
    assert metrics["rollout/sampled_tokens"].value == tokens + 10
    assert plan.length_limit == 5


def test_baselines_are_those_of_their_own_prompt():
    def judge(trajectories):
        return [dataclasses.replace(t, reward=float(t.prompt.token_ids[0])) for t in trajectories]

    rows, _ = greedy_plan().rollout(TableEngine(), Prompts(), judge, seed=0)
    assert [r.baseline_reward for r in rows] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="greedy response to prompt 'p0' has no reward"):
        greedy_plan().rollout(TableEngine(), Prompts(), list, seed=0)
