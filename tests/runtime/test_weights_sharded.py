"""The stream of weights that two processes train with DeepSpeed ZeRO 1 to 3 and FSDP2: its values, and its memory."""

from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("weights_worker.py")


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize(("transport", "cases"), [("shared", 15), ("sent", 4)])
def test_every_rank_streams_what_was_learned_within_a_bucket(transport, cases, on_two_processes):
    said = on_two_processes(WORKER, transport).splitlines()
    assert len([line for line in said if line.endswith(": done")]) == cases
