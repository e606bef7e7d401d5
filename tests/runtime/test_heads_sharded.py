"""Every value head learns the same from shards on two processes as whole on one, and comes back from both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("heads_worker.py")
WHOLE_ONLY = ("value_head popart", "value_head target")
SHARDED = (
    "value_head",
    "bernoulli",
    "hl_gauss",
    "two_hot",
    "c51",
    "quantile",
    "gaussian",
    "outcome_classes",
    "value_head twins",
    "hl_gauss twins",
    "value_head layers",
    "value_head running",
)

MIXED = ("hl_gauss", "value_head twins", "value_head layers", "value_head running")


def taught(output, names, configuration=None):
    """What the worker wrote; `configuration` is an accelerate one for two processes."""
    launcher = [sys.executable]
    if configuration is not None:
        launcher += ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
        launcher += ["--config_file", str(ROOT / f"recipes/accelerate/{configuration}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, str(WORKER), str(output), *names],
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
    return taught(tmp_path_factory.mktemp("whole") / "whole.pt", SHARDED + WHOLE_ONLY)


@pytest.mark.parametrize(
    ("configuration", "names"),
    [
        pytest.param("zero3", SHARDED, marks=pytest.mark.deepspeed),
        pytest.param("ddp", ("c51", "hl_gauss twins", *WHOLE_ONLY), marks=pytest.mark.slow),
        pytest.param("fsdp2", MIXED, marks=pytest.mark.slow),
    ],
)
def test_every_head_learns_the_same_from_shards(configuration, names, whole, tmp_path):
    found = taught(tmp_path / "ranks.pt", names, configuration)
    assert set(found) == set(names)
    for name, result in found.items():
        expected = whole[name]
        assert any(weight.abs().max() > 1e-3 for weight in result["weights"].values())
        assert result["weights"].keys() == expected["weights"].keys()
        for key, weight in expected["weights"].items():
            torch.testing.assert_close(
                result["weights"][key], weight, rtol=1e-3, atol=1e-4, msg=f"{name}: {key}"
            )
        for ours, theirs in zip(result["metrics"], expected["metrics"], strict=True):
            wanted = {
                key: pytest.approx(value, rel=2e-3, abs=1e-5) for key, value in theirs.items()
            }
            assert ours == wanted, name
