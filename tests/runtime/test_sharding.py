"""The sharding law: any split of a batch into micro-batches and ranks gives the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("sharding_worker.py")


def learn(output, algorithm, *, processes, tokens):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, str(WORKER), str(output), algorithm, str(tokens)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_micro_batches_and_ranks_do_not_change_what_is_learned(algorithm, tmp_path):
    whole = learn(tmp_path / "whole.pt", algorithm, processes=1, tokens=10_000)
    for name, processes, tokens in [("micro", 1, 24), ("ranks", 2, 30)]:
        split = learn(tmp_path / f"{name}.pt", algorithm, processes=processes, tokens=tokens)
        for key, weight in whole["weights"].items():
            torch.testing.assert_close(
                split["weights"][key], weight, rtol=1e-4, atol=2e-5, msg=f"{name}: {key}"
            )
        assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
        assert split["moved"] > 1e-3
