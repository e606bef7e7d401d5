"""A long run's worth of syncs from ZeRO-3 to vLLM: versions stay exact and memory stays where it is."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parents[2]
SYNCS, SETTLED = 500, 200
"""The allocator still finds its size in the first syncs; what is fitted comes after."""
BUCKET_BYTES = 1 << 20
LEAK = BUCKET_BYTES / 10
"""Bytes a sync of the smallest leak that has to be seen: one bucket every ten syncs, 30 MiB in what is fitted."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.deepspeed,
    pytest.mark.vllm,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("deepspeed", "vllm")),
        reason="DeepSpeed or vLLM is not installed",
    ),
]


@pytest.fixture
def model(home, tmp_path):
    """A million parameters, four buckets of them."""
    config = Qwen2Config.from_pretrained(home / "model")
    config.hidden_size, config.intermediate_size = 192, 768
    config.num_attention_heads, config.num_key_value_heads = 6, 2
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(home / "model").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def soak(model, output):
    """What each rank has found."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "recipes/accelerate/zero3.yaml", "--main_process_port", "0"]
    numbers = [str(number) for number in (SYNCS, BUCKET_BYTES)]
    job = subprocess.Popen(
        [*launch, "tests/e2e/soak_worker.py", str(model), str(output), *numbers],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = job.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(job.pid).children(recursive=True), job]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        raise
    assert job.returncode == 0, printed
    return [json.loads((output / f"rank-{rank}.json").read_text()) for rank in range(2)]


def growth(resident):
    """Bytes a sync, by least squares over the settled part."""
    syncs = numpy.linspace(SYNCS / len(resident), SYNCS, len(resident))
    settled = syncs > SETTLED
    return float(numpy.polyfit(syncs[settled], numpy.array(resident)[settled], 1)[0])


def test_five_hundred_syncs_keep_memory_and_versions(model, tmp_path):
    for found in soak(model, tmp_path):
        assert found["versions"] == list(range(1, SYNCS + 1))
        assert found["sampled"] == list(range(20, SYNCS + 1, 20))
        assert found["said"] == pytest.approx(found["expected"], abs=1e-3)
        assert growth(found["resident"]) < LEAK / 2, found["resident"]
