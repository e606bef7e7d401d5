"""Runs whose critic writes: they resume bitwise, ranks stay in step, and both ways to have an engine say the same."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llmac.api import run as train
from llmac.config import load_recipe
from llmac.eval_critic import Truth, eval_critic

from .conftest import character_tokenizer

SCORES = [f"<answer>{n}</answer>" for n in (0, 5, 10)]


@pytest.fixture(scope="module")
def talkative(home, tmp_path_factory):
    """The tiny model with heads that vLLM has kernels for, and three words more: scores."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(SCORES)
    config = Qwen2Config.from_pretrained(home / "model")
    config.hidden_size, config.num_attention_heads = 64, 2
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 64
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "critic.jinja").write_text("{{ problem }}{{ partial }}={{ 'a' if success_rate }}")
    return folder


@pytest.fixture
def settings(settings, talkative):
    """PPO with six tokens a response, asked about at every second, two steps."""
    settings["model"] = {"name": str(talkative)}
    every_two = {"segmenter": "every_n", "segment_tokens": 2}
    settings["algorithm"] = {"name": "ppo", "group_size": 2, **every_two}
    settings["rollout"] |= {"max_new_tokens": 6}
    learning = {"max_new_tokens": 4, "lr": 1e-3, "baseline": "leave_one_out"}
    template = str(talkative / "critic.jinja")
    settings["critic"] = {"name": "generative", "template": template, **learning}
    settings["run"] |= {"steps": 2, "save_every": 1}
    return settings


def ours_are_theirs(ours, theirs):
    for file in ("final/model.safetensors", "final/critic/model.safetensors"):
        mine, others = load_file(ours / file), load_file(theirs / file)
        assert all(torch.equal(mine[name], others[name]) for name in others), file


def without_engines(lines):
    return [{k: v for k, v in line.items() if "prefix_hit" not in k} for line in lines]


@pytest.mark.slow
def test_a_run_resumes_bitwise_and_both_engines_say_the_same(settings, read_metrics, tmp_path):
    straight, killed, shared = (tmp_path / name for name in ("straight", "killed", "shared"))
    train(load_recipe(settings, [f"run.output={straight}"]))
    # As if it had been killed in the second step.
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "final")
    [last] = [folder for folder in (killed / "checkpoints").iterdir() if folder.name.endswith("2")]
    shutil.rmtree(last)
    train(load_recipe(settings, [f"run.output={killed}"]))
    ours_are_theirs(killed, straight)
    lines = read_metrics(straight)
    assert read_metrics(killed) == lines

    train(load_recipe(settings, [f"run.output={shared}", "critic.engine=shared"]))
    ours_are_theirs(shared, straight)
    assert without_engines(read_metrics(shared)) == without_engines(lines)
    for line in lines:
        assert 0 < line["critic/unparsed"] < 1
        assert line["critic/states_merged"] > 0
        assert line["critic/values/mean"] > 0
        assert line["critic/grad_norm"] > 0
        assert 0 < line["critic/brier"] < 1
        assert line["critic/lm/ratio_max"] < 1.001
        assert line["critic/lm/sampler_logprob_diff_max"] < 1e-4
        assert line["rollout/sampled_tokens"] > line["rollout/tokens"] + line["critic/states"]

    # The folder it leaves is a model, a critic to start from, and one to be examined.
    folder = straight / "final" / "critic"
    AutoModelForCausalLM.from_pretrained(folder)
    kept = json.loads((folder / "generative_critic.json").read_text())
    assert kept["context"]["success_rate"] == pytest.approx(lines[1]["critic/success_rate"])
    truth = Truth(states=12, depths=3, rollouts=4, siblings=2)
    of_run = eval_critic(straight, truth=truth, save_states=tmp_path / "s.npz", step="final")
    states = tmp_path / "s.npz"
    of_folder = eval_critic(straight, critic=str(folder), states_from=states, step="final")
    by_name = f"{{name: generative, init: {folder}, max_new_tokens: 4}}"
    of_name = eval_critic(straight, critic=by_name, states_from=states, step="final")
    assert of_run.report.values == of_folder.report.values == of_name.report.values
    assert len(set(of_run.report.values)) > 1


@pytest.mark.slow
def test_ranks_stay_in_step(settings, write_recipe, run, read_metrics):
    settings["critic"] |= {"conditioning": "both", "samples": 2}
    code, printed = run(write_recipe(settings), processes=2).finish()
    assert code == 0, printed
    lines = read_metrics(settings["run"]["output"])
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["critic/grad_norm"] > 0 for line in lines)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("engine", ["own", "shared"])
def test_vllm_writes_as_the_critic_would(engine, settings, write_recipe, run, read_metrics):
    settings["rollout"]["engine"] = "vllm"
    settings["critic"]["engine"] = engine
    code, printed = run(write_recipe(settings)).finish()
    assert code == 0, printed
    for line in read_metrics(settings["run"]["output"]):
        assert 0 < line["critic/unparsed"] < 1
        assert line["critic/lm/sampler_logprob_diff_max"] < 1e-3
        assert line["actor/sampler_logprob_diff_max"] < 1e-3
