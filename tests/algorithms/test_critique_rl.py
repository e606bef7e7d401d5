"""Critique-RL and RL4F: credit by hand, rewards of the stages, and what is refused."""

import dataclasses

import pytest
import torch

from llmac.algorithms import ALGORITHMS
from llmac.algorithms.critiquing import CriticLearns
from llmac.core.baselines import leave_one_out
from llmac.core.critique import Critique
from llmac.core.masking import whiten
from llmac.core.protocols import SamplingParams
from llmac.core.refinement import RepairReward, StageReward
from llmac.core.verdicts import ScoreLine, VerdictLine

from .making import card, card_class, known, make_values

FREE = {"whiten_advantages": False}
SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=64)


def one_token_each(rewards):
    return known(old=[[-1.0]] * len(rewards), rewards=rewards)


@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        ([1.2, 0.2, -1.0, 1.2], [1.06667, -0.26667, -1.86667, 1.06667]),  # gated
        ([1.2, 0.2, 1.0, 1.2], [0.4, -0.93333, 0.13333, 0.4]),  # additive: the third is good
    ],
)
def test_a_critique_is_compared_with_the_others_of_the_same_answer(rewards, advantages):
    credit = card("critique_rl", **FREE).credit(one_token_each(rewards), None)
    assert credit.advantages[:, 0].tolist() == pytest.approx(advantages, abs=1e-5)


def test_the_kl_comes_after_the_comparison_and_counts_from_each_token_on():
    # k1 of the first row: .1, -.2, .3, 0; Â = 1.06667, coefficient .01.
    old = [[-1.0, -1.0, -1.0, -1.0], [-1.0], [-1.0], [-1.0]]
    ref = [[-1.1, -0.8, -1.3, -1.0], [-1.5], [-1.0], [-1.0]]
    rollouts = known(old=old, ref=ref, rewards=[1.2, 0.2, -1.0, 1.2])
    credit = card("critique_rl", **FREE).credit(rollouts, None)
    assert credit.advantages[0].tolist() == pytest.approx(
        [1.06467, 1.06567, 1.06367, 1.06667], abs=1e-5
    )
    # A sibling pays its own price and nobody else's.
    assert credit.advantages[1, 0].item() == pytest.approx(-0.26667 - 0.005, abs=1e-5)
    assert credit.advantages[2, 0].item() == pytest.approx(-1.86667, abs=1e-5)


def test_without_kl_clip_and_whitening_it_is_rloo(rollouts):
    plain = card("critique_rl", kl_coef=0.0, advantage_clip=None, **FREE)
    ours, theirs = (a.credit(rollouts, None) for a in (plain, card("rloo")))
    assert torch.allclose(ours.advantages, theirs.advantages)
    assert torch.equal(ours.policy_mask, theirs.policy_mask)


def test_advantages_are_clipped_before_they_are_whitened(rollouts):
    algorithm = card("critique_rl", kl_coef=0.0, advantage_clip=0.3)
    outcomes = torch.tensor([t.reward for t in rollouts.trajectories], dtype=torch.float64)
    clipped = leave_one_out(outcomes, rollouts.group).clamp(-0.3, 0.3)[:, None]
    mask = rollouts.action_mask
    expected = whiten(clipped.expand_as(rollouts.rewards), mask).masked_fill(~mask, 0.0)
    credit = algorithm.credit(rollouts, None)
    assert torch.allclose(credit.advantages, expected)
    assert credit.metrics["critic/advantages/clipfrac"].value > 0.3


def test_a_kl_in_the_loss_is_not_in_the_advantages(rollouts):
    fields = {"kl_placement": "loss", "kl_estimator": "k3"}
    without = card("critique_rl", kl_coef=0.0).credit(rollouts, None).advantages
    assert torch.equal(card("critique_rl", **fields).credit(rollouts, None).advantages, without)
    blind = dataclasses.replace(rollouts, ref_logprobs=None)
    with pytest.raises(ValueError, match=r"CritiqueRL has a KL term .kl_coef is 0\.01., and"):
        card("critique_rl").credit(blind, None)


def test_the_stages_ask_for_what_they_reward():
    def plan_of(name, **fields):
        return card(name, **fields).plan(prompts_per_step=3, sampling=SAMPLING)

    first, second = plan_of("critique_rl"), plan_of("critique_rl", stage=2, form="gated")
    assert (first.refinements, first.judge) == (None, StageReward(stage=1))
    assert second.judge == StageReward(stage=2, form="gated")
    assert second.refinements == SamplingParams(temperature=0.0, max_new_tokens=1024)
    assert first.critiques == dataclasses.replace(SAMPLING, n=4)
    assert first.verdicts == VerdictLine()
    assert (first.trains, first.partner_model) == ("critic", None)
    assert 'begins with "Correctness of the final answer:"' in first.wording.critique
    assert 'either "Correct" or "Wrong"' in first.wording.critique

    several = plan_of("critique_rl", answers_per_prompt=2, answers_sampled=10)
    assert (several.answers.n, several.answers_kept) == (10, 2)
    graded = plan_of("critique_rl", verdict="score", stage=2, score_tolerance=2.0)
    assert graded.verdicts == ScoreLine(marker="Correctness of the final answer:", tolerance=2.0)
    assert (graded.judge.binary, "a score from 1" in graded.wording.critique) == (False, True)
    repair = plan_of("rl4f", repair="diff_or_exact", partner_model="frozen")
    assert (repair.judge, repair.verdicts) == (RepairReward(mode="diff_or_exact"), None)
    assert (repair.answers.temperature, repair.partner_model) == (0.0, "frozen")
    assert "{answer}" in repair.wording.critique
    assert "Correctness" not in repair.wording.critique


