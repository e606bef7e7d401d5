"""Every field of every card changes something, is documented, and refuses what makes no sense."""

import ast
import dataclasses
import importlib
import inspect
import math
from pathlib import Path

import pytest
import torch

from llmac.algorithms import ALGORITHMS
from llmac.algorithms.base import Algorithm
from llmac.core.protocols import AsksPromptValues, SamplingParams
from llmac.core.types import Finish, Rollouts

from .making import (
    LABELS,
    card,
    card_class,
    entropy_of,
    labelled,
    moved,
    ragged,
    segments_of,
    values_for,
)

K3 = {"kl_coef": 0.1, "kl_estimator": "k3", "kl_placement": "loss"}
CORRECTED = {"mismatch": "token_truncate"}
STALE = {"off_policy": "vtrace"}
OPEN_GATE = {"gate_threshold": 0.002, "gate_bounds": (0.0, 0.6)}
MIXED = {"allocation": "mixed"}
STORED = {"rollouts": "stored.parquet"}
DIVIDED = {"dynamic_sampling": False, **MIXED}
FLIPS = {
    # field: (what must be on for it to matter, its new value)
    "group_size": ({}, 6),
    "mask_truncated": ({}, True),
    "aggregation": ({"step_tokens": 3, "aggregation": "token_mean"}, "sequence_mean_token_sum"),
    "entropy_coef": ({}, 0.1),
    "kl_coef": ({}, 0.1),
    "kl_estimator": (K3, "k2"),
    "kl_placement": (K3, "reward"),
    "mismatch": ({}, "token_mask"),
    "mismatch_low": (CORRECTED, 0.95),
    "mismatch_high": (CORRECTED, 1.05),
    "clip_low": ({}, 0.05),
    "clip_high": ({}, 0.5),
    "dual_clip": ({}, 1.1),
    "dynamic_sampling": ({"dynamic_sampling": False}, True),
    "max_sampling_rounds": ({"dynamic_sampling": True}, 3),
    "allocation": ({"dynamic_sampling": False}, "failures"),
    "min_responses": (DIVIDED, 3),
    "max_responses": (DIVIDED, 20),
    "scale": ({}, "none"),
    "scale_eps": ({}, 0.5),
    "gamma": ({}, 0.9),
    "lam": ({"lam_rule": "fixed"}, 0.5),
    "lam_rule": ({"lam_rule": "fixed", "lam": 0.5}, "doubt"),
    "lam_alpha": ({"lam_rule": "length"}, 0.9),
    "doubt_below": ({"lam_rule": "doubt", "lam": 0.5}, 0.5),
    "critic_lam": ({}, 0.5),
    "off_policy": ({}, "vtrace"),
    "rho_max": ({"off_policy": "vtrace"}, 1.3),
    "c_max": ({"off_policy": "vtrace"}, 0.8),
    "advantage_clip": ({"weight": "exp"}, 0.2),
    "center_advantages": ({}, False),
    "whiten_advantages": ({"whiten_advantages": True}, False),
    "on_truncation": ({}, "bootstrap"),
    "likelihood_coef": ({}, 0.3),
    "correct_above": ({}, -1.0),
    "values_at": ({}, "every_token"),
    "advantage_scale": ({}, "running"),
    "gate": ({"gate_threshold": 0.002}, "asymmetric"),
    "gate_coef": (OPEN_GATE, 0.2),
    "gate_threshold": ({"gate_bounds": (0.0, 0.6)}, 0.002),
    "gate_bounds": ({"gate_threshold": 0.002}, (0.0, 0.6)),
    "gate_decay": (OPEN_GATE, 0.5),
    "pid_gains": (OPEN_GATE, (3.0, 0.0, 0.0)),
    "phase_window": (OPEN_GATE, 1),
    "converged_at": ({**OPEN_GATE, "phase_window": 1}, 0.1),
    "beta": ({"weight": "exp"}, 0.5),
    "weight": ({}, "exp"),
    "threshold": ({}, 0.2),
    "relative_returns": ({}, False),
    "teach_critic": ({}, False),
    "top_k": ({}, 2),
    "temperature": ({}, 0.1),
    "score_by": ({}, "reward"),
    "max_weight": ({"weight": "exp"}, 1.1),
    "log_ratio_clamp": ({}, 0.1),
    "score": ({}, "mean"),
    "relative": ({}, "group"),
    "class_weights": ({}, "none"),
    "normalize": ({}, True),
    "step_tokens": ({}, 3),
    "step_token_ids": ({}, (2,)),
    "rollouts": ({}, "stored.parquet"),
    "completion_column": ({}, "answer"),
    "append_end": ({}, False),
    "keep_above": (STORED, 0.5),
    "segmenter": ({}, "response_start"),
    "segment_tokens": ({"segmenter": "every_n"}, 2),
    "cut_below": ({"segmenter": "low_probability", "cut_interval": 1}, 0.3),
    "cut_interval": ({"segmenter": "low_probability", "cut_below": 0.9}, 2),
    "delimiter": ({"segmenter": "delimiter"}, "sentence"),
    "max_segments": ({"segmenter": "every_token"}, 2),
    "first_segment": ({"cut_below": 0.2}, "value"),
    "train_below": ({}, 0.5),
    "whiten": ({}, "rows"),
    "whiten_rows": ({"whiten": "rows"}, 3),
    "kl_aggregation": ({}, "like_policy"),
    "skip_ratio_above": ({}, 1.5),
    "branching": ({}, (3, 2)),
    "edge_advantage": ({}, "leave_one_out"),
    "keep": ({}, "all"),
    "best_of": ({"prover_weight": 5.0}, 2.0),
    "prover_weight": ({}, 5.0),
    "reward_range": ({"prover_weight": 5.0}, (-1.0, 1.0)),
    "edges_per_step": ({}, 512),
    "edges_per_prompt": ({}, None),
    "replay_steps": ({}, 0),
    "merge_duplicates": ({}, True),
    "window_tokens": ({}, 5),
    "paused_value": ({}, "critic"),
    "overlong_buffer_tokens": ({}, 5),
    "overlong_penalty": ({}, 0.5),
    "partner_model": ({}, "another"),
    "chat": ({}, False),
    "critique_prompt": ({}, "{answer}"),
    "refine_prompt": ({}, "{critique}"),
    "solved_at": ({}, 0.5),
    "verdict_marker": ({}, "Verdict:"),
    "right_word": ({}, "Yes"),
    "wrong_word": ({}, "No"),
    "answers_per_prompt": ({"answer_temperature": 0.5}, 2),
    "answers_sampled": ({"answer_temperature": 0.5}, 4),
    "answer_temperature": ({}, 0.9),
    "answer_tokens": ({}, 99),
    "refinements_per_critique": ({"stage": 2, "refine_temperature": 0.5}, 3),
    "refine_temperature": ({"stage": 2}, 0.5),
    "refine_tokens": ({"stage": 2}, 99),
    "stage": ({}, 2),
    "form": ({}, "gated"),
    "refine_reward": ({"stage": 2}, "delta"),
    "beta1": ({"stage": 2}, 0.5),
    "verdict": ({}, "score"),
    "score_tolerance": ({"verdict": "score"}, 1.0),
    "score_range": ({"verdict": "score"}, (-1.0, 1.0)),
    "repair": ({}, "diff"),
    "tau": ({}, 0.5),
    "critiques_per_answer": ({"critique_temperature": 0.5}, 2),
    "critique_temperature": ({}, 0.5),
    "critique_tokens": ({}, 99),
    "criticise": ({}, "all"),
    "reserved": ({}, 2),
    "learn_as": ({}, "both"),
    "barrier": ({}, False),
    "solution_column": ({}, "solution"),
    "weighing": ({}, "sets"),
    "refined_share": ({"weighing": "sets"}, 0.2),
    "cap_low": ({}, 0.95),
    "cap_high": ({}, 1.05),
}
REFUSED = {
    *(("tempo", field) for field in ("allocation", "min_responses", "max_responses")),
    ("pacs", "kl_placement"),
    *(("sft", field) for field in ("group_size", "kl_placement", "mask_truncated")),
    *(("sft", field) for field in ("mismatch", "mismatch_low", "mismatch_high")),
    *(
        (name, field)
        for name in ("critique_loop", "critique_filter")
        for field in ("kl_placement", "mismatch", "mismatch_low", "mismatch_high")
    ),
    *(("critique_rl", field) for field in ("dynamic_sampling", "max_sampling_rounds")),
    *(("critique_rl", field) for field in ("allocation", "min_responses", "max_responses")),
}
"""A card refuses what it inherits and cannot work with."""
CARD_FIELDS = [(n, f.name) for n in ALGORITHMS for f in dataclasses.fields(card_class(n)) if f.init]


