"""The command line on the shipped recipes, and those recipes themselves, made small by overrides only."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from llmac.cli import main
from llmac.models.value_model import ValueModel

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def bytes_home(tmp_path_factory, pytestconfig):
    """`model/` and `judge/`, random and one token a byte; `gsm8k/` and `chats/` with files for each split."""
    home = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", "<pad>", *alphabet])}
    text = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text, pad_token="<pad>", eos_token="<|endoftext|>", chat_template=CHAT
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=0,
    )
    for name, kind in (("model", Qwen2ForCausalLM), ("judge", Qwen2ForSequenceClassification)):
        config.num_labels = 1
        kind(config).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    (home / "gsm8k").mkdir()
    (home / "chats").mkdir()
    for split in ("train", "test"):
        rows = pytestconfig.rootpath / f"tests/data/gsm8k_{split}.jsonl"
        shutil.copy(rows, home / f"gsm8k/{split}.jsonl")
        questions = [json.loads(line)["question"] for line in rows.read_text().splitlines()]
        chats = [{"prompt": [{"role": "user", "content": question}]} for question in questions]
        (home / f"chats/{split}.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return home


def small(home, data, output):
    """What makes a shipped recipe run here: local names and small numbers, nothing else."""
    return [
        f"model.name={home / 'model'}",
        f"data.name={home / data}",
        f"evaluation.data.name={home / data}",
        "evaluation.data.limit=4",
        "rollout.engine=hf",
        "rollout.max_new_tokens=16",
        "algorithm.group_size=2",
        "actor.prompts_per_step=8",
        "run.steps=2",
        "run.save_every=2",
        f"run.output={output}",
    ]


@pytest.mark.parametrize("recipe", ["gsm8k_ppo", "gsm8k_grpo", "rlhf_ppo", "quickstart_ppo"])
def test_show_explains_every_key_of_a_shipped_recipe(recipe, capsys, monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    assert main(["show", f"recipes/{recipe}.yaml", "actor.lr=7e-6"]) == 0
    printed = capsys.readouterr().out
    (lr,) = [line for line in printed.splitlines() if line.strip().startswith("lr: 7.0e-06")]
    assert "override" in lr
    values = [line for line in printed.splitlines() if ": " in line.partition("#")[0]]
    assert all("#" in line for line in values), "a key without a word about it"
    assert ("critic:" in printed) == recipe.endswith("ppo") or "critic: null" in printed


@pytest.mark.parametrize("recipe", ["gsm8k_ppo", "gsm8k_grpo", "rlhf_ppo"])
def test_check_of_a_hub_recipe_asks_nobody_and_says_what_it_did_not_see(
    recipe, capsys, monkeypatch, pytestconfig
):
    monkeypatch.chdir(pytestconfig.rootpath)
    assert main(["check", f"recipes/{recipe}.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "not checked" in printed
    assert "wrong" not in printed


def test_check_of_local_names_shows_the_first_prompt(
    bytes_home, capsys, monkeypatch, pytestconfig, tmp_path
):
    monkeypatch.chdir(pytestconfig.rootpath)
    overrides = ["data.subset=null", "evaluation.data.subset=null"]
    overrides += small(bytes_home, "gsm8k", tmp_path / "run")
    assert main(["check", "recipes/gsm8k_ppo.yaml", *overrides]) == 0
    printed = capsys.readouterr().out
    assert "Question: Natalia sold clips to 48 of her friends" in printed
    assert "4 prompts" in printed
    assert not (tmp_path / "run").exists(), "checking leaves no trace"


def test_check_finds_what_training_would_stumble_over(bytes_home, capsys, monkeypatch, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(
        f"model: {{name: {bytes_home / 'model'}}}\n"
        f"data: {{name: {bytes_home / 'chats'}}}\n"
        "reward: reward_fns/gsm8k.py:reward\n"  # asks for the column answer
        "algorithm: grpo\n"
        "rollout: {max_new_tokens: 100}\n"
        f"run: {{steps: 1, output: {tmp_path / 'run'}}}\n"
    )
    assert main(["check", str(broken)]) == 1
    printed = capsys.readouterr()
    assert "answer" in printed.out
    assert "error: 1 of the above must be put right" in printed.err


def test_algorithms_lists_every_card_with_its_sentence(capsys):
    assert main(["algorithms"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in lines}
    assert {"ppo", "grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo", "value_head"} <= names
    assert all(len(line.split()) > 3 for line in lines if line.startswith("  "))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_gsm8k_recipes_run_here_by_override(
    algorithm, bytes_home, run, read_metrics, pytestconfig, tmp_path
):
    recipe = pytestconfig.rootpath / f"recipes/gsm8k_{algorithm}.yaml"
    overrides = ["data.subset=null", "evaluation.data.subset=null"]
    overrides += ["run.critic_warmup_steps=1"] * (algorithm == "ppo")
    code, printed = run(recipe, *overrides, *small(bytes_home, "gsm8k", tmp_path / "run")).finish()
    assert code == 0, printed
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {"eval/held_out/pass@1", "eval/held_out/reward/gsm8k"} <= lines[0].keys()
    assert "actor/kl_loss" in lines[2] or "actor/ref_kl" in lines[2]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")


@pytest.mark.slow
def test_the_rlhf_recipe_runs_here_by_override(
    bytes_home, run, read_metrics, pytestconfig, tmp_path
):
    recipe = pytestconfig.rootpath / "recipes/rlhf_ppo.yaml"
    code, printed = run(
        recipe,
        f"reward.functions.0.model={bytes_home / 'judge'}",
        "run.critic_warmup_steps=1",
        *small(bytes_home, "chats", tmp_path / "run"),
    ).finish()
    assert code == 0, printed
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == 2
    assert last["reward/judge/mean"] != 0.0
    assert last["reward/judge/errors"] == 0.0
    assert abs(last["actor/ref_kl"]) < 1e-2
    assert ValueModel.from_pretrained(tmp_path / "run/final/critic").head.weight.abs().sum() > 0
