"""Training from Python and from a shell, with the real parts: it learns, and leaves what it promises."""

import json

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmac
from llmac.errors import CheckpointError, ConfigError, DataError, RewardError
from llmac.models.value_model import ValueModel

ALWAYS = {
    "reward/mean",
    "response_length/mean",
    "response_length/clip_ratio",
    "actor/entropy",
    "actor/sampler_kl",
    "actor/grad_norm",
    "timing_s/gen",
    "timing_s/update_actor",
    "perf/throughput",
}


def sections(settings, **changes):
    settings = {**settings, **changes}
    model, data, run = settings.pop("model"), settings.pop("data"), dict(settings.pop("run"))
    return {
        "model": model.pop("name"),
        "model_options": model,
        "dataset": data["name"],
        "steps": run.pop("steps"),
        "output": run.pop("output"),
        "run": run,
        **settings,
    }


def test_five_lines_of_python_train_a_policy(home, tmp_path):
    def wanted_letter(prompt, response, wanted):
        return response.count(wanted) / max(len(response), 1)

    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    result = llmac.train(
        home / "model",
        algorithm="grpo",
        reward=wanted_letter,
        dataset=rows,
        steps=30,
        output=tmp_path / "run",
        actor={"lr": 1e-2, "prompts_per_step": 16},
        rollout={"max_new_tokens": 6},
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/mean"] for line in lines]
    # A random policy's letters are right one time in nine or so.
    assert sum(rewards[:3]) / 3 < 0.2
    assert sum(rewards[-3:]) / 3 > 0.3
    assert lines[0].keys() >= ALWAYS
    model = AutoModelForCausalLM.from_pretrained(result.model)
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    answer = model.generate(
        **tokenizer("ab=", return_tensors="pt"), max_new_tokens=4, do_sample=False
    )
    assert answer.shape[1] > 3
    assert result.metrics["reward/mean"] == rewards[-1]
    assert (tmp_path / "run/learning_curve.png").stat().st_size > 10_000
    assert (tmp_path / "run/config.yaml").is_file()


def test_ppo_leaves_a_critic_beside_the_policy(settings):
    settings["algorithm"] = {"name": "ppo", "group_size": 2}
    result = llmac.train(**sections(settings), critic={"lr": 1e-3})
    critic = ValueModel.from_pretrained(result.model / "critic")
    assert float(critic.head.weight.detach().abs().sum()) > 0
    first = json.loads((result.output / "metrics.jsonl").read_text().splitlines()[0])
    assert first["critic/vf_explained_var"] == pytest.approx(0.0, abs=1e-5)


def test_lora_trains_adapters_and_leaves_a_merged_model(settings, home):
    settings["model"] |= {"lora": {"r": 4, "alpha": 8}}
    settings["algorithm"] = {"name": "ppo", "group_size": 2, "kl_coef": 0.05}
    result = llmac.train(**sections(settings), critic={"lora": True, "lr": 1e-3})
    base = AutoModelForCausalLM.from_pretrained(home / "model").state_dict()
    merged = AutoModelForCausalLM.from_pretrained(result.model).state_dict()
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all("proj" in name for name in changed)
    assert (result.model / "adapter/adapter_model.safetensors").stat().st_size > 1000
    assert result.metrics["actor/sampler_logprob_diff_max"] < 1e-3


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}])
@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_the_reference_is_the_policy_as_it_started(settings, lora, placement):
    settings["model"] |= {"lora": lora} if lora else {}
    settings["actor"] |= {"minibatches": 1, "lr": 1e-2}
    settings["algorithm"] |= {"kl_coef": 0.1, "kl_placement": placement, "kl_estimator": "k2"}
    result = llmac.train(**sections(settings))
    lines = (result.output / "metrics.jsonl").read_text().splitlines()
    kl = [json.loads(line)["actor/ref_kl"] for line in lines]
    assert kl[0] == pytest.approx(0.0, abs=1e-9)  # nothing has been learned yet
    assert kl[-1] > 1e-6


def test_the_table_of_completions_shows_prompts_rewards_and_advantages(settings):
    settings["run"] |= {"log_completions_every": 2}
    result = llmac.train(**sections(settings))
    files = sorted(p.name for p in (result.output / "completions").iterdir())
    assert files == ["step_000002.parquet", "step_000004.parquet"]
    table = pyarrow.parquet.read_table(result.output / "completions" / files[0]).to_pylist()
    assert len(table) == 16
    assert {row["prompt"] for row in table} <= {a + b + "=" for a in "abcdef" for b in "abcdef"}
    assert sum(row["advantage"] or 0.0 for row in table) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}])
@pytest.mark.parametrize("detach", [True, False])
def test_a_critic_on_the_policys_trunk_is_saved_with_that_trunk(settings, detach, lora):
    settings["model"] |= {"lora": lora} if lora else {}
    settings["algorithm"] = {"name": "ppo", "group_size": 2}
    critic = {"lr": 1e-2, "trunk": "shared", "detach_trunk": detach}
    result = llmac.train(**sections(settings), critic=critic)
    saved = ValueModel.from_pretrained(result.model / "critic")
    policy = AutoModelForCausalLM.from_pretrained(result.model).base_model.state_dict()
    assert all(torch.equal(policy[name], w) for name, w in saved.backbone.state_dict().items())
    assert float(saved.head.weight.detach().abs().sum()) > 0


@pytest.mark.parametrize(
    "large", [{"gradient_checkpointing": True}, {"compute_dtype": "bfloat16"}], ids=str
)
def test_the_settings_of_large_models_train_small_ones(settings, large):
    settings["model"] |= large
    settings["algorithm"] = {"name": "ppo", "group_size": 4}
    result = llmac.train(**sections(settings), critic={"lr": 1e-3})
    assert result.metrics["actor/grad_norm"] > 0
    assert result.metrics["actor/sampler_logprob_diff_mean"] < 0.05


def test_another_reward_or_other_rows_do_not_continue_a_run(settings, home):
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    changed = {**sections(settings), "dataset": rows}
    llmac.train(**changed)
    with pytest.raises(CheckpointError, match="content"):
        llmac.train(**{**changed, "dataset": rows[::-1], "steps": 6})

    def harsher(prompt, response, wanted):
        return -1.0

    with pytest.raises(CheckpointError, match="configuration"):
        llmac.train(**{**changed, "reward": harsher, "steps": 6})


def test_a_reward_that_raises_stops_the_run_with_the_prompt(settings, tmp_path):
    def broken(prompt, response):
        raise KeyError("no such answer")

    settings.pop("reward")
    with pytest.raises(RewardError, match=r"broken raised KeyError.*prompt train/train/\d+"):
        llmac.train(**sections(settings), reward=broken)
    assert not (tmp_path / "run/final").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"actor": {"prompts_per_step": 5, "minibatches": 2}},
            ConfigError,
            r"prompts_per_step.*found 5 and 2",
        ),
        ({"actor": {"learning_rate": 1e-3}}, ConfigError, r"learning_rate.*lr"),
        ({"rollout": {"max_new_tokens": 400}}, DataError, r"32"),
        ({"reward": "nowhere.py:reward"}, ConfigError, r"nowhere\.py"),
        ({"algorithm": {"name": "gppo"}}, ConfigError, r"Did you mean"),
        ({"critic": {"lr": 1.0}}, ConfigError, r"grpo uses no critic"),
        ({"rollout": {"top_p": 0.9}}, ConfigError, r"top_p"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(settings, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        llmac.train(**sections(settings, **change))
    assert not (tmp_path / "run/metrics.jsonl").exists()
