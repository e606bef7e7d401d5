"""A mistake gives one clear error and exit code 1, before training where possible, and overwrites nothing."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

from llmac.api import run as train
from llmac.config import load_recipe
from llmac.errors import CheckpointError, ConfigError, DataError, RewardError

WRONG_REWARDS = {
    "raises": "raise ZeroDivisionError('no digits')",
    "nan": "return [float('nan')] * len(completions)",
    "infinite": "return [float('inf')] * len(completions)",
    "text": "return ['good'] * len(completions)",
    "one_short": "return [1.0] * (len(completions) - 1)",
    "one_for_all": "return 1.0",
    "nothing": "pass",
}


@pytest.fixture
def wrong_reward(tmp_path):
    """A file with a reward function of the given body."""

    def write(body):
        path = tmp_path / "wrong.py"
        path.write_text(f"def judge(completions, **kwargs):\n    {body}\n")
        return f"{path}:judge"

    return write


@pytest.fixture
def copied_model(home, tmp_path):
    """A copy of the tiny model whose files a test may spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (home / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def assert_refused(settings, error, message, tmp_path):
    """The run stops with this error, in one message, and nothing of a run is on disk."""
    with pytest.raises(error, match=message) as caught:
        train(load_recipe(settings))
    assert len(str(caught.value)) < 1500
    output = tmp_path / "run"
    assert not (output / "metrics.jsonl").exists()
    assert not (output / "final").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("actor", {"learning_rate": 1e-3}, r"actor\.learning_rate.*lr"),
        ("model", {"dtype": "float16"}, r"model\.dtype.*float32.*bfloat16"),
        ("actor", {"lr": "fast"}, r"actor\.lr must be a number.*fast"),
        ("actor", {"lr": -1.0}, r"actor\.lr must be a number above 0, found -1"),
        ("run", {"steps": 1.5}, r"run\.steps must be a whole number.*1\.5"),
        ("run", {"steps": True}, r"run\.steps must be a whole number.*true"),
        ("data", {"limit": "ten"}, r"data\.limit.*'ten'"),
        ("algorithm", {"lam": 0.9}, r"algorithm\.lam.*grpo"),
        ("algorithm", {"group_size": 1}, r"group_size"),
        ("rollout", {"stop": "END"}, r"rollout\.stop"),
        ("run", {"output": ""}, r"run\.output is empty"),
    ],
)
def test_a_wrong_key_or_type_names_the_key_and_what_was_found(
    section, change, message, settings, tmp_path
):
    settings[section] = {**settings[section], **change}
    assert_refused(settings, ConfigError, message, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", r"empty is empty|dataset empty/train is empty"),
        ("broken.jsonl", '{"prompt": "ab="\n', r"broken\.jsonl, line 1: not JSON"),
        ("rows.jsonl", "[1, 2]\n", r"rows\.jsonl, line 1: a row is an object"),
        ("rows.parquet", "not parquet", r"rows\.parquet cannot be read"),
        ("rows.txt", "ab=", r"rows\.txt is not a dataset file"),
        ("rows.jsonl", '{"text": "ab="}\n', r"no column that is known to be a prompt"),
        ("rows.jsonl", '{"prompt": "ab="}\n', r"wanted"),
        ("rows.jsonl", '{"prompt": null, "wanted": "a"}\n', r"prompt of rows/train/0 is empty"),
        ("rows.jsonl", '{"prompt": "", "wanted": "a"}\n', r"rows/train/0 has no tokens"),
    ],
)
def test_an_unusable_dataset_is_refused_by_name(name, content, message, settings, tmp_path):
    (tmp_path / name).write_text(content)
    settings["data"] = {"name": str(tmp_path / name)}
    assert_refused(settings, DataError, message, tmp_path)


def test_a_dataset_that_is_not_there_is_refused_with_the_nearest_name(settings, home, tmp_path):
    settings["data"] = {"name": str(home / "trian.jsonl")}
    assert_refused(
        settings, ConfigError, r"no file or folder .*trian\.jsonl.*train\.jsonl", tmp_path
    )


