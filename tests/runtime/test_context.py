"""One process: collectives cost nothing, gradients are clipped, trackers are asked for by name."""

import logging
import math

import pytest
import torch
from torch import nn

from llmac.errors import ConfigError
from llmac.runtime.context import Runtime


@pytest.fixture
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=1.0)


def test_one_process_is_rank_0_and_its_collectives_are_the_identity(runtime):
    assert (runtime.rank, runtime.world_size, runtime.local_rank) == (0, 1, 0)
    assert runtime.is_main
    assert runtime.gradient_scale == 1.0
    assert runtime.max(2) == 2.0
    assert runtime.gather({"a": 1}) == [{"a": 1}]
    assert runtime.broadcast("text") == "text"
    runtime.barrier()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_the_sum_of_one_process_is_the_tensor_itself(runtime, dtype):
    x = torch.tensor([1, 2, 3], dtype=dtype)
    assert torch.equal(runtime.sum(x), x)
    assert runtime.sum(x).dtype == dtype


def test_a_sum_carries_no_gradient(runtime):
    assert not runtime.sum(torch.ones(2, requires_grad=True)).requires_grad


def test_a_sum_of_bools_is_refused(runtime):
    with pytest.raises(TypeError, match=r"use .long\(\) to count"):
        runtime.sum(torch.tensor([True]))


def test_the_same_seed_draws_the_same_and_neighbouring_seeds_do_not(runtime):
    seeds = {runtime.seed(n) for n in range(5)}
    assert len(seeds) == 5
    runtime.seed(3)
    first = torch.rand(3)
    runtime.seed(3)
    assert torch.equal(torch.rand(3), first)


def test_no_environment_variable_divides_the_loss(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    runtime = Runtime.create(seed=0, output=None)
    trained = runtime.train(nn.Linear(1, 1), sgd, max_norm=math.inf)
    trained.backward(3.0 * trained.learning(torch.ones(1)).sum())
    assert trained.inner.weight.grad.item() == 3.0
    runtime.close()


def test_a_launchers_mixed_precision_is_said_to_have_no_effect(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with caplog.at_level(logging.WARNING):
        runtime = Runtime.create(seed=0, output=None)
    assert "mixed_precision=bf16 has no effect" in caplog.text
    trained = runtime.train(nn.Linear(2, 2), sgd, max_norm=math.inf)
    assert trained.learning(torch.ones(1, 2)).dtype == torch.float32
    runtime.close()


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(None, torch.float32), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_a_module_computes_in_the_asked_precision_and_keeps_its_own(runtime, dtype, computed):
    trained = runtime.train(nn.Linear(2, 2), sgd, max_norm=math.inf, compute_dtype=dtype)
    frozen = runtime.freeze(nn.Linear(2, 2), compute_dtype=dtype)
    for module in (trained.learning, trained.looking, frozen):
        assert module(torch.ones(1, 2)).dtype == computed
    assert trained.inner.weight.dtype == torch.float32
    trained.backward(trained.learning(torch.ones(1, 2)).float().sum())
    assert trained.inner.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1"),
    ],
)
def test_a_distribution_we_do_not_run_is_refused_by_name(settings, named, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"asks for {named}.*zero3"):
        Runtime.create(seed=0, output=None)


def test_one_process_waits_for_nobody(runtime):
    assert not runtime.in_lockstep
    assert runtime.passes(3) == 3


def test_tensorboard_writes_into_the_run_directory(tmp_path):
    runtime = Runtime.create(seed=0, output=tmp_path)
    recipe = {"algorithm": {"name": "ppo", "lam": 0.95}, "critic": None, "betas": [0.9, 0.99]}
    runtime.start_trackers(["tensorboard"], "demo", recipe)
    runtime.track({"reward/mean": 0.5}, step=1)
    runtime.close()
    runtime.close()
    folder = tmp_path / "trackers" / "demo"
    events = b"".join(path.read_bytes() for path in folder.glob("events*"))
    assert b"reward/mean" in events
    written = "".join(path.read_text() for path in folder.rglob("hparams.yml"))
    assert "algorithm.lam: 0.95" in written


def test_without_trackers_nothing_is_written(tmp_path):
    runtime = Runtime.create(seed=0, output=tmp_path)
    runtime.start_trackers([], "demo", {})
    runtime.track({"reward/mean": 0.5}, step=1)
    runtime.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused(runtime):
    with pytest.raises(ConfigError, match=r"run\.trackers: .*tensorbord"):
        runtime.start_trackers(["tensorbord"], "demo", {})


def test_a_tracker_that_is_not_installed_is_refused(runtime):
    with pytest.raises(ConfigError, match="asks for dvclive, which is not installed"):
        runtime.start_trackers(["dvclive"], "demo", {})