def with_a_paused_row(rollouts: Rollouts) -> Rollouts:
    """The same rows, one of them truncated for this step only."""
    changed = list(rollouts.trajectories)
    changed[4] = dataclasses.replace(changed[4], finish=Finish.PAUSED)
    return dataclasses.replace(rollouts, trajectories=tuple(changed))


def everything_about(algorithm: Algorithm) -> list:
    """Plan, segments, credit, loss, gradient and what is asked of the loop, as plain numbers."""
    rollouts = with_a_paused_row(ragged())
    if any(isinstance(algorithm, card_class(name)) for name in LABELS):
        rollouts = labelled(rollouts)
    memory = algorithm.memory()
    remembered = {} if memory is None else {"memory": memory}
    for _ in range(2):  # some fields matter from the second step on
        credit = algorithm.credit(rollouts, values_for(algorithm, rollouts), **remembered)
    logprobs = moved(rollouts, spread=1.0)
    loss = algorithm.policy_loss(logprobs, rollouts, credit, entropy=entropy_of(logprobs))
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    targets = credit.critic_targets
    tensors = [
        segments_of(algorithm, rollouts),
        credit.advantages,
        credit.policy_mask,
        algorithm.policy_mask(rollouts),  # no row that was cut has a reward here
        torch.ones(1) if credit.importance is None else credit.importance,
        torch.zeros(1) if credit.likelihood is None else credit.likelihood,
        torch.zeros(1) if credit.kl_weight is None else credit.kl_weight,
        torch.zeros(1) if credit.kl_scale is None else credit.kl_scale,
        loss.total,
        loss.weight,
        gradient,
        *([targets.returns, targets.value_mask] if targets else []),
    ]
    plan = algorithm.plan(prompts_per_step=4, sampling=SamplingParams(max_new_tokens=64))
    made = {k: x for k, x in vars(plan).items() if not callable(x)}
    return [made, algorithm.uses_reference, algorithm.needs_entropy, *(x.tolist() for x in tensors)]


