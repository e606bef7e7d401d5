"""`llmac generate` with a run's policy and critic, all methods, from the command line."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmac.api import run as train
from llmac.cli import main
from llmac.config import load_recipe
from llmac.models.value_heads import HEAD_FILE

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """A short PPO run with a value head that is not flat."""
    output = tmp_path_factory.mktemp("runs") / "ppo"
    recipe = {
        "model": {"name": str(home / "model")},
        "data": {"name": str(home / "train.jsonl")},
        "reward": f"{home / 'reward.py'}:reward",
        "algorithm": {"name": "ppo", "group_size": 4},
        "critic": {"name": "value_head", "lr": 1e-2},
        "actor": {"lr": 3e-3, "prompts_per_step": 4, "minibatches": 2},
        "rollout": {"max_new_tokens": 8},
        "run": {"steps": 2, "output": str(output)},
    }
    train(load_recipe(recipe))
    weights = load_file(output / "final" / "critic" / HEAD_FILE)
    torch.manual_seed(0)
    weights["weight"] = torch.randn_like(weights["weight"])
    save_file(weights, output / "final" / "critic" / HEAD_FILE)
    return output


def ask(home, finished, output, method, *words):
    return main(
        [
            *("generate", str(finished), "--method", method, "--output", str(output)),
            *("--prompts", str(home / "held_out.jsonl"), "--max-new-tokens", "8", *words),
        ]
    )


@slow
@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("best_of_n", ["--n", "4"]),
        ("vote", ["--n", "4", "--answer", "regex:[a-f]"]),
        ("weighted_vote", ["--n", "4", "--answer", "regex:[a-f]"]),
        ("beam", ["--block-tokens", "3", "--trees", "2", "--answer", "regex:[a-f]"]),
        ("token", ["--top-k", "3", "--rule", "tilt", "--lam", "2"]),
        ("transfer", ["--tuned", "{run}", "--reference", "{start}", "--lam", "0.5"]),
    ],
)
def test_every_method_answers_every_prompt(method, words, home, finished, tmp_path, capsys):
    critic = [] if method in ("vote", "transfer") else ["--critic", str(finished)]
    words = [word.format(run=finished, start=home / "model") for word in words]
    for name in ("one", "two"):
        assert ask(home, finished, tmp_path / name, method, *critic, *words) == 0
    lines = [json.loads(line) for line in (tmp_path / "one").read_text().splitlines()]
    rows = [json.loads(line) for line in (home / "held_out.jsonl").read_text().splitlines()]
    assert [(x["prompt"], x["columns"]["wanted"]) for x in lines] == [
        (r["prompt"], r["wanted"]) for r in rows
    ]
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()  # seeded
    assert f"{len(rows)} prompts" in capsys.readouterr().out
    for line in lines:
        assert line["response"] in [c["response"] for c in line["candidates"]]
        assert (line["valued_states"] > 0) == bool(critic)
    if method == "best_of_n":
        for line in lines:
            ended = [c["value"] for c in line["candidates"] if c["finish"] == "stop"]
            assert line["value"] == max(ended or [c["value"] for c in line["candidates"]])


@slow
def test_a_critic_of_another_policy_is_warned_of(home, finished, tmp_path, caplog):
    words = ["--critic", str(finished), "--n", "2"]
    assert ask(home, finished, tmp_path / "own", "best_of_n", *words) == 0
    assert "was trained on responses of" not in caplog.text
    assert ask(home, home / "model", tmp_path / "other", "best_of_n", *words) == 0
    assert "and guides" in caplog.text
    caplog.clear()
    assert ask(home, finished, tmp_path / "long", "best_of_n", *words, "--max-new-tokens", "9") == 0
    assert "up to 8 tokens" in caplog.text


@slow
def test_a_run_that_left_no_model_is_no_model(home, finished, tmp_path, capsys):
    shutil.copy(finished / "config.yaml", tmp_path / "config.yaml")
    assert ask(home, tmp_path, tmp_path / "x", "vote") == 1
    assert "has no final/ model" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
# vLLM and what it imports use names their own dependencies have deprecated.
@pytest.mark.filterwarnings("ignore")
def test_vllm_samples_for_a_vote(home, vllm_home, tmp_path):
    words = ["--engine", "vllm", "--n", "3", "--answer", "regex:[a-f]"]
    assert ask(home, vllm_home, tmp_path / "out", "vote", *words) == 0
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert all(len(line["candidates"]) == 3 for line in lines)
