"""Updates of an engine that packs its weights, as GPU engines process theirs: only vLLM's reload is right for it."""

import importlib.util
import itertools

import pytest
import torch

from llmac.engines import vllm_process, vllm_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def packed(make_model, tokenizer, tmp_path_factory):
    """vLLM on CPU as it starts by itself, with a tied head; seed 0."""
    folder = str(tmp_path_factory.mktemp("packed"))
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with vllm_process.process_state_restored():
        if not vllm_process.import_vllm():
            pytest.skip("layers are packed on CPU only")
        from vllm import _custom_ops

        _custom_ops._supports_onednn = True  # what import_vllm switches off
        llm = vllm_process.build(
            {
                "model": folder,
                "dtype": torch.float32,
                "enforce_eager": True,
                "kv_cache_memory_bytes": 64 << 20,
                "max_num_seqs": 32,
                "generation_config": "vllm",
            }
        )
    yield llm
    _custom_ops._supports_onednn = False
    vllm_process.shut_down(llm, keep_group=False)


def sampled(llm, prompts):
    import vllm

    asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    params = vllm.SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[1])
    return [tuple(o.outputs[0].token_ids) for o in llm.generate(asked, params, use_tqdm=False)]


def test_a_packed_engine_is_known_and_reload_reaches_its_tied_head(
    packed, make_model, prompts, greedy
):
    assert not vllm_weights.is_as_loaded(packed)
    model = make_model(seed=1)
    vllm_weights.reload(packed, model.named_parameters())
    packed.reset_prefix_cache()
    assert sampled(packed, prompts) == greedy(model, prompts, 12)


# In the middle of a fused layer (its first two tensors have arrived), and after all but the last.
@pytest.mark.parametrize("cut", [3, 25])
def test_after_a_reload_that_broke_off_abandon_makes_the_next_one_right(
    cut, packed, make_model, prompts, greedy
):
    def breaks_off():
        yield from itertools.islice(make_model(seed=2).named_parameters(), cut)
        raise RuntimeError("the link is down")

    with pytest.raises(RuntimeError, match="the link is down"):
        vllm_weights.reload(packed, breaks_off())
    vllm_weights.abandon(packed)
    model = make_model(seed=3 + cut)
    vllm_weights.reload(packed, model.named_parameters())
    packed.reset_prefix_cache()
    assert sampled(packed, prompts) == greedy(model, prompts, 12)