@pytest.mark.parametrize(("name", "field"), [x for x in CARD_FIELDS if x not in REFUSED])
def test_every_field_changes_something(name, field):
    assert field in FLIPS, f"add a value for {field} to FLIPS"
    context, value = FLIPS[field]
    context = {
        key: x
        for key, x in context.items()
        if key in dict.fromkeys(f for n, f in CARD_FIELDS if n == name)
    }
    before, after = card(name, **context), card(name, **{**context, field: value})
    assert getattr(before, field) != value
    assert everything_about(before) != everything_about(after)


@pytest.mark.parametrize(("name", "field"), sorted(REFUSED))
def test_a_field_that_changes_nothing_is_refused(name, field):
    with pytest.raises(ValueError, match=f"{field} of {card_class(name).__name__}"):
        card(name, **{field: FLIPS[field][1]})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_same_fields_give_the_same_numbers(name):
    assert everything_about(card(name)) == everything_about(card(name))


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3+"])
def test_each_kl_estimator_is_another_loss(estimator):
    others = {"k2", "k3", "k3+"} - {estimator}
    this = everything_about(card("grpo", kl_coef=0.1, kl_estimator=estimator))
    assert all(this != everything_about(card("grpo", kl_coef=0.1, kl_estimator=o)) for o in others)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_each_scale_is_another_advantage(scale):
    others = {"group", "batch", "none"} - {scale}
    this = everything_about(card("cispo", scale=scale))
    assert all(this != everything_about(card("cispo", scale=o)) for o in others)


