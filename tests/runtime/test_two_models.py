"""Two language models that learn side by side learn the same from shards on two processes as whole on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("two_models_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models of different sizes."""
    folder = tmp_path_factory.mktemp("models")
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopq"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    for seed, (name, hidden) in enumerate({"policy": 16, "second": 24}.items()):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=19,
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=True,
            pad_token_id=None,
        )
        Qwen2ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def taught(output, folder, configuration=None):
    """What the worker wrote; `configuration` is an accelerate one for two processes."""
    output.parent.mkdir()
    launcher = [sys.executable]
    if configuration is not None:
        launcher += ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
        launcher += ["--config_file", str(ROOT / f"recipes/accelerate/{configuration}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, str(WORKER), str(output), str(folder)],
        env={**environment, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(output)


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    return taught(tmp_path_factory.mktemp("alone") / "run" / "found.pt", folder)


@pytest.mark.parametrize(
    "configuration",
    [
        pytest.param("zero3", marks=pytest.mark.deepspeed),
        pytest.param("fsdp2", marks=pytest.mark.slow),
    ],
)
def test_both_models_learn_the_same_from_shards(configuration, alone, folder, tmp_path):
    """Weights, losses and gradient norms; the worker itself continues both bitwise and feeds both engines."""
    found = taught(tmp_path / "run" / "found.pt", folder, configuration)
    for name in ("policy", "second"):
        assert max(moved for key, moved in found["moved"].items() if key.startswith(name)) > 1e-2
    assert found["weights"].keys() == alone["weights"].keys()
    for key, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][key], weight, rtol=1e-4, atol=4e-5, msg=key)
    for ours, theirs in zip(found["metrics"], alone["metrics"], strict=True):
        expected = {name: pytest.approx(v, rel=2e-3, abs=1e-5) for name, v in theirs.items()}
        assert ours == expected
