"""Who takes part in updates over NCCL, as far as that can be told without a GPU."""

from concurrent.futures import Future

import pytest

from llmac.engines import vllm_nccl


@pytest.mark.parametrize("trouble", [RuntimeError("NCCL error: unhandled system error"), None])
def test_a_server_that_does_not_join_fails_no_other(trouble, caplog):
    dead, well = Future(), Future()
    well.set_result("well")  # stands for a communicator, which is only passed on
    if trouble is not None:
        dead.set_exception(trouble)
    assert vllm_nccl._joined([dead, well], workers=2, seconds=0.05) == ["well"]
    assert str(trouble or "TimeoutError") in caplog.text
    assert "expected 2 GPUs for each server" in caplog.text
