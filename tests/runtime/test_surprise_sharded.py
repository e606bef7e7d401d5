"""The surprise critic learns the same on two processes as on one, and comes back from both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("surprise_worker.py")


def taught(output, configuration=None):
    """What the worker wrote; `configuration` is an accelerate one for two processes."""
    launcher = [sys.executable]
    if configuration is not None:
        launcher += ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
        launcher += ["--config_file", str(ROOT / f"recipes/accelerate/{configuration}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, str(WORKER), str(output)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(output)


@pytest.mark.parametrize(
    "configuration",
    [
        pytest.param("zero3", marks=pytest.mark.deepspeed),
        pytest.param("ddp", marks=pytest.mark.slow),
    ],
)
def test_it_learns_the_same_on_two_processes(configuration, tmp_path):
    expected, found = taught(tmp_path / "whole.pt"), taught(tmp_path / "two.pt", configuration)
    assert found.keys() == expected.keys()
    assert expected["out.weight"].abs().max() > 1e-3
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    shipped = load_file(tmp_path / "two critic" / "shipped" / "surprise.safetensors")
    for name, weight in found.items():
        torch.testing.assert_close(shipped[name], weight, rtol=0, atol=0)