@pytest.mark.parametrize(("name", "field"), CARD_FIELDS)
def test_every_field_is_documented_where_it_is_declared(name, field):
    owner = next(c for c in card_class(name).__mro__ if field in inspect.get_annotations(c))
    body = ast.parse(inspect.getsource(owner)).body[0].body
    at = next(
        i for i, s in enumerate(body) if isinstance(s, ast.AnnAssign) and s.target.id == field
    )
    following = body[at + 1]
    assert isinstance(following, ast.Expr), f"{owner.__name__}.{field} has no docstring"
    assert isinstance(following.value, ast.Constant)
    assert len(following.value.value) > 10


@pytest.mark.parametrize("name", ALGORITHMS)
def test_cards_are_frozen_hashable_and_documented(name):
    algorithm = card(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        algorithm.group_size = 3
    assert hash(algorithm) == hash(card(name))
    module = importlib.import_module(type(algorithm).__module__)
    assert "arXiv:" in module.__doc__
    assert Path(module.__file__).name != "base.py"


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("grpo", {"group_size": 1}, "group_size of GRPO must be at least 2"),
        ("ppo", {"group_size": 0}, "group_size of PPO must be at least 1"),
        ("ppo", {"gamma": 1.5}, "gamma of PPO must be in"),
        ("ppo", {"lam": -0.1}, "lam of PPO must be in"),
        ("ppo", {"critic_lam": 2.0}, "critic_lam of PPO must be None, or in"),
        ("ppo", {"lam": math.nan}, "lam of PPO must be in"),
        ("ppo", {"lam_rule": "doubt"}, "lam of PPO must be below 1 when lam_rule is doubt"),
        ("vapo", {"lam": 0.95}, "lam of VAPO .* no effect; set lam_rule to fixed or doubt"),
        ("vapo", {"lam_alpha": 0.0}, "lam_alpha of VAPO must be finite and above 0"),
        ("ppo", {"lam_alpha": 1.0}, "lam_alpha of PPO .* no effect; set lam_rule to length"),
        (
            "ppo",
            {"lam_rule": "doubt", "lam": 0.9, "doubt_below": 1.0},
            "doubt_below of PPO must be between 0 and 1",
        ),
        ("ppo", {"doubt_below": 0.5}, "doubt_below of PPO .* no effect; set lam_rule to doubt"),
        ("a2c", {"advantage_clip": 0.0}, "advantage_clip of A2C must be None, or finite and"),
        ("ppo", {"rho_max": 2.0}, "rho_max of PPO .* no effect; set off_policy to vtrace"),
        ("ppo", {"c_max": 0.5}, "c_max of PPO .* no effect; set off_policy to vtrace"),
        ("ppo", {**STALE, "rho_max": 0.0}, "rho_max of PPO must be above 0"),
        ("ppo", {**STALE, "c_max": 2.0}, "c_max of PPO must be above 0 and at most rho_max, 1.0"),
        (
            "ppo",
            {**STALE, **CORRECTED},
            "off_policy of PPO must be none while mismatch is token_truncate",
        ),
        ("vapo", {"likelihood_coef": -0.1}, "likelihood_coef of VAPO must be finite and at least"),
        ("vapo", {"correct_above": math.inf}, "correct_above of VAPO must be finite"),
        (
            "vapo",
            {"likelihood_coef": 0.0, "correct_above": 0.9},
            "correct_above of VAPO .* no effect; set likelihood_coef above 0",
        ),
        ("safe", {"gate_coef": 0.0}, "gate_coef of SAFE must be finite and above 0"),
        ("safe", {"gate_threshold": -0.1}, "gate_threshold of SAFE must be finite and above 0"),
        ("safe", {"gate_bounds": (0.6, 0.1)}, "gate_bounds of SAFE must be .smallest, largest."),
        ("safe", {"gate_decay": 1.0}, "gate_decay of SAFE must be in"),
        ("safe", {"pid_gains": (math.nan, 0.0, 0.0)}, "pid_gains of SAFE must be three finite"),
        ("safe", {"phase_window": 0}, "phase_window of SAFE must be at least 1"),
        ("safe", {"converged_at": math.inf}, "converged_at of SAFE must be finite"),
        (
            "safe",
            {"gate": "asymmetric", "gate_decay": 0.5},
            "gate_decay of SAFE .* no effect; set gate to entropy",
        ),
        ("dapo_step", {"beta": 0.0}, "beta of DAPOStep must be finite and above 0"),
        ("rerank_distill", {"group_size": 1}, "group_size of RerankDistill must be at least 2"),
        ("rerank_distill", {"top_k": 0}, "top_k of RerankDistill must be at least 1"),
        ("rerank_distill", {"temperature": -1.0}, "temperature of RerankDistill must be finite"),
        ("rerank_distill", {"top_k": 1, "temperature": 0.5}, "no effect; set top_k above 1"),
        ("imitation", {"threshold": math.inf}, "threshold of Imitation must be finite"),
        ("imitation", {"weight": "exp", "beta": 0.0}, "beta of Imitation must be finite and above"),
        (
            "imitation",
            {"weight": "exp", "max_weight": 0.0},
            "max_weight of Imitation must be above",
        ),
        (
            "imitation",
            {"advantage_clip": 0.5},
            "advantage_clip of Imitation .* the clip changes no",
        ),
        ("imitation", {"beta": 0.5}, "beta of Imitation .* no effect; set weight to exp"),
        ("imitation", {"max_weight": 5.0}, "max_weight of Imitation .* set weight to exp"),
        (
            "imitation",
            {"weight": "exp", "threshold": 0.1},
            "threshold of Imitation .* no effect; set weight to positive",
        ),
        ("pacs", {"beta": 0.0}, "beta of PACS must be finite and above 0"),
        ("pacs", {"kl_coef": 0.1, "kl_placement": "reward"}, "kl_placement of PACS must be loss"),
        ("dapo_step", {"log_ratio_clamp": 0.0}, "log_ratio_clamp of DAPOStep must be above 0"),
        ("dapo_step", {"step_tokens": 0}, "step_tokens of DAPOStep must be at least 1"),
        ("dapo_step", {"step_token_ids": (-1,)}, "step_token_ids of DAPOStep must be ids of"),
        (
            "dapo_step",
            {"step_tokens": 4, "step_token_ids": (9,)},
            "step_tokens of DAPOStep .* no effect; leave step_token_ids empty",
        ),
        ("dapo_step", {"rollouts": ""}, "rollouts of DAPOStep must be the name of a file"),
        (
            "dapo_step",
            {"rollouts": "stored.parquet", "group_size": 4},
            "group_size of DAPOStep .* no effect; stored responses have the groups they have",
        ),
        (
            "genac",
            {"whiten_advantages": True, "center_advantages": False},
            "center_advantages of GenAC .* no effect; set whiten_advantages to false",
        ),
        ("sft", {"group_size": 4}, "group_size of SFT .* no effect; each completion is there once"),
        ("sft", {"mismatch": "token_mask"}, "mismatch of SFT .* there is only the likelihood"),
        ("sft", {"keep_above": 0.5}, "keep_above of SFT .* no effect; set rollouts to a file"),
        ("sft", {"mask_truncated": True}, "mask_truncated of SFT .* set rollouts to a file"),
        ("sft", {"completion_column": ""}, "completion_column of SFT must be the name of a column"),
        ("sft", {"rollouts": ""}, "rollouts of SFT must be the name of a file"),
        ("sft", {**STORED, "keep_above": math.nan}, "keep_above of SFT must be None, or finite"),
        ("sft", {**STORED, "append_end": False}, "append_end of SFT .* set rollouts to None"),
        ("sft", {**STORED, "completion_column": "a"}, "completion_column of SFT .* no effect"),
        ("sft", {"kl_coef": 0.1, "kl_placement": "reward"}, "kl_placement of SFT must be loss"),
        ("reinforce_pp", {"gamma": math.nan}, "gamma of ReinforcePP must be in"),
        ("grpo", {"clip_low": -0.1}, "clip_low of GRPO must be at least 0"),
        ("grpo", {"clip_high": math.nan}, "clip_high of GRPO must be at least 0"),
        ("grpo", {"dual_clip": 1.0}, "dual_clip of GRPO must be None, or above 1"),
        ("grpo", {"kl_coef": -0.1}, "kl_coef of GRPO must be finite and at least 0"),
        ("grpo", {"entropy_coef": math.inf}, "entropy_coef of GRPO must be finite"),
        ("grpo", {"scale_eps": 0.0}, "scale_eps of GRPO must be finite and above 0"),
        ("grpo", {"scale": "none", "scale_eps": 1e-4}, "scale_eps of GRPO .* no effect; set scale"),
        ("grpo", {"kl_estimator": "k2"}, "kl_estimator of GRPO .* no effect; set kl_coef above 0"),
        ("grpo", {"kl_placement": "reward"}, "kl_placement of GRPO .* no effect"),
        ("grpo", {"mismatch_high": 3.0}, "mismatch_high of GRPO .* no effect; set mismatch"),
        ("grpo", {"mismatch_low": 0.5}, "mismatch_low of GRPO .* no effect; set mismatch"),
        ("grpo", {**CORRECTED, "mismatch_low": 2.0}, "mismatch_low of GRPO must be None, or in"),
        ("grpo", {**CORRECTED, "mismatch_high": 0.0}, "mismatch_high of GRPO must be finite"),
        ("grpo", {"max_sampling_rounds": 5}, "max_sampling_rounds of GRPO .* set dynamic_sampling"),
        ("grpo", {"min_responses": 3}, "min_responses of GRPO .* set allocation to"),
        ("grpo", {"max_responses": 9}, "max_responses of GRPO .* set allocation to"),
        ("grpo", {**MIXED, "min_responses": 9}, "min_responses .* at most group_size, 8"),
        ("grpo", {**MIXED, "min_responses": 1}, "min_responses .* at least 2 and"),
        ("grpo", {**MIXED, "max_responses": 7}, "max_responses .* at least group_size, 8"),
        ("dapo", MIXED, "allocation of DAPO must be equal when dynamic_sampling is true"),
        ("dapo", {"max_sampling_rounds": 0}, "max_sampling_rounds of DAPO must be at least 1"),
        ("dapo", {"overlong_buffer_tokens": -1}, "overlong_buffer_tokens of DAPO must be"),
        ("dapo", {"overlong_penalty": 0.0}, "overlong_penalty of DAPO must be finite and above 0"),
        (
            "dapo",
            {"overlong_buffer_tokens": 0, "overlong_penalty": 2.0},
            "overlong_penalty .* no effect",
        ),
        ("cispo", {"cap_low": 1.2}, "cap_low of CISPO must be in"),
        ("cispo", {"cap_high": 0.28}, "cap_high of CISPO must be at least 1: it is a ratio"),
        (
            "ppo",
            {"mask_truncated": True, "on_truncation": "bootstrap"},
            "on_truncation of PPO .* no effect",
        ),
        ("ppo", {"kl_coef": 0.1, "kl_placement": "loss"}, "kl_estimator of PPO must be k2, k3"),
        (
            "ppo",
            {"kl_coef": 0.1, "kl_estimator": "k3+"},
            "kl_estimator of PPO must be k1, k2 or k3",
        ),
    ],
)
def test_a_card_refuses_what_makes_no_sense(name, fields, says):
    with pytest.raises(ValueError, match=says):
        card(name, **fields)


