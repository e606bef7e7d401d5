"""Mixtures of experts: one tensor for all experts of a layer in memory, one for each in the stream."""

import importlib.util

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from llmac.core.protocols import Request, SamplingParams
from llmac.engines import vllm_process
from llmac.engines.checkpoint_form import check_restorable, parts
from llmac.engines.hf_engine import HFEngine
from llmac.engines.manifest import Manifest
from llmac.engines.probe import ProbedModule, prove_updates_arrive
from llmac.engines.vllm_engine import VLLMEngine
from llmac.engines.weight_sender import WeightSender
from llmac.errors import EngineError
from llmac.runtime.weights import full_weights

END = 1
SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "eos_token_id": END,
    "pad_token_id": 0,
    "bos_token_id": None,
}
# More than ten, so that the order of numbers is not that of letters.
EXPERTS = 11
CONFIGS = {
    "mixtral": lambda: MixtralConfig(
        **SIZES, num_local_experts=EXPERTS, num_experts_per_tok=3, tie_word_embeddings=False
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SIZES,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        tie_word_embeddings=True,
    ),
    "plain": lambda: LlamaConfig(**SIZES),
}
OTHER_CONFIGS = {
    "qwen2-moe": lambda: Qwen2MoeConfig(**SIZES, num_experts=EXPERTS, moe_intermediate_size=32),
    "phimoe": lambda: PhimoeConfig(**SIZES, num_local_experts=EXPERTS),
    "gpt-oss": lambda: GptOssConfig(**SIZES, head_dim=32, num_local_experts=EXPERTS),
    "gpt-neox": lambda: GPTNeoXConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=1, num_attention_heads=2
    ),
}
EXPERT = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.10.w2.weight",
    "qwen3-moe": "model.layers.1.mlp.experts.10.down_proj.weight",
}

both = pytest.mark.parametrize("kind", EXPERT)
every = pytest.mark.parametrize("kind", CONFIGS)


def make(kind, seed=0):
    config = {**CONFIGS, **OTHER_CONFIGS}[kind]()
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.set_rng_state(state)
    return model


def ask(prompts, **params):
    return [Request(prompt_ids=prompt, params=SamplingParams(**params)) for prompt in prompts]


def flat(answers):
    return [completion for siblings in answers for completion in siblings]


@every
def test_after_an_update_greedy_responses_equal_those_of_the_new_weights(
    kind, tokenizer, prompts, greedy
):
    engine, new = HFEngine(make(kind), tokenizer), make(kind, seed=1)
    engine.load_weights(full_weights(new), version=3)
    answers = flat(engine.generate(ask(prompts, temperature=0.0, max_new_tokens=12)))
    assert [c.token_ids for c in answers] == greedy(new, prompts, 12)
    assert greedy(new, prompts, 12) != greedy(make(kind), prompts, 12)
    assert engine.policy_version == 3


@pytest.mark.parametrize("kind", [*CONFIGS, *OTHER_CONFIGS])
def test_every_weight_arrives_bit_for_bit(kind, tokenizer):
    engine, new = HFEngine(make(kind), tokenizer), make(kind, seed=1)
    engine.load_weights(full_weights(new), version=1)
    state = engine._model.state_dict()
    assert state.keys() == new.state_dict().keys()
    for name, weight in new.state_dict().items():
        assert torch.equal(state[name], weight), name


@both
def test_models_from_a_checkpoint_agree_with_made_ones(kind, tokenizer, tmp_path):
    # transformers remembers how it loaded a model, and goes by rules of its own for one it did not load.
    make(kind).save_pretrained(tmp_path)
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(tmp_path), tokenizer)
    assert engine._manifest == Manifest.of(make(kind))
    for seed in (1, 2):
        new = make(kind, seed=seed)
        new.save_pretrained(tmp_path / str(seed))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(seed))
        for model in (new, loaded):
            engine.load_weights(full_weights(model), version=seed)
            for name, weight in new.state_dict().items():
                assert torch.equal(engine._model.state_dict()[name], weight), name


@both
def test_small_buckets_that_are_overwritten_do_no_harm(kind, tokenizer):
    # What a stream has yielded is another weight's memory as soon as the next bucket is gathered.
    def overwritten():
        for name, tensor in full_weights(new):
            copy = tensor.clone()
            yield name, copy
            copy.fill_(float("nan"))

    engine, new = HFEngine(make(kind), tokenizer), make(kind, seed=1)
    engine.load_weights(overwritten(), version=1)
    for name, weight in new.state_dict().items():
        assert torch.equal(engine._model.state_dict()[name], weight), name


@both
def test_the_order_of_the_stream_does_not_matter(kind, tokenizer):
    engine, new = HFEngine(make(kind), tokenizer), make(kind, seed=1)
    engine.load_weights(reversed(list(full_weights(new))), version=1)
    for name, weight in new.state_dict().items():
        assert torch.equal(engine._model.state_dict()[name], weight), name


@both
def test_a_missing_expert_is_named_and_the_old_weights_stay(kind, tokenizer, prompts):
    engine = HFEngine(make(kind), tokenizer)
    requests = ask(prompts, max_new_tokens=8, seed=0)
    before = engine.generate(requests)
    stream = [(n, x) for n, x in full_weights(make(kind, seed=1)) if n != EXPERT[kind]]
    with pytest.raises(EngineError, match=rf"1 of \d+ weights did not arrive: {EXPERT[kind]}\."):
        engine.load_weights(stream, version=9)
    assert engine.policy_version == 0
    assert engine.generate(requests) == before
    for name, weight in make(kind).state_dict().items():
        assert torch.equal(engine._model.state_dict()[name], weight), name


