"""Two processes on one machine, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # two CPU processes, also where there is one GPU
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_agree_on_sums_gradients_and_checkpoints(tmp_path):
    result = launch(
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "recipes" / "accelerate" / "ddp.yaml"),
        "--main_process_port",
        "0",
        str(Path(__file__).with_name("two_ranks.py")),
        str(tmp_path),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(result.stdout.splitlines()) == ["rank 0 agrees", "rank 1 agrees"]
    # Written once, by rank 0.
    events = list((tmp_path / "trackers" / "demo").glob("events*"))
    assert len(events) == 1


@pytest.mark.slow
def test_a_rank_that_stalls_is_named_and_takes_the_others_with_it(tmp_path):
    program = tmp_path / "stalls.py"
    program.write_text(
        "import time\n"
        "from llmac.runtime.context import Runtime\n"
        "from llmac.runtime.phases import Phases\n"
        "runtime = Runtime.create(seed=0, output=None)\n"
        "with Phases(runtime.rank, watchdog_seconds=2 if runtime.rank else 60)('score'):\n"
        "    if runtime.rank == 1:\n"
        "        time.sleep(100)\n"
        "    runtime.barrier()\n"
    )
    result = launch("torch.distributed.run", "--nproc_per_node", "2", str(program))
    assert result.returncode != 0
    assert "rank 1: nothing moved in phase 'score'" in result.stderr


@pytest.mark.slow
def test_the_single_process_configuration_starts_one(tmp_path):
    program = tmp_path / "one.py"
    program.write_text(
        "from llmac.runtime.context import Runtime\n"
        "print(Runtime.create(seed=0, output=None).world_size)\n"
    )
    config = str(ROOT / "recipes" / "accelerate" / "single.yaml")
    result = launch("accelerate.commands.launch", "--config_file", config, str(program))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["1"]