def test_every_card_whose_policy_criticises_has_the_plan_of_critiques():
    cards = [name for name in ALGORITHMS if issubclass(card_class(name), CriticLearns)]
    assert set(cards) >= {"critique_rl", "rl4f", "critique_filter"}
    for name in cards:
        plan = card(name).plan(prompts_per_step=1, sampling=SAMPLING)
        assert isinstance(plan, Critique), name
        assert plan.trains == "critic", name


def test_rl4f_is_ppo_on_feedback(rollouts):
    values = make_values(rollouts)
    rl4f, ppo = (card(name, kl_coef=0.01) for name in ("rl4f", "ppo"))
    ours, theirs = (a.credit(rollouts, values) for a in (rl4f, ppo))
    assert torch.equal(ours.advantages, theirs.advantages)
    assert torch.equal(ours.critic_targets.returns, theirs.critic_targets.returns)


def test_what_the_halves_do_not_change_is_as_in_the_cards_they_refine():
    rl, rloo, rl4f, ppo = (card(name) for name in ("critique_rl", "rloo", "rl4f", "ppo"))
    for field in ("group_size", "kl_placement", "kl_estimator", "clip_low", "clip_high"):
        assert getattr(rl, field) == getattr(rloo, field), field
    for field in ("group_size", "kl_placement", "kl_estimator", "lam", "aggregation"):
        assert getattr(rl4f, field) == getattr(ppo, field), field


SPEAKS = "the critique template has no {answer}"


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("critique_rl", {"stage": 3}, "stage"),
        ("critique_rl", {"beta1": 0.5}, "beta1 of CritiqueRL .* set stage to 2"),
        ("critique_rl", {"refine_reward": "delta"}, "refine_reward .* set stage to 2"),
        ("critique_rl", {"refine_tokens": 9}, "refine_tokens of CritiqueRL .* set stage to 2"),
        ("critique_rl", {"stage": 2, "beta1": -1.0}, "beta1 of CritiqueRL must be finite and at"),
        (
            "critique_rl",
            {"stage": 2, "form": "gated", "beta1": 0.5},
            "beta1 of CritiqueRL .* no effect; set form to additive",
        ),
        ("critique_rl", {"score_tolerance": 1.0}, "score_tolerance .* set verdict to score"),
        ("critique_rl", {"verdict": "score", "right_word": "Yes"}, "right_word .* correctness"),
        ("critique_rl", {"verdict": "score", "form": "gated"}, "form of CritiqueRL must be add"),
        (
            "critique_rl",
            {"verdict": "score", "stage": 2, "refine_reward": "correction"},
            "refine_reward of CritiqueRL must be refine or delta",
        ),
        ("critique_rl", {"verdict": "score", "score_tolerance": 0.0}, "tolerance is finite"),
        ("critique_rl", {"advantage_clip": 0.0}, "advantage_clip of CritiqueRL must be None"),
        ("critique_rl", {"partner_model": ""}, "partner_model of CritiqueRL must be a Hub id"),
        ("critique_rl", {"solved_at": float("nan")}, "solved_at of CritiqueRL must be finite"),
        ("critique_rl", {"critique_prompt": "Well?"}, SPEAKS),
        ("critique_rl", {"right_word": "Wrong"}, "they must differ"),
        ("critique_rl", {"answers_per_prompt": 0}, "answers_per_prompt .* at least 1"),
        (
            "critique_rl",
            {"answers_per_prompt": 3, "answers_sampled": 2},
            "answers_sampled .* at least answers_per_prompt, 3",
        ),
        (
            "critique_rl",
            {"answer_temperature": 0.0, "answers_sampled": 2},
            "answer_temperature .* greedy ones are all the same",
        ),
        (
            "critique_rl",
            {"stage": 2, "refinements_per_critique": 2},
            "refinements_per_critique .* greedy refinements are all the same",
        ),
        ("critique_rl", {"answer_temperature": -1.0}, "answer_temperature .* at least 0"),
        ("rl4f", {"refine_prompt": "Again!"}, "the refinement template has no {critique}"),
        ("rl4f", {"chat": False, "refine_prompt": "{critique}"}, "has no {question}"),
        ("critique_filter", {"tau": 1.0}, "tau of CritiqueFilter must be between 0 and 1"),
        ("critique_loop", {"reserved": 5}, "reserved .* at most refinements_per_critique, 4"),
        ("critique_loop", {"reserved": 0}, "reserved of CritiqueLoop must be at least 1"),
        ("critique_loop", {"refined_share": 0.3}, "refined_share .* set weighing to sets"),
        ("critique_loop", {"weighing": "sets", "refined_share": 1.5}, "refined_share .* in .0, 1"),
        ("critique_loop", {"critiques_per_answer": 2}, "greedy critiques are all the same"),
        (
            "critique_loop",
            {"barrier": False, "solution_column": "solution"},
            "solution_column .* set barrier to true",
        ),
        ("critique_loop", {"solution_column": ""}, "solution_column .* the name of a column"),
        ("critique_loop", {"kl_coef": 0.1, "kl_placement": "reward"}, "kl_placement .* loss"),
    ],
)
def test_cards_of_critiques_refuse_what_makes_no_sense(name, fields, says):
    if fields.get("stage") == 3:
        fields, says = {}, "stage of CritiqueRL must be one of 1, 2"
        algorithm = card(name)
        object.__setattr__(algorithm, "stage", 3)
        with pytest.raises(ValueError, match=says):
            algorithm.__post_init__()
        return
    with pytest.raises(ValueError, match=says):
        card(name, **fields)
