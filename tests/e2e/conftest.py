"""A tiny model, its tokenizer, prompts and a reward, all on disk as a user has them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parents[2]

REWARD = '''
def reward(prompt, response, wanted):
    """Fraction of the response's characters that are the wanted one."""
    return response.count(wanted) / max(len(response), 1)
'''


def character_tokenizer(letters="abcdef="):
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>"
    )


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with `model/`, `train.jsonl`, `held_out.jsonl` and `reward.py`."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(home / "model")
    character_tokenizer().save_pretrained(home / "model")
    letters = "abcdef"
    rows = [{"prompt": f"{a}{b}=", "wanted": a} for a in letters for b in letters]
    (home / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (home / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows[::7])))
    (home / "reward.py").write_text(REWARD)
    return home


@pytest.fixture(scope="session")
def vllm_home(home, tmp_path_factory):
    """The tiny model with heads of 32, the smallest that vLLM has kernels for on CPU."""
    folder = tmp_path_factory.mktemp("model")
    config = Qwen2Config.from_pretrained(home / "model")
    config.hidden_size, config.num_attention_heads = 64, 2
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(home, tmp_path):
    """A recipe that runs in seconds, as a mapping; tests change what they are about."""
    return {
        "model": {"name": str(home / "model")},
        "data": {"name": str(home / "train.jsonl")},
        "reward": f"{home / 'reward.py'}:reward",
        "algorithm": {"name": "grpo", "group_size": 4},
        "actor": {"lr": 3e-3, "prompts_per_step": 4, "minibatches": 2},
        "rollout": {"max_new_tokens": 8},
        "run": {"steps": 4, "output": str(tmp_path / "run"), "save_every": 2},
    }


@pytest.fixture
def write_recipe(tmp_path):
    """Writes a mapping as a recipe file."""

    def write(settings, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


class Run:
    """`recipes/train.py` in a process of its own."""

    def __init__(self, recipe, *overrides, processes=1, configuration="ddp", environment=None):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "accelerate.commands.launch", "--config_file"]
            launcher += [
                str(ROOT / f"recipes/accelerate/{configuration}.yaml"),
                "--num_processes",
                str(processes),
                "--main_process_port",
                "0",
            ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            **(environment or {}),
        }
        self.process = subprocess.Popen(
            [*launcher, str(ROOT / "recipes/train.py"), str(recipe), *overrides],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, seconds=240):
        """(exit code, everything it printed)."""
        try:
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, output

    def kill_when(self, condition, seconds=240):
        """kill -9 the moment `condition()` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.002)
        self.kill()
        self.process.communicate()

    def kill(self):
        """kill -9 the process and all below it; a launcher's workers are in sessions of their own."""
        everything = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def run():
    """Starts `Run`s and leaves none behind."""
    started = []

    def start(*arguments, **options):
        started.append(Run(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()


@pytest.fixture
def read_metrics():
    """Lines of a run's metrics.jsonl, without what depends on the clock."""

    def read(output):
        lines = [
            json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()
        ]
        return [
            {k: v for k, v in line.items() if not k.startswith(("timing_s/", "perf/"))}
            for line in lines
        ]

    return read
