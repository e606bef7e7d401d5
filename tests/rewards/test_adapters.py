"""Functions written for verl and OpenRLHF, declared as such, run unchanged."""

import asyncio

import pytest
import torch

from llmac.errors import DataError, RewardError
from llmac.rewards.contracts import RewardSpec


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if data_source == "openai/gsm8k":
        return float(solution_str.rpartition("####")[2].strip() == ground_truth)
    raise NotImplementedError(data_source)


async def compute_score_later(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    await asyncio.sleep(0)
    right = solution_str == ground_truth
    return {"score": float(right), "acc": right, "pred": solution_str, "split": extra_info["split"]}


def reward_func(queries, prompts, labels, **kwargs):
    rewards = torch.tensor(
        [
            float(query.removeprefix(prompt) == label)
            for query, prompt, label in zip(queries, prompts, labels, strict=True)
        ]
    )
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"right": rewards}}


def test_a_verl_function_by_declaration(rewards, answered):
    score = rewards(RewardSpec(function=compute_score, name="verl", adapter="verl"))
    row = {"data_source": "openai/gsm8k", "ground_truth": "2"}
    assert [t.reward for t in score([answered("#### 2", **row), answered("#### 3", **row)])] == [
        1,
        0,
    ]


def test_an_async_verl_function_that_returns_a_dict(rewards, answered):
    score = rewards(RewardSpec(function=compute_score_later, adapter="verl"))
    row = {"ground_truth": "2", "extra_info": {"split": "train"}}
    assert [t.reward for t in score([answered("2", **row), answered("3", **row)])] == [1.0, 0.0]
    metrics = score.metrics()
    assert metrics["reward/compute_score_later/logged/acc"].value == 0.5
    assert "reward/compute_score_later/logged/pred" not in metrics  # text is no metric


def test_a_verl_function_needs_the_ground_truth(rewards):
    score = rewards(RewardSpec(function=compute_score_later, adapter="verl"))
    score.check_columns({"ground_truth"})  # the other columns may be missing
    with pytest.raises(
        DataError, match=r"requires the column 'ground_truth'.*ground_truth: <column>"
    ):
        score.check_columns({"answer"})


def test_a_verl_dict_without_score_is_an_error(rewards, answered):
    score = rewards(
        RewardSpec(
            function=lambda data_source, solution_str, ground_truth, extra_info: {"acc": 1.0},
            adapter="verl",
        )
    )
    with pytest.raises(RewardError, match=r"without 'score'; it has: acc, for prompt q/1"):
        score([answered("a", ground_truth="2", id_="q/1")])


def test_an_openrlhf_function_by_declaration(rewards, answered):
    score = rewards(RewardSpec(function=reward_func, name="exact", adapter="openrlhf"))
    score.check_columns({"label"})
    scored = score([answered("2", label="2"), answered("3", label="2"), answered("4", label="4")])
    assert [t.reward for t in scored] == [1.0, 0.0, 1.0]
    assert score.metrics()["reward/exact/logged/right"].value == pytest.approx(2 / 3)


def test_openrlhf_prompts_are_what_the_model_saw(rewards, answered, tokenizer):
    seen = {}

    def look(queries, prompts, labels):
        seen.update(queries=queries, prompts=prompts)
        return torch.zeros(len(queries), 1)  # a column, as some functions return

    score = rewards(RewardSpec(function=look, adapter="openrlhf"))
    assert score([answered("yes", prompt="<eos>Well?", label=None)])[0].reward == 0.0
    assert seen == {"prompts": ["<eos>Well?"], "queries": ["<eos>Well?yes"]}


def test_openrlhf_rewards_of_the_wrong_number_are_an_error(rewards, answered):
    score = rewards(
        RewardSpec(
            function=lambda queries, prompts, labels: torch.ones(3), name="f", adapter="openrlhf"
        )
    )
    with pytest.raises(RewardError, match="f returned 3 rewards for 1 completions"):
        score([answered("a", label="")])
