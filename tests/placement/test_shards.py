"""Planned shards against those of real DeepSpeed and FSDP2 processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmac.config.schema import ModelConfig
from llmac.placement.sharding import Sharding, held
from llmac.placement.skeletons import policy_skeleton

from .making import folder_of


@pytest.mark.deepspeed
def test_two_processes_hold_the_planned_shards(tmp_path):
    pytest.importorskip("deepspeed")
    folder = folder_of(tmp_path / "model", hidden_size=96, vocab_size=1301)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    worker = str(Path(__file__).with_name("shards_worker.py"))
    result = subprocess.run(
        [*launcher, "--nproc_per_node", "2", worker, folder],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    measured = json.loads((Path(folder) / "measured.json").read_text())
    assert len(measured) == 8
    for case, bytes_of in measured.items():
        name, dtype = case.split()
        skeleton = policy_skeleton(ModelConfig(name=folder, dtype=dtype))
        planned = held(skeleton, Sharding(name), 2)
        # Small parameters stay whole at stage 3 between passes as well; here they are counted with the buffers.
        whole = sum(w.elements * w.item_bytes for w in skeleton.weights if w.elements < 100_000)
        parameters = planned.parameters - (whole if name == "zero3" else 0)
        assert bytes_of == {
            "parameters": parameters,
            "gradients": planned.gradients,
            "optimizer": planned.optimizer,
        }, case