def test_a_missing_column_of_the_held_out_set_is_found_before_training(settings, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "ab="}\n')
    settings["evaluation"] = {"data": {"name": str(held_out)}}
    assert_refused(settings, DataError, "wanted", tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raises", r"judge raised ZeroDivisionError: no digits.*prompts? train/train/\d+"),
        ("nan", r"judge returned nan for prompt train/train/\d+"),
        ("infinite", r"judge returned inf for prompt train/train/\d+"),
        ("text", r"judge returned 'good' \(a str\) for prompt train/train/\d+"),
        ("one_short", r"judge returned 15 rewards for 16 completions"),
        ("one_for_all", r"judge returned 1\.0 \(a float\).*list of 16 numbers"),
        ("nothing", r"judge returned None.*list of 16 numbers"),
    ],
)
def test_a_reward_that_is_none_stops_the_run_and_names_function_and_prompt(
    body, message, settings, wrong_reward, tmp_path
):
    settings["reward"] = wrong_reward(WRONG_REWARDS[body])
    assert_refused(settings, RewardError, message, tmp_path)


def test_a_chat_template_is_missed_before_training(settings, tmp_path):
    settings["data"] = {**settings["data"], "chat": "always"}
    assert_refused(settings, ConfigError, "tokenizer has no chat template", tmp_path)
    messages = [{"role": "user", "content": "ab="}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": messages, "wanted": "a"}))
    settings["data"] = {"name": str(rows)}
    assert_refused(
        settings, ConfigError, "list of chat messages, but the tokenizer has no", tmp_path
    )


def test_a_prompt_longer_than_the_model_is_refused_or_left_out(settings, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "a" * n, "wanted": "a"}) for n in (3, 24, 25)]
    rows.write_text("\n".join(lines))
    settings["data"] = {"name": str(rows)}
    assert_refused(settings, DataError, r"prompt rows/train/2 has 25 tokens; at most 24", tmp_path)
    settings["data"]["on_too_long"] = "skip"
    train(load_recipe(settings))


def test_room_for_the_held_out_responses_is_checked_before_training(settings, tmp_path):
    settings["evaluation"] = {"data": settings["data"], "max_new_tokens": 30, "at_start": False}
    assert_refused(settings, DataError, r"at most 2 are allowed", tmp_path)


def test_a_file_where_the_output_folder_should_be_is_kept(settings, tmp_path):
    (tmp_path / "file").write_text("precious")
    for output in ("file", "file/run"):
        settings["run"]["output"] = str(tmp_path / output)
        assert_refused(settings, ConfigError, r"cannot be made, because .*file is a file", tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("precious")
    settings["run"]["output"] = str(tmp_path / "run")
    assert_refused(settings, CheckpointError, r"run/checkpoints", tmp_path)
    assert (tmp_path / "run/checkpoints").read_text() == "precious"


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_run_directory_of_another_configuration_is_left_alone(settings, tmp_path, checkpoints):
    """Without checkpoints, as after a kill before the first one, there still is its record."""
    train(load_recipe(settings))
    if not checkpoints:
        for folder in (tmp_path / "run/checkpoints").glob("step-*"):
            for file in sorted(folder.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            folder.rmdir()
    before = files_of(tmp_path / "run")
    settings["algorithm"]["group_size"] = 2
    differs = r"algorithm\.group_size is \d there and 2 here\. Nothing"
    with pytest.raises(CheckpointError, match=f"another configuration.*{differs}.*another run"):
        train(load_recipe(settings))
    assert files_of(tmp_path / "run") == before


def test_resume_never_and_must_are_refused_before_anything_is_written(settings, tmp_path):
    settings["run"]["resume"] = "must"
    assert_refused(settings, CheckpointError, r"run\.resume is must", tmp_path)
    settings["run"]["resume"] = "auto"
    train(load_recipe(settings))
    before = files_of(tmp_path / "run")
    settings["run"]["resume"] = "never"
    with pytest.raises(CheckpointError, match=r"run\.resume is never"):
        train(load_recipe(settings))
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("missing_folder", r"model\.name.*no folder"),
        ("no_weights", r"model\.name.*model"),
        ("torn_weights", r"model\.name.*model"),
        ("no_layer", r"model\.name.*lacks.*layers\.1\.mlp\.up_proj\.weight"),
        ("other_kind", r"model\.name"),
        ("no_tokenizer", r"model\.tokenizer"),
    ],
)
def test_a_model_that_cannot_be_loaded_whole_is_refused(
    spoil, message, settings, copied_model, tmp_path
):
    weights = copied_model / "model.safetensors"
    if spoil == "missing_folder":
        copied_model = copied_model / "nowhere"
    elif spoil == "no_weights":
        weights.unlink()
    elif spoil == "torn_weights":
        weights.write_bytes(weights.read_bytes()[:500])
    elif spoil == "no_layer":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif spoil == "other_kind":
        (copied_model / "config.json").write_text('{"model_type": "vit"}')
    else:
        for file in copied_model.glob("tokenizer*"):
            file.unlink()
    settings["model"] = {"name": str(copied_model)}
    assert_refused(settings, ConfigError, message, tmp_path)


