"""Planned shards against those of real DeepSpeed and FSDP2 processes."""

import json
from pathlib import Path

import pytest

from llmac.config.schema import ModelConfig
from llmac.placement.sharding import Sharding, held
from llmac.placement.skeletons import policy_skeleton
from llmac.runtime.zero import bucket_sizes

from .making import folder_of


@pytest.mark.deepspeed
def test_two_processes_hold_the_planned_shards(tmp_path, on_two_processes):
    pytest.importorskip("deepspeed")
    folder = folder_of(tmp_path / "model", hidden_size=96, vocab_size=1301, num_hidden_layers=8)
    on_two_processes("-m", "tests.placement.shards_worker", folder)
    measured = json.loads((Path(folder) / "measured.json").read_text())
    looking = measured.pop("looking")
    assert len(measured) == 8
    for case, bytes_of in measured.items():
        name, dtype = case.split()
        skeleton = policy_skeleton(ModelConfig(name=folder, dtype=dtype))
        planned = held(skeleton, Sharding(name), 2)
        # Small parameters stay whole at stage 3 between passes as well; here they are counted with the buffers.
        threshold = bucket_sizes(96)["stage3_param_persistence_threshold"]
        whole = sum(w.elements * w.item_bytes for w in skeleton.weights if w.elements <= threshold)
        parameters = planned.parameters - (whole if name == "zero3" else 0)
        assert bytes_of == {
            "parameters": parameters,
            "gradients": planned.gradients,
            "optimizer": planned.optimizer,
        }, case
    # A pass without gradients, of so few tokens that weights are all: what is gathered, and the copy of one matrix.
    gathered = held(policy_skeleton(ModelConfig(name=folder)), Sharding.FSDP2, 2).buffers
    copy = 2 * 96 * 176
    assert 0.85 <= looking["not cached"] / (gathered + copy) <= 1.0
    # With autocast's cache it would hold all copies, which is why the runtime has it off.
    assert looking["cached"] / (gathered + copy) > 1.3
