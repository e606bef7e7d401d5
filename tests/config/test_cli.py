"""The console script: exit code 1 and one message on a mistake, never a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmac.cli import main
from llmac.config import load_recipe

RECIPE = """
model: {name: org/model}
data: {name: rows.jsonl, prompt: "{question}"}
reward: rewards.py:exact
algorithm: {name: grpo}
run: {steps: 10, output: runs/a}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a recipe, its data and its reward function."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)
    Path("rewards.py").write_text(
        "def exact(prompt, response, answer): return float(response == answer)\n"
    )
    rows = [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(5)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def tiny_model(folder):
    """A tokenizer and a configuration without weights: all that `check` may look at."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained("tiny")
    GPT2Config(n_positions=32, vocab_size=13).save_pretrained("tiny")
    return "tiny"


def test_show_prints_a_recipe_that_loads(folder, capsys):
    assert main(["show", "small.yaml", "actor.lr=1e-5"]) == 0
    Path("shown.yaml").write_text(capsys.readouterr().out)
    assert load_recipe("shown.yaml") == load_recipe("small.yaml", ["actor.lr=1e-5"])


def test_check_lists_what_was_and_what_could_not_be_looked_at(folder, capsys):
    assert main(["check", "small.yaml"]) == 0
    out = capsys.readouterr().out
    assert (
        "ok           reward functions: exact (one-sample contract, needs the columns answer)"
        in out
    )
    assert "not checked  tokenizer: org/model is on the Hub" in out
    assert "rows.jsonl has 5 rows with the columns question, answer" in out
    assert "not checked  model weights" in out


def test_check_tokenizes_the_prompts_when_it_can(folder, tiny_model, capsys):
    assert main(["check", "small.yaml", "model.name=./tiny", "rollout.max_new_tokens=8"]) == 0
    out = capsys.readouterr().out
    assert "ok           tokenizer: ./tiny: 13 tokens, without a chat template" in out
    assert "5 prompts, the longest has 4 tokens" in out


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["rollout.max_new_tokens=30"], "at most 2 are allowed"),
        (["data.prompt={qestion}"], "qestion"),
        (["data.columns.truth=answer"], "requires the column 'answer'"),
        (["data.chat=always"], "chat template"),
    ],
)
def test_check_finds_what_is_wrong_with_the_data(folder, tiny_model, capsys, overrides, part):
    overrides = ["model.name=./tiny", "rollout.max_new_tokens=8", *overrides]
    assert main(["check", "small.yaml", *overrides]) == 1
    out = capsys.readouterr()
    assert "wrong        data" in out.out
    assert part in out.out
    assert "error: 1 of the above" in out.err


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["reward=rewards.py:exakt"], "Did you mean 'exact'?"),
        (["reward=reward.py:exact"], "no file reward.py"),
        (["data.name=./row.jsonl"], "Did you mean rows.jsonl?"),
        (["model.name=./nowhere"], "there is no folder ./nowhere"),
        (["run.output=rows.jsonl/run"], "rows.jsonl is a file"),
    ],
)
def test_check_finds_files_and_functions_that_do_not_exist(folder, capsys, overrides, part):
    assert main(["check", "small.yaml", *overrides]) == 1
    assert part in capsys.readouterr().out


@pytest.mark.parametrize("command", ["show", "check"])
def test_a_mistake_is_one_message_and_exit_code_1(folder, capsys, command):
    assert main([command, "small.yaml", "actor.lrr=1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: actor.lrr is not a field of actor.")
    assert err.count("\n") == 1


def test_a_mistake_in_a_process_of_its_own_has_no_traceback(folder):
    done = subprocess.run(
        [sys.executable, "-m", "llmac.cli", "show", "smal.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Did you mean small.yaml?" in done.stderr
    assert "Traceback" not in done.stderr


def test_algorithms_lists_every_card_with_a_sentence(capsys):
    from llmac.config.cards import registry

    assert main(["algorithms"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in [*registry("algorithm"), *registry("critic")]:
        line = next(line for line in lines if line.split()[:1] == [name])
        assert len(line.split()) > 3


def test_importing_the_configuration_room_is_light():
    code = (
        "import sys, llmac.config, llmac.cli; heavy = {'torch', 'transformers', 'vllm', 'accelerate', 'datasets'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_overrides_may_follow_an_option(folder, capsys):
    words = ["rollouts", "small.yaml", "--responses", "2", "--output", "r.parquet"]
    assert main([*words, "reward=rewards.py:wrong"]) == 1
    assert "wrong" in capsys.readouterr().err
    for stray in ("--respones=3", "small"):
        with pytest.raises(SystemExit):
            main([*words, stray])
        assert f"unrecognized arguments: {stray}" in capsys.readouterr().err