def test_adapters_for_layers_that_are_not_there_are_refused(settings, tmp_path):
    settings["model"] |= {"lora": {"target_modules": ["query"]}}
    assert_refused(settings, ConfigError, r"target_modules.*query.*q_proj, up_proj", tmp_path)


def test_a_critic_that_is_not_there_is_refused_under_its_own_key(settings, home, tmp_path):
    settings["algorithm"] = {"name": "ppo"}
    settings["critic"] = {"init": str(home / "nowhere")}
    assert_refused(settings, ConfigError, r"critic\.init: there is no", tmp_path)


def test_a_policy_that_never_learns_is_announced(settings, caplog):
    settings["algorithm"] = {"name": "ppo", "group_size": 2}
    settings["run"] |= {"steps": 1, "critic_warmup_steps": 1}
    train(load_recipe(settings))
    assert "run.critic_warmup_steps is 1 and run.steps is 1: the policy does not" in caplog.text


def test_the_home_directory_is_where_the_shell_has_it(settings, monkeypatch, tmp_path):
    """In `run.output=~/run` the shell leaves the ~ alone; a folder called ~ is never meant."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings["run"] |= {"output": "~/run"}
    assert load_recipe(settings).run.output == str(tmp_path / "run")


def test_a_classifier_is_not_taken_for_a_language_model(settings, copied_model, tmp_path):
    config = Qwen2Config.from_pretrained(copied_model)
    config.num_labels, config.tie_word_embeddings = 1, False
    torch.manual_seed(0)
    Qwen2ForSequenceClassification(config).save_pretrained(copied_model)
    settings["model"] = {"name": str(copied_model)}
    assert_refused(settings, ConfigError, r"model\.name.*lacks.*lm_head\.weight", tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(settings, copied_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(copied_model)
    tokenizer.add_tokens(["!"])
    tokenizer.save_pretrained(copied_model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "ab!", "wanted": "a"}')
    settings["model"] = {"name": str(copied_model)}
    settings["data"] = {"name": str(rows)}
    assert_refused(
        settings, ConfigError, r"prompts have token \d+, and the model has 9 tokens", tmp_path
    )


def test_a_language_model_is_not_taken_for_a_reward_model(settings, home, tmp_path):
    settings["reward"] = {"functions": [{"model": str(home / "model")}]}
    assert_refused(settings, ConfigError, r"not a trained reward model|has 2 outputs", tmp_path)


def test_a_tracker_that_is_not_there_is_refused(settings, tmp_path):
    settings["run"]["trackers"] = ["tensorbored"]
    assert_refused(settings, ConfigError, r"run\.trackers.*tensorbored", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("actor.learning_rate=1e-3", "ConfigError: actor.learning_rate"),
        ("run.steps=many", "ConfigError: run.steps"),
        ("data.name={tmp_path}/empty.jsonl", "DataError: the dataset empty/train is empty"),
        ("reward={tmp_path}/wrong.py:judge", "RewardError: reward function judge returned nan"),
        ("run.output={tmp_path}/empty.jsonl", "ConfigError: run.output"),
        ("data.chat=always", "ConfigError: data.chat is always"),
    ],
)
def test_the_shell_gets_one_message_and_exit_code_1(
    override, named, settings, write_recipe, run, wrong_reward, tmp_path
):
    (tmp_path / "empty.jsonl").write_text("")
    wrong_reward(WRONG_REWARDS["nan"])
    code, printed = run(write_recipe(settings), override.format(tmp_path=tmp_path)).finish()
    assert code == 1
    assert "Traceback" not in printed
    assert len(re.findall(r"Error: ", printed)) == 1, printed
    assert named in printed
