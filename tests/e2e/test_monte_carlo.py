"""Runs whose values are continuations: they resume bitwise, reuse what they sampled, and ranks stay in step."""

import importlib.util
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llmac.api import run as train
from llmac.config import load_recipe
from llmac.eval_critic import Truth, eval_critic

EVERYTHING = {
    "name": "monte_carlo",
    "continuations": 3,
    "standard_error": 0.22,
    "max_continuations": 6,
    "tokens_per_prompt": 90,
    "reuse": True,
}


@pytest.fixture
def settings(settings):
    """PPO with five tokens a response, fewer where a stop string comes first, two steps."""
    settings["algorithm"] = {"name": "ppo", "group_size": 2}
    settings["rollout"] |= {"max_new_tokens": 5, "stop": ["ab", "fe"]}
    settings["run"] |= {"steps": 2, "save_every": 1}
    return settings


@pytest.mark.slow
@pytest.mark.parametrize("critic", [{"name": "monte_carlo"}, EVERYTHING], ids=["plain", "all"])
def test_a_run_resumes_bitwise_and_counts_what_it_sampled(critic, settings, read_metrics, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    recipe = load_recipe(settings | {"critic": critic}, [f"run.output={straight}"])
    train(recipe)
    # As if it had been killed in the second step.
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "final")
    [last] = [folder for folder in (killed / "checkpoints").iterdir() if folder.name.endswith("2")]
    shutil.rmtree(last)
    train(load_recipe(settings | {"critic": critic}, [f"run.output={killed}"]))

    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (killed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = read_metrics(straight)
    assert read_metrics(killed) == lines
    for line in lines:
        assert (
            line["critic/states"] * (1 if critic is EVERYTHING else 9)
            <= line["critic/continuations"]
        )
        assert (
            line["rollout/sampled_tokens"] > line["rollout/tokens"] + line["critic/continuations"]
        )
        assert 0 < line["critic/standard_error"] < 0.35
        assert line["critic/states_merged"] > 0
        assert ("critic/states_withheld" in line) == (critic is EVERYTHING)
    found = eval_critic(straight, truth=Truth(states=24, depths=3, rollouts=6, siblings=2))
    assert abs(found.report.overall.scores["bias"].value) < 0.2


@pytest.mark.slow
def test_ranks_that_need_different_numbers_of_rounds_stay_in_step(
    settings, write_recipe, run, read_metrics
):
    recipe = write_recipe(settings | {"critic": EVERYTHING})
    code, printed = run(recipe, processes=2).finish()
    assert code == 0, printed
    assert [line["step"] for line in read_metrics(settings["run"]["output"])] == [1, 2]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_continues_states_as_the_policy_would(
    settings, vllm_home, write_recipe, run, read_metrics
):
    settings["model"] = {"name": str(vllm_home)}
    settings["rollout"]["engine"] = "vllm"
    code, printed = run(write_recipe(settings | {"critic": EVERYTHING})).finish()
    assert code == 0, printed
    for line in read_metrics(settings["run"]["output"]):
        assert line["critic/continuations"] > line["critic/states"]
        # Of reused continuations, too.
        assert line["actor/sampler_logprob_diff_max"] < 1e-3
