"""The stream of weights that two processes train with DeepSpeed ZeRO 1 to 3 and FSDP2: its values, and its memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def on_two_processes(part: str) -> list[str]:
    """What rank 0 says about the cases of weights_worker.py."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(HERE / "weights_worker.py"), part],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.endswith(": done")]


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize(("transport", "cases"), [("shared", 15), ("sent", 4)])
def test_every_rank_streams_what_was_learned_within_a_bucket(transport, cases):
    assert len(on_two_processes(transport)) == cases