def test_a_choice_that_does_not_exist_is_named_with_those_that_do():
    # Past the type checker of the tests, as from a script.
    algorithm = object.__new__(card_class("ppo"))
    for field in dataclasses.fields(algorithm):
        object.__setattr__(algorithm, field.name, field.default)
    object.__setattr__(algorithm, "on_truncation", "boot")
    with pytest.raises(
        ValueError,
        match="on_truncation of PPO must be one of terminal, bootstrap, and it is 'boot'",
    ):
        algorithm.__post_init__()


def test_no_card_has_a_field_of_another():
    fields = {name: {f.name for f in dataclasses.fields(card_class(name))} for name in ALGORITHMS}
    assert not {"clip_low", "clip_high", "dual_clip"} & fields["cispo"]
    assert not {"gamma", "lam", "on_truncation"} & fields["grpo"]
    assert "scale" not in fields["dr_grpo"] | fields["rloo"] | fields["ppo"]
    assert "dynamic_sampling" not in fields["ppo"] | fields["reinforce_pp"]


def test_dynamic_sampling_asks_the_plan_for_informative_groups_only():
    sampling = SamplingParams(max_new_tokens=8)
    plan = card("dapo").plan(prompts_per_step=4, sampling=sampling)
    assert (plan.informative_only, plan.max_rounds, plan.group_size) == (True, 10, 16)
    assert plan.length_limit == 8
    assert not card("grpo").plan(prompts_per_step=4, sampling=sampling).informative_only


