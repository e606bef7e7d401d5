"""The sharding law: any split of a batch, and of a model, over micro-batches and ranks gives the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("sharding_worker.py")
EVERYTHING = ("grpo", "ppo", "ppo lora", "ppo shared", "ppo shared lora")


def learn(output, cases, *, tokens, configuration=None):
    """What the worker wrote; `configuration` is an accelerate one for two processes."""
    launcher = [sys.executable]
    if configuration is not None:
        launcher += ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
        launcher += ["--config_file", str(ROOT / f"recipes/accelerate/{configuration}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, str(WORKER), str(output), str(tokens), *cases],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(output)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process learns from whole minibatches."""
    return learn(tmp_path_factory.mktemp("whole") / "whole.pt", EVERYTHING, tokens=10_000)


def check_same(found, whole):
    for case, result in found.items():
        expected = whole[case]
        assert max(result["moved"].values()) > 1e-2
        assert result["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                result["weights"][name], weight, rtol=1e-4, atol=4e-5, msg=f"{case}: {name}"
            )
        for ours, theirs in zip(result["metrics"], expected["metrics"], strict=True):
            assert ours == {name: pytest.approx(value, rel=2e-3) for name, value in theirs.items()}


def test_micro_batches_do_not_change_what_is_learned(whole, tmp_path):
    check_same(learn(tmp_path / "micro.pt", EVERYTHING, tokens=24), whole)


@pytest.mark.parametrize(
    "configuration",
    [
        None,
        pytest.param("zero3", marks=pytest.mark.deepspeed),
        pytest.param("fsdp2", marks=pytest.mark.slow),
    ],
)
def test_a_trie_teaches_what_padded_rows_teach(configuration, whole, tmp_path):
    cases = ("ppo trie", "ppo shared lora trie")
    found = learn(tmp_path / "trie.pt", cases, tokens=24, configuration=configuration)
    check_same({case.removesuffix(" trie"): found[case] for case in cases}, whole)


@pytest.mark.parametrize(
    ("configuration", "cases"),
    [
        pytest.param("ddp", EVERYTHING, marks=pytest.mark.slow),
        pytest.param("zero1", ("ppo", "ppo lora"), marks=pytest.mark.deepspeed),
        pytest.param("zero2", ("ppo", "ppo lora"), marks=pytest.mark.deepspeed),
        pytest.param("zero3", EVERYTHING, marks=pytest.mark.deepspeed),
        pytest.param("zero3_offload", ("ppo", "ppo lora"), marks=pytest.mark.deepspeed),
        pytest.param("fsdp2", EVERYTHING, marks=pytest.mark.slow),
    ],
)
def test_ranks_and_shards_do_not_change_what_is_learned(configuration, cases, whole, tmp_path):
    """Losses, gradient norms and weights of five steps; the worker itself resumes bitwise and perturbs shards."""
    check_same(learn(tmp_path / "ranks.pt", cases, tokens=30, configuration=configuration), whole)
