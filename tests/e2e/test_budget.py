"""A run whose critic says what prompts are worth, and whose plan divides the responses by it."""

import copy
import json

import pyarrow.parquet
import pytest
from safetensors.torch import load_file

import llmac
from llmac.errors import ConfigError

from .test_train import sections


def lines_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def group_sizes(output, step):
    table = pyarrow.parquet.read_table(output / f"completions/step_{step:06d}.parquet")
    groups = table.column("group").to_pylist()
    return [groups.count(group) for group in sorted(set(groups))]


@pytest.fixture
def divided(settings):
    settings["algorithm"] = {"name": "grpo", "group_size": 4, "allocation": "failures"}
    settings["actor"] = {"lr": 3e-3, "prompts_per_step": 12, "minibatches": 2}
    settings["run"] |= {"steps": 4, "log_completions_every": 1}
    return settings


@pytest.mark.slow
def test_groups_of_different_sizes_reach_the_learner(divided, tmp_path):
    llmac.train(**sections(divided))
    lines = lines_of(tmp_path / "run")
    first, *later = (group_sizes(tmp_path / "run", step) for step in (1, 2, 3, 4))
    assert first == [4] * 12  # nothing is known yet
    for sizes in later:
        assert sum(sizes) == 48
        assert 2 <= min(sizes) < max(sizes) <= 16
    assert [line["rollout/group_size_max"] for line in lines] == [
        max(sizes) for sizes in (first, *later)
    ]
    assert lines[-1]["rollout/budget_gain"] > 1
    assert "critic/prompt_auc" in lines[-1]
    assert lines[-1]["actor/grad_norm"] > 0
    assert "critic/vf_explained_var" not in lines[-1]  # the critic serves the plan, not the card


@pytest.mark.slow
@pytest.mark.parametrize("critic", [{"name": "prompt_value", "learner": "transformer"}])
def test_a_killed_run_divides_as_if_it_had_not_been(divided, critic, tmp_path):
    divided["critic"] = critic
    llmac.train(**sections(copy.deepcopy(divided)))
    expected = [group_sizes(tmp_path / "run", step) for step in (3, 4)]
    half = tmp_path / "half"
    for steps in (2, 4):
        divided["run"] |= {"output": str(half), "steps": steps}
        llmac.train(**sections(copy.deepcopy(divided)))
    assert [group_sizes(half, step) for step in (3, 4)] == expected
    assert expected[0] != expected[1]


@pytest.mark.slow
def test_two_processes_know_the_same_prompts(divided, write_recipe, run, tmp_path):
    divided["critic"] = {"name": "prompt_value", "learner": "transformer"}
    divided["run"]["steps"] = 2
    code, printed = run(write_recipe(divided), processes=2).finish()
    assert code == 0, printed
    record = load_file(tmp_path / "run/final/critic/prompt_record.safetensors")
    assert record["steps"].tolist()[:24] == [1] * 12 + [2] * 12  # of both, in every step
    assert record["responses"][:24].sum() == 2 * 48
    # Each process divides its own half; rank 0 keeps a table of it.
    assert sum(group_sizes(tmp_path / "run", 2)) == 24


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["group_mean", "leave_one_out", "running_mean", "prompt_value"])
def test_ppo_takes_what_prompts_are_worth_as_its_baseline(settings, critic, tmp_path):
    settings["algorithm"] = {"name": "ppo", "group_size": 4}
    settings["critic"] = critic
    llmac.train(**sections(settings))
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 4
    assert all("critic/values/mean" in line for line in lines)
    if critic in ("running_mean", "prompt_value"):
        assert "critic/prompt_explained_var" in lines[-1]


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"name": "dapo", "allocation": "mixed"}, "must be equal when dynamic_sampling is true"),
        ({"name": "grpo", "allocation": "best"}, "allocation .grpo. must be"),
        ({"name": "grpo", "min_responses": 3}, "set allocation to failures or mixed"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, algorithm, message):
    with pytest.raises(ConfigError, match=message):
        llmac.train(**sections(settings, algorithm=algorithm))