@pytest.mark.parametrize("allocation", ["failures", "mixed"])
def test_dividing_the_responses_asks_for_a_critic_of_prompts_and_not_for_values(allocation):
    algorithm = card("grpo", allocation=allocation, group_size=6)
    assert (algorithm.wanted_critic, algorithm.uses_values) == ("prompt_value", False)
    assert card("grpo").wanted_critic is None
    plan = algorithm.plan(prompts_per_step=4, sampling=SamplingParams(max_new_tokens=8))
    assert isinstance(plan, AsksPromptValues)
    assert (plan.utility, plan.min_responses, plan.max_responses) == (allocation, 2, 24)
    assert (plan.flat.group_size, plan.flat.prompts_per_step, plan.length_limit) == (6, 4, 8)


def test_a_buffer_beyond_the_length_limit_is_refused_when_the_plan_is_made():
    algorithm = card("dapo", overlong_buffer_tokens=8)
    with pytest.raises(
        ValueError, match="below the length limit of sampling, 8 tokens, and it is 8"
    ):
        algorithm.plan(prompts_per_step=4, sampling=SamplingParams(max_new_tokens=8))


def test_values_are_refused_where_nothing_would_read_them_and_asked_for_where_something_does(
    rollouts,
):
    with pytest.raises(
        ValueError, match="GRPO compares rewards and has no use for a critic's values"
    ):
        card("grpo").credit(rollouts, values_for(card("ppo"), rollouts))
    with pytest.raises(ValueError, match="PPO needs the values of a critic and got none"):
        card("ppo").credit(rollouts, None)


def test_a_missing_reference_or_entropy_is_named():
    rollouts = ragged(reference=False)
    with pytest.raises(
        ValueError,
        match=r"RLOO has a KL term .kl_coef is 0\.1., and the rollouts carry no ref_logprobs",
    ):
        card("rloo", kl_coef=0.1).credit(rollouts, None)
    grpo = card("grpo", kl_coef=0.1)
    with pytest.raises(ValueError, match="the rollouts carry no ref_logprobs"):
        grpo.policy_loss(moved(rollouts), rollouts, grpo.credit(rollouts, None))
    bonus = card("grpo", entropy_coef=0.1)
    with pytest.raises(ValueError, match=r"entropy_coef is 0\.1, so policy_loss needs the entropy"):
        bonus.policy_loss(moved(rollouts), rollouts, bonus.credit(rollouts, None))