@both
def test_an_update_that_broke_off_leaves_nothing_for_the_next(kind, tokenizer):
    def breaks_off():
        yield from list(full_weights(make(kind, seed=2)))[:-30]
        raise OSError("lost")

    engine, new = HFEngine(make(kind), tokenizer), make(kind, seed=1)
    with pytest.raises(OSError, match="lost"):
        engine.load_weights(breaks_off(), version=1)
    engine.load_weights(full_weights(new), version=2)
    for name, weight in new.state_dict().items():
        assert torch.equal(engine._model.state_dict()[name], weight), name


@both
def test_names_of_the_module_are_refused(kind, tokenizer):
    with pytest.raises(EngineError, match="which checkpoints of this model lack"):
        HFEngine(make(kind), tokenizer).load_weights(make(kind).named_parameters(), version=1)


@both
def test_the_start_up_proof_passes(kind, tokenizer):
    model, engine = make(kind, seed=1), HFEngine(make(kind), tokenizer)
    found = prove_updates_arrive(
        engine, lambda: full_weights(model), ProbedModule(model), [(5, 6, 7), (8, 9)]
    )
    assert all(difference < 1e-4 for difference in found.values())


@both
def test_two_experts_in_each_others_place_are_seen_by_the_start_up_proof(kind, tokenizer):
    def swapped():
        other = {EXPERT[kind]: EXPERT[kind].replace(".10.", ".2.")}
        other.update({second: first for first, second in other.items()})
        return ((other.get(name, name), tensor) for name, tensor in full_weights(model))

    model = make(kind, seed=1)
    with pytest.raises(EngineError, match="every weight changed"):
        prove_updates_arrive(
            HFEngine(make(kind), tokenizer), swapped, ProbedModule(model), [(5, 6, 7), (8, 9)]
        )


@pytest.mark.parametrize("kind", [*CONFIGS, *OTHER_CONFIGS])
def test_a_manifest_names_what_is_streamed_also_without_memory(kind):
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config({**CONFIGS, **OTHER_CONFIGS}[kind]())
    manifest = Manifest.of(make(kind))
    assert Manifest.of(skeleton) == manifest
    assert len(list(manifest.checked(full_weights(make(kind, seed=1))))) == len(manifest.aliases)


@both
def test_an_architecture_that_cannot_be_put_together_is_refused(kind):
    model = make(kind)
    found = parts(model)
    check_restorable(model, found)
    del model.model.layers[0].mlp.experts.down_proj
    model.model.layers[0].mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(EXPERTS, 1, 32))
    with pytest.raises(EngineError, match=r"layers\.0\.mlp\.experts\.down_proj .*rollout\.engine"):
        check_restorable(model, found)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
# vLLM and what it imports use names their own dependencies have deprecated.
@pytest.mark.filterwarnings("ignore")
@both
def test_vllm_takes_an_update_of_experts(kind, tokenizer, prompts, greedy, tmp_path):
    make(kind).save_pretrained(tmp_path)
    engine = VLLMEngine(str(tmp_path), tokenizer)
    try:
        for seed in (0, 1):
            model = make(kind, seed=seed)
            engine.load_weights(full_weights(model), version=seed)
            answers = flat(engine.generate(ask(prompts, temperature=0.0, max_new_tokens=12)))
            assert [c.token_ids for c in answers] == greedy(model, prompts, 12)
        found = prove_updates_arrive(
            engine, lambda: full_weights(model), ProbedModule(model), [(5, 6, 7), (8, 9)]
        )
        assert all(difference < 1e-4 for difference in found.values())
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.filterwarnings("ignore")  # as above
def test_a_vllm_server_takes_an_update_of_experts(tokenizer, prompts, greedy, tmp_path):
    """Its worker, in this process."""
    kind = next(iter(CONFIGS))
    make(kind).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with vllm_process.process_state_restored():
        vllm_process.import_vllm()
        from vllm import SamplingParams as VLLMParams

        import llmac.engines.vllm_transfer  # noqa: F401, registers the backend

        llm = vllm_process.build(
            {
                "model": str(tmp_path),
                "dtype": "float32",
                "max_model_len": 64,
                "kv_cache_memory_bytes": 64 << 20,
                "enforce_eager": True,
                "generation_config": "vllm",
                "weight_transfer_config": {"backend": "llmac"},
            }
        )
    sender = WeightSender("shm", bucket_bytes=1 << 15)
    try:
        llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": sender.init_info()})
        for seed in (1, 2):
            model = make(kind, seed=seed)
            llm.collective_rpc("start_weight_update")
            for bucket in sender.buckets(full_weights(model)):
                llm.collective_rpc("update_weights", kwargs={"update_info": bucket})
            llm.collective_rpc("finish_weight_update")
            llm.reset_prefix_cache()
            params = VLLMParams(temperature=0.0, max_tokens=12, stop_token_ids=[1])
            inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            outputs = llm.generate(inputs, params, use_tqdm=False)
            answers = [tuple(output.outputs[0].token_ids) for output in outputs]
            assert answers == greedy(model, prompts, 12)
    finally:
        sender.close()
        vllm_process.shut_down(llm, keep_group=False)
