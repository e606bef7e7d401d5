"""Weights into a real vLLM server, started by `llmac serve`; and into one in this process, which packs its layers."""

import importlib.util
import sys
from types import SimpleNamespace

import httpx
import pytest
import torch

from llmac.engines import vllm_process
from llmac.engines.vllm_launch import ServerProcess, free_port, server_command
from llmac.engines.weight_sender import BREAK_OFF, WeightSender
from llmac.errors import EngineError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    # vLLM and what it imports use names their own dependencies have deprecated.
    pytest.mark.filterwarnings("ignore"),
]

NEW_TOKENS = 8
BUCKET_BYTES = 20_000
"""So few that the parts of a fused weight come in several buckets."""


@pytest.fixture(scope="module")
def server(make_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    port = free_port()
    command = [
        *(sys.executable, "-m", "llmac.cli", "serve", "recipes/gsm8k_grpo.yaml"),
        *(f"model.name={folder}", "rollout.engine=vllm_server", "rollout.dtype=float32"),
        *("rollout.max_new_tokens=32", "rollout.max_model_len=64", "rollout.max_num_seqs=32"),
        *("--host", "127.0.0.1", "--port", str(port), "--", "--served-model-name", "policy"),
    ]
    process = ServerProcess(command, port=port, log=folder / "server.log")
    process.start()
    process.wait_ready(200)
    # No connection is kept: after an error, uvicorn closes it behind its answer.
    limits = httpx.Limits(max_keepalive_connections=0)
    client = httpx.Client(base_url=process.url, timeout=60, trust_env=False, limits=limits)
    yield SimpleNamespace(process=process, client=client)
    client.close()
    process.close()


@pytest.fixture
def call(server):
    """`call(path, body, expecting=status)`: the answer of the server."""

    def post(path, body=None, expecting=200):
        response = server.client.post(path, json=body)
        assert response.status_code == expecting, response.text
        return response.json()

    return post


@pytest.fixture(params=["shm", "tcp"])
def sender(request, call):
    sender = WeightSender(request.param, BUCKET_BYTES)
    call("/init_weight_transfer_engine", {"init_info": sender.init_info()})
    yield sender
    sender.close()


def update(call, sender, model, label):
    """A whole update; returns the names in each bucket."""
    call("/start_weight_update")
    names = []
    for bucket in sender.buckets(model.named_parameters()):
        call("/update_weights", {"update_info": bucket})
        names.append(bucket["names"])
    finish(call, label)
    return names


def finish(call, label):
    call("/finish_weight_update", {"weight_version": label})
    assert call("/reset_prefix_cache")["success"]


def assert_serves(call, model, prompts, greedy, label):
    """The server's greedy responses and their log-probabilities are those of the model."""
    expected = greedy(model, prompts, NEW_TOKENS)
    for prompt, response in zip(prompts, expected, strict=True):
        params = {
            "temperature": 0.0,
            "max_tokens": NEW_TOKENS,
            "logprobs": 0,
            "stop_token_ids": [1],
        }
        answer = call(
            "/inference/v1/generate", {"token_ids": list(prompt), "sampling_params": params}
        )
        (choice,) = answer["choices"]
        assert tuple(choice["token_ids"]) == response
        assert {span["version"] for span in choice["weight_versions"]} == {label}
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(dim=-1)[range(len(response)), list(response)]
        told = torch.tensor([at["logprob"] for at in choice["logprobs"]["content"]])
        assert (told - logprobs).abs().max() < 1e-4


def test_after_each_update_the_server_is_the_new_model(call, sender, make_model, prompts, greedy):
    for seed in (1, 2, 3):
        names = update(call, sender, make_model(seed=seed), f"weights {seed}")
        assert_serves(call, make_model(seed=seed), prompts[:4], greedy, f"weights {seed}")
    layer = "model.layers.1.self_attn.{}_proj.weight"
    places = {
        part: next(i for i, bucket in enumerate(names) if layer.format(part) in bucket)
        for part in "qkv"
    }
    assert len(set(places.values())) > 1, "the test is about parts in different buckets"


def test_an_update_without_its_last_buckets_is_not_finished_and_can_be_repeated(
    call, sender, make_model, prompts, greedy
):
    call("/start_weight_update")
    buckets = sender.buckets(make_model(seed=4).named_parameters())
    for _ in range(3):
        call("/update_weights", {"update_info": next(buckets)})
    buckets.close()
    refused = call("/finish_weight_update", {"weight_version": "half"}, expecting=500)
    assert "ended after 3 buckets, before the last" in refused["error"]["message"]
    call("/collective_rpc", {"method": BREAK_OFF})
    update(call, sender, make_model(seed=5), "whole")
    assert_serves(call, make_model(seed=5), prompts[:2], greedy, "whole")


def test_a_bucket_that_was_left_out_is_noticed(call, sender, make_model, prompts, greedy):
    call("/start_weight_update")
    buckets = sender.buckets(make_model(seed=6).named_parameters())
    call("/update_weights", {"update_info": next(buckets)})
    next(buckets)
    refused = call("/update_weights", {"update_info": next(buckets)}, expecting=500)
    assert "bucket 2 of update 1 arrived; expected bucket 1" in refused["error"]["message"]
    call("/finish_weight_update", {"weight_version": "holed"}, expecting=500)
    update(call, sender, make_model(seed=7), "whole again")
    assert_serves(call, make_model(seed=7), prompts[:2], greedy, "whole again")


def test_buckets_of_two_updates_are_not_mixed(call, sender, make_model):
    call("/start_weight_update")
    call("/update_weights", {"update_info": next(sender.buckets(make_model().named_parameters()))})
    other = sender.buckets(make_model(seed=1).named_parameters())
    next(other)
    refused = call("/update_weights", {"update_info": next(other)}, expecting=500)
    assert "bucket 1 of update 2 arrived; expected bucket 1 of update 1" in str(refused)


def test_a_trainer_that_dies_in_an_update_is_followed_by_the_next(
    call, sender, make_model, prompts, greedy
):
    call("/start_weight_update")
    buckets = sender.buckets(make_model(seed=8).named_parameters())
    call("/update_weights", {"update_info": next(buckets)})
    waiting = next(buckets)
    sender.close()
    # What is mapped stays readable: only over a socket the loss shows in the next bucket.
    if "key" in waiting["where"]:
        refused = call("/update_weights", {"update_info": waiting}, expecting=500)
        assert "The trainer has ended" in refused["error"]["message"]
    else:
        call("/collective_rpc", {"method": BREAK_OFF})
    heir = WeightSender("shm", BUCKET_BYTES)
    call("/init_weight_transfer_engine", {"init_info": heir.init_info()})
    update(call, heir, make_model(seed=9), "of the heir")
    assert_serves(call, make_model(seed=9), prompts[:2], greedy, "of the heir")
    heir.close()


def test_a_server_that_cannot_reach_the_trainer_says_so_when_they_meet(call):
    sender = WeightSender("shm", BUCKET_BYTES)
    info = sender.init_info()
    sender.close()
    refused = call("/init_weight_transfer_engine", {"init_info": info}, expecting=500)
    assert "weight_transport=tcp" in refused["error"]["message"]


def test_a_cache_that_holds_no_response_is_told_with_the_knobs(make_model, tokenizer, tmp_path):
    make_model(max_position_embeddings=1 << 17).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    port = free_port()
    command = server_command(
        str(tmp_path / "model"), port=port, dtype="float32", kv_cache_mb=1, max_num_seqs=4
    )
    process = ServerProcess(command, port=port, log=tmp_path / "server.log")
    process.start()
    try:
        with pytest.raises(EngineError, match=r"KV cache.*; lower rollout\.max_model_len"):
            process.wait_ready(200)
    finally:
        process.close()


@pytest.fixture(scope="module")
def packed(make_model, tokenizer, tmp_path_factory):
    """A vLLM in this process that packs its layers, so that updates make them anew, as on a GPU."""
    folder = tmp_path_factory.mktemp("packed")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with vllm_process.process_state_restored():
        vllm_process.import_vllm()
        from vllm import _custom_ops

        import llmac.engines.vllm_transfer  # noqa: F401, registers the backend

        _custom_ops._supports_onednn = True
        llm = vllm_process.build(
            {
                "model": str(folder),
                "dtype": "float32",
                "max_model_len": 64,
                "max_num_seqs": 16,
                "kv_cache_memory_bytes": 64 << 20,
                "enforce_eager": True,
                "generation_config": "vllm",
                "weight_transfer_config": {"backend": "llmac"},
            }
        )
    yield llm
    _custom_ops._supports_onednn = False
    vllm_process.shut_down(llm, keep_group=False)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_packed_layers_are_packed_anew_also_after_an_update_that_broke_off(
    packed, transport, make_model, prompts, greedy
):
    from vllm import SamplingParams

    def worker(method, **arguments):
        packed.collective_rpc(method, kwargs=arguments)

    def serves(model):
        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, stop_token_ids=[1])
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = packed.generate(inputs, params, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids) for output in outputs] == greedy(
            model, prompts, NEW_TOKENS
        )

    def send(model, *, only=None):
        worker("start_weight_update")
        for bucket in sender.buckets(model.named_parameters()):
            if bucket["number"] == only:
                break
            worker("update_weights", update_info=bucket)

    sender = WeightSender(transport, BUCKET_BYTES)
    worker("init_weight_transfer_engine", init_info=sender.init_info())
    for seed in (1, 2):
        send(make_model(seed=seed))
        worker("finish_weight_update")
        packed.reset_prefix_cache()
        assert serves(make_model(seed=seed))
    # A bucket that ends within a layer: half of q, k and v have arrived.
    send(make_model(seed=3), only=3)
    with pytest.raises(Exception, match="before the last"):
        worker("finish_weight_update")
    with pytest.raises(Exception, match="Invalid update_info"):  # which ends the session too
        worker("update_weights", update_info={"nonsense": 1})
    send(make_model(seed=4))
    worker("finish_weight_update")
    packed.reset_prefix_cache()
    assert serves(make_model(seed=4))
    sender.close()
